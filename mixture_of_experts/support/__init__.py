"""Utilities for the whole package: checks, settings, tracing, and private names of torch."""
