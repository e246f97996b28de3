"""Sparse blocks of `transformers`: reading, converting, and computing them with the implementations of `ops`."""
