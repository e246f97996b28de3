"""Finds feed-forward networks in a model and replaces them by mixtures of experts."""
