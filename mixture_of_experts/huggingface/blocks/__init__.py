"""Reads and converts `transformers` sparse blocks, and runs their experts with the implementations in `ops`."""
