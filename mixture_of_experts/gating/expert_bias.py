"""Counting the load that the expert bias is moved by (arXiv 2408.15664).

A forward counts once, when its backward runs: activation checkpointing runs a forward twice but its backward once, and
evaluation has none.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mixture_of_experts::add_counts", mutates_args={"total"})
def add_counts(total: Tensor, counts: Tensor) -> None:
    """`total += counts`, as an operator of its own so that a compiled backward may mutate the buffer."""
    total.add_(counts)


@add_counts.register_fake
def _(total: Tensor, counts: Tensor) -> None:
    return None


class _CountInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, counts: Tensor, total: Tensor) -> Tensor:
        ctx.counts, ctx.total = counts, total
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        add_counts(ctx.total, ctx.counts)
        return grad, None, None


def count_in_backward(weight: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    """`weight` itself; when its gradient arrives, `counts` is added to `total`."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return _CountInBackward.apply(weight, counts, total)
