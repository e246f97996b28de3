"""Triton kernels, and how they are launched: tensors in, tensors out."""
