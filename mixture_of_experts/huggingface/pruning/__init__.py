"""Removes experts of layers, by what they do on a text."""
