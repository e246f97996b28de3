"""Removes experts from layers according to their contribution on calibration data."""
