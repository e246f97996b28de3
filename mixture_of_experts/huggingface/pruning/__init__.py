"""Removes experts from layers, based on how much they contribute on calibration data."""
