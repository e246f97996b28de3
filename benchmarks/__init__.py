"""Speed and memory of the layer beside its rivals and its floor: `python -m benchmarks` (see README.md here)."""
