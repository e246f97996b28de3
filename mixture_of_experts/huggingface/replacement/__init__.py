"""Finds feed-forward networks in a model, and puts mixtures of experts in their place."""
