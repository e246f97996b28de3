"""Reads and converts the sparse blocks of `transformers`, and runs their experts with the implementations in `ops`."""
