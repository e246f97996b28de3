"""Counting the load that the expert bias is moved by (arXiv 2408.15664).

A forward counts once, when its backward runs: activation checkpointing runs a forward twice but its backward once, and
evaluation has none.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from mixture_of_experts.tracing import in_transform


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


def towards_mean(load: Tensor) -> Tensor:
    """`(..., e)` int64: 1 for experts with less than the mean load `(..., e)` int64, -1 for those with more, 0 else.

    In integers, so that there is no rounding at balance.
    """
    return torch.sign(load.sum(dim=-1, keepdim=True) - load.shape[-1] * load)


class StepsWithoutUpdate:
    """Notices that counts pile up: a router that is trained, while nobody moves its bias."""

    warned: bool
    steps: int
    version: int

    SO_MANY = 10  # steps of an optimizer

    def __init__(self) -> None:
        self.start()
        self.warned = False

    def start(self) -> None:
        """The bias was moved."""
        self.steps, self.version = 0, -1

    def training_forward(self, weight: Tensor | None) -> None:
        """A forward counts: a step of an optimizer before it shows in the version of the router's weight."""
        if torch.compiler.is_compiling() or self.warned or weight is None or in_transform():
            return
        version = weight._version
        self.steps += self.version not in (-1, version)
        self.version = version
        if self.steps >= self.SO_MANY:
            self.warned = True
            warnings.warn(
                f"expert_bias=True counts loads, but nobody moved the bias in {self.steps} steps of the optimizer: use "
                "balance_experts(model, optimizer), its callback in a Trainer, or gate.update_bias(rate) after each "
                "step (a rate of 0 leaves the bias as it is)",
                stacklevel=4,
            )
