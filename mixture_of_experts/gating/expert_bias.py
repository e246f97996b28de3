"""Counting the load that the expert bias is moved by (arXiv 2408.15664).

A forward counts once, when its backward runs: activation checkpointing runs a forward twice but its backward once, and
evaluation has none.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mixture_of_experts::move_counts", mutates_args={"counts", "total"})
def move_counts(counts: Tensor, total: Tensor) -> None:
    """Add `counts` to `total` and clear it, so that a second backward through the same graph adds nothing.

    An operator of its own, so that a compiled backward may mutate the buffer.
    """
    total.add_(counts)
    counts.zero_()


@move_counts.register_fake
def _(counts: Tensor, total: Tensor) -> None:
    return None


@move_counts.register_vmap
def _(info, in_dims, counts: Tensor, total: Tensor):
    move_counts(counts.sum(dim=in_dims[0]), total)
    counts.zero_()
    return None, None


# Only ever passed to `_CountInBackward`, where it makes the output require a gradient; it gets none itself.
ANCHOR = torch.zeros((), requires_grad=True)


class _CountInBackward(torch.autograd.Function):
    """`weight` unchanged; its backward counts.

    Both counts are plain attributes of the context: what `save_for_backward` keeps, checkpointing would recompute.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, anchor: Tensor | None, counts: Tensor, total: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, ctx.counts, ctx.total = inputs

    @staticmethod
    def backward(ctx, grad: Tensor):
        move_counts(ctx.counts, ctx.total)
        return grad, None, None, None


def count_in_backward(weight: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    """`weight` itself; when its gradient first arrives, `counts` is added to `total`.

    Args:
        weight: weights of the choices. If they depend on no parameter (a frozen router on an input without gradient),
            they are made to require a gradient all the same: the experts may be training.
        counts: `(*outer, e)` int64, a tensor of this forward's own; it is cleared when it has been counted.
        total: `(*outer, e)` int64, the buffer.
    """
    if not torch.is_grad_enabled():
        return weight
    anchor = None if weight.requires_grad else ANCHOR
    return _CountInBackward.apply(weight, anchor, counts, total)
