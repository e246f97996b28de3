"""Sparse blocks of `transformers`: read, converted, and computed by the ways of `ops`."""
