"""Sparse blocks of `transformers`: reading and converting them, and computing them with the implementations of
`ops`."""
