"""Counts the load of experts, from which the expert bias is updated (arXiv 2408.15664).

The counts of a forward are added when its backward runs. Each forward therefore counts once, even if activation
checkpointing runs it twice, and evaluation does not count.
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

#: gate buffers in which each rank counts its own tokens, and the coefficient that is derived from these counts
RANK_LOCAL_BUFFERS = ("expert_counts", "expert_histogram", "choice_counts", "l1_coef")


@torch.library.custom_op("mixture_of_experts::move_counts", mutates_args={"counts", "total"})
def move_counts(counts: Tensor, total: Tensor) -> None:
    """Add `counts` to `total`, then set `counts` to 0, so that a second backward through the same graph adds nothing.

    This is a custom operator because a compiled backward cannot modify a buffer otherwise.
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


# Makes the output of `_CountInBackward` require a gradient, but receives none itself.
ANCHOR = torch.zeros((), requires_grad=True)


class _CountInBackward(torch.autograd.Function):
    """The identity of `weight`, whose backward adds counts.

    The counts are attributes of the context, because checkpointing would recompute tensors in `save_for_backward`.
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
    """Return `weight` as a tensor whose first backward adds `counts` to `total`.

    Args:
        weight: weights of the choices. The result requires a gradient even if they do not, because a router may be
            frozen while the experts are trained.
        counts: integers of any shape, in a tensor that only this forward uses. It is set to 0 after it was added.
        total: the buffer, with the same shape.
    """
    if is_in_ddp():  # a graph is retraced inside another DDP wrapper
        # called even without gradients, because reentrant checkpointing enables them only in the backward pass
        keep_rank_counts(torch.compiler.is_compiling())
    if not torch.is_grad_enabled() or is_in_forward_mode():  # forward mode has no backward pass
        return weight
    anchor = None if weight.requires_grad else ANCHOR
    return _CountInBackward.apply(weight, anchor, counts, total)


@assume_constant_result  # this function runs during tracing
def keep_rank_counts(traced: bool) -> None:
    """Prevent a running `DistributedDataParallel` from overwriting each rank's counts with those of the first rank
    before the next forward. Before the first forward, all counts are 0."""
    if copied := exclude_from_ddp_broadcast(RANK_LOCAL_BUFFERS, traced):
        warnings.warn(
            f"DistributedDataParallel copies {copied[0]} from the first rank before each forward pass, so accumulating "
            "gradients over several passes loses the counts from other ranks. Before wrapping the model, call "
            "balance_experts(model, optimizer) or mixture_of_experts.parallel.ignore_experts_in_ddp(model)",
            stacklevel=2,
        )


class StepsWithoutUpdate:
    """Warns if a router is trained while its expert bias is never updated.

    Optimizer steps are detected by the version counter of the router's weight. Under FSDP2, which gathers weights for
    each forward, the counter does not reveal steps, so the warning depends on the number of forwards.
    """

    MAX_STEPS = 50  #: number of optimizer steps before the warning
    SO_MANY = 1000  #: training forward passes before the warning; a step has fewer, even with recomputed micro-batches
    steps: int = 0  #: number of optimizer steps since the last update
    forwards: int = 0  #: number of training forward passes since the last update
    version: int | None = None  #: version of the weight in the last training forward pass
    warned: bool = False  #: whether the warning was emitted since the last update

    def bias_moved(self) -> None:
        """Reset the counts after an update of the bias."""
        self.steps, self.forwards, self.warned = 0, 0, False

    def training_forward(self, weight: Tensor | None) -> None:
        """Count a training forward of a router with this weight. Frozen routers may keep their bias on purpose."""
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
                f"expert_bias=True is set, but the bias was not updated in {count}. Use balance_experts(model, "
                "optimizer) or its Trainer callback, or call gate.update_bias(rate) after each step (rate=0 leaves the "
                "bias unchanged)",
                stacklevel=4,
            )
