"""Saves and loads models with `MoE` layers, and exports them as stock `transformers` models."""
