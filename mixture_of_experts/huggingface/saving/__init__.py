"""Saves and loads models with layers, and exports them as stock models of `transformers`."""
