"""Utilities shared by the whole package: checks, settings, tracing, private names of torch."""
