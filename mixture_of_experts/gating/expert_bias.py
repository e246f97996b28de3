"""Counts the load of experts, by which the expert bias moves (arXiv 2408.15664).

The counts of a forward are added when its backward runs, so each forward counts once: activation checkpointing runs it
twice, but its backward once. Evaluation has no backward.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixture_of_experts.support.private_torch import in_transform


@torch.library.custom_op("mixture_of_experts::move_counts", mutates_args={"counts", "total"})
def move_counts(counts: Tensor, total: Tensor) -> None:
    """Add `counts` to `total`, then set `counts` to 0: a second backward through the same graph adds nothing.

    A compiled backward may change a buffer only by such an operator.
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


# Makes the output of `_CountInBackward` require a gradient; it gets none itself.
ANCHOR = torch.zeros((), requires_grad=True)


class _CountInBackward(torch.autograd.Function):
    """Returns `weight`; its backward counts.

    The counts are attributes of the context: checkpointing would recompute them if `save_for_backward` had them.
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
    """Return `weight`; its first backward adds `counts` to `total`.

    Args:
        weight: weights of the choices. The result requires a gradient even if they do not: a router may be frozen while
            the experts train.
        counts: integers of any shape, a tensor of this forward alone; it is set to 0 when it was added.
        total: the buffer, of that shape.
    """
    if not torch.is_grad_enabled():
        return weight
    anchor = None if weight.requires_grad else ANCHOR
    return _CountInBackward.apply(weight, anchor, counts, total)


def towards_mean(load: Tensor) -> Tensor:
    """`(..., e)` int64: 1 for an expert whose load `(..., e)` int64 is below the mean, -1 above it, 0 at it.

    It computes in integers, so balance is exact.
    """
    return torch.sign(load.sum(dim=-1, keepdim=True) - load.shape[-1] * load)


class OptimizerSteps:
    """Counts the steps of all optimizers in the process, from the first question on.

    No tensor tells of a step: a fused optimizer does not raise the version of what it changes.
    """

    number: int

    def __init__(self) -> None:
        self.number = -1

    def __call__(self, *of_hook: object) -> None:
        self.number += 1

    def so_far(self) -> int:
        """The number of steps."""
        if self.number < 0:
            self.number = 0
            register_optimizer_step_post_hook(self)
        return self.number


STEPS = OptimizerSteps()


class StepsWithoutUpdate:
    """Warns if a router trains while nobody moves its bias."""

    warned: bool
    steps: int
    seen: int

    SO_MANY = 10  # steps of the optimizer before the warning

    def __init__(self) -> None:
        self.start()
        self.warned = False

    def start(self) -> None:
        """Start counting steps; called when the bias moves."""
        self.steps, self.seen = 0, -1

    def training_forward(self, weight: Tensor | None) -> None:
        """Note a training forward of a router with this weight. It counts one step if there were any since the last."""
        if torch.compiler.is_compiling() or self.warned or weight is None or in_transform():
            return
        if not weight.requires_grad:  # a frozen router may keep its bias on purpose
            return
        so_far = STEPS.so_far()
        self.steps += self.seen not in (-1, so_far)
        self.seen = so_far
        if self.steps >= self.SO_MANY:
            self.warned = True
            warnings.warn(
                f"expert_bias=True counts loads, but nobody moved the bias in {self.steps} steps of the optimizer: use "
                "balance_experts(model, optimizer), its callback in a Trainer, or gate.update_bias(rate) after each "
                "step (a rate of 0 leaves the bias as it is)",
                stacklevel=4,
            )
