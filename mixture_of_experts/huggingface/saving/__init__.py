"""Saves models with layers, loads them, and makes stock models of `transformers` of them."""
