"""Removes experts of layers based on what they contribute on calibration data."""
