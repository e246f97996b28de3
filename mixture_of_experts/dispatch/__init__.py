"""Which token goes where, and the moving of tokens: `dispatch` to rows, and `combine`, each token's weighted sum."""

from mixture_of_experts.dispatch.rows import add_rows, combine, dispatch, read_rows, sum_rows

__all__ = ["add_rows", "combine", "dispatch", "read_rows", "sum_rows"]
