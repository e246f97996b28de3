"""Speed and memory of the layer beside its rivals and its products: `python -m benchmarks` (see README.md here)."""
