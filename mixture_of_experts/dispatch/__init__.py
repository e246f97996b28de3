"""Assigns tokens to experts. `dispatch` moves tokens to rows, and `combine` computes the weighted sum of each token's
rows."""

from mixture_of_experts.dispatch.rows import add_rows, combine, dispatch, read_rows, sum_rows

__all__ = ["add_rows", "combine", "dispatch", "read_rows", "sum_rows"]
