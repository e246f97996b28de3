"""Finds feed-forward networks in a model and replaces them with `MoE` layers."""
