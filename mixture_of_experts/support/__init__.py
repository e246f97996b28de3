"""Utilities for the whole package: checks, settings, tracing, and access to private torch names."""
