"""Counts the load of experts, by which the expert bias moves (arXiv 2408.15664).

The counts of a forward are added when its backward runs, so each forward counts once: activation checkpointing runs it
twice, but its backward once. Evaluation has no backward.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from mixture_of_experts.support.private_torch import (
    assume_constant_result,
    exclude_from_ddp_broadcast,
    is_in_ddp,
    is_in_forward_mode,
    is_in_transform,
)

#: buffers of gates in which a rank counts its own tokens, and the coefficient that follows from such counts
RANK_LOCAL_BUFFERS = ("expert_counts", "expert_histogram", "choice_counts", "l1_coef")


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
    if is_in_ddp():  # a graph is traced again in another DDP
        # also without gradients: reentrant checkpointing enables them in the backward only
        keep_rank_counts(torch.compiler.is_compiling())
    if not torch.is_grad_enabled() or is_in_forward_mode():  # forward mode has no backward in which to count
        return weight
    anchor = None if weight.requires_grad else ANCHOR
    return _CountInBackward.apply(weight, anchor, counts, total)


@assume_constant_result  # runs while a graph is traced
def keep_rank_counts(traced: bool) -> None:
    """Keep `DistributedDataParallel`, if one is running, from replacing each rank's counts with those of the first rank
    before the next forward. Before the first one all counts are 0."""
    if copied := exclude_from_ddp_broadcast(RANK_LOCAL_BUFFERS, traced):
        warnings.warn(
            f"DistributedDataParallel copies {copied[0]} from the first rank before each forward, so the counts of the "
            "other ranks are lost if gradients are accumulated over several forwards: before you wrap the model, call "
            "balance_experts(model, optimizer), or mixture_of_experts.parallel.ignore_experts_in_ddp(model)",
            stacklevel=2,
        )


class StepsWithoutUpdate:
    """Warns if a router trains while its bias stays as it is.

    An optimizer step shows in the version counter of the router's weight. FSDP2 hides it, because it gathers weights
    for each forward: there, many forwards count instead.
    """

    MAX_STEPS = 50  #: optimizer steps before the warning
    SO_MANY = 1000  #: training forwards before the warning; a step of micro-batches, recomputed or not, takes fewer
    steps: int = 0  #: since the bias moved
    forwards: int = 0  #: since the bias moved
    version: int | None = None  #: of the weight in the last training forward
    warned: bool = False  #: since the bias moved

    def bias_moved(self) -> None:
        """Start counting anew."""
        self.steps, self.forwards, self.warned = 0, 0, False

    def training_forward(self, weight: Tensor | None) -> None:
        """Note a training forward of a router with this weight. A frozen one may keep its bias on purpose."""
        if torch.compiler.is_compiling() or weight is None or not weight.requires_grad or is_in_transform():
            return
        self.forwards += 1
        self.steps += self.version not in (None, weight._version)
        self.version = weight._version
        many_steps = self.steps >= self.MAX_STEPS
        if not self.warned and (many_steps or self.forwards >= self.SO_MANY):
            count = f"{self.steps} optimizer steps" if many_steps else f"{self.forwards} training forwards"
            self.warned = True
            warnings.warn(
                f"expert_bias=True counts loads, but nothing moved the bias in {count}: use balance_experts(model, "
                "optimizer), its callback in a Trainer, or gate.update_bias(rate) after each step (a rate of 0 leaves "
                "the bias as it is)",
                stacklevel=4,
            )
