"""Assignments of tokens to experts, `dispatch` of tokens to rows, and `combine`, the weighted sum for each token."""

from mixture_of_experts.dispatch.rows import add_rows, combine, dispatch, read_rows, sum_rows

__all__ = ["add_rows", "combine", "dispatch", "read_rows", "sum_rows"]
