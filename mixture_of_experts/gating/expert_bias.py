"""Counts the load of each expert to update the expert bias (arXiv 2408.15664).

A forward pass is counted when its backward pass runs. Each forward pass is therefore counted once, even if activation
checkpointing runs it twice, and evaluation is not counted.
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

#: gate buffers in which each rank counts its own tokens, and the coefficient derived from these counts
RANK_LOCAL_BUFFERS = ("expert_counts", "expert_histogram", "choice_counts", "l1_coef")


@torch.library.custom_op("mixture_of_experts::move_counts", mutates_args={"counts", "total"})
def move_counts(counts: Tensor, total: Tensor) -> None:
    """Add `counts` to `total`, and then set `counts` to 0, so that a second backward pass through the same graph adds
    nothing.

    A custom operator is required because a compiled backward pass cannot modify buffers in any other way.
    """
    total.add_(counts)
    counts.zero_()


@move_counts.register_fake
def _(counts: Tensor, total: Tensor) -> None:
    return None


@move_counts.register_vmap
def _(info, in_dims, counts: Tensor, total: Tensor):
    of_counts, of_total = in_dims
    if of_total is None:  # per-sample gradients: the samples share a buffer
        move_counts(counts.sum(dim=of_counts), total)
    else:  # an ensemble: each member has its own
        total = total.movedim(of_total, 0)
        move_counts(counts.expand_as(total).clone() if of_counts is None else counts.movedim(of_counts, 0), total)
    counts.zero_()
    return None, None


# Makes the output of `_CountInBackward` require a gradient, but receives none itself.
ANCHOR = torch.zeros((), requires_grad=True)


class _CountInBackward(torch.autograd.Function):
    """Returns `weight` unchanged, and adds counts in the backward pass.

    The counts are stored as attributes of the context, because checkpointing would recompute tensors saved with
    `save_for_backward`.
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
    """Return `weight` as a tensor that adds `counts` to `total` in its first backward pass.

    Args:
        weight: weights of the choices. The result requires a gradient even if `weight` does not, because the experts
            may be trained with a frozen router.
        counts: integer tensor of any shape, used only by this forward pass. Its elements are set to 0 after they are
            added.
        total: a buffer with the same shape as `counts`.
    """
    if is_in_ddp():  # graphs are retraced inside a different DDP wrapper
        # called even without gradients, because reentrant checkpointing enables them only in the backward pass
        keep_rank_counts(torch.compiler.is_compiling())
    if not torch.is_grad_enabled() or is_in_forward_mode():  # forward mode has no backward pass
        return weight
    anchor = None if weight.requires_grad else ANCHOR
    return _CountInBackward.apply(weight, anchor, counts, total)


@assume_constant_result  # this function runs during tracing
def keep_rank_counts(traced: bool) -> None:
    """Prevent the currently running `DistributedDataParallel` from overwriting each rank's counts with those of the
    first rank before the next forward pass. Before the first forward pass, all counts are 0."""
    if copied := exclude_from_ddp_broadcast(RANK_LOCAL_BUFFERS, traced):
        warnings.warn(
            f"DistributedDataParallel copies {copied[0]} from the first rank before each forward pass, so accumulating "
            "gradients over several passes loses the counts from other ranks. Before wrapping the model, call "
            "balance_experts(model, optimizer) or mixture_of_experts.parallel.ignore_experts_in_ddp(model)",
            stacklevel=2,
        )


class StepsWithoutUpdate:
    """Warns if a router is trained while its expert bias is never updated.

    Optimizer steps are detected from the version counter of the router's weight. Under FSDP2, which gathers weights for
    each forward pass, this counter does not reveal optimizer steps, so forward passes are counted instead.
    """

    MAX_STEPS = 50  #: number of optimizer steps before the warning
    #: number of training forward passes before the warning; a step runs fewer, even with recomputed micro-batches
    MAX_FORWARDS = 1000
    steps: int = 0  #: number of optimizer steps since the last update
    forwards: int = 0  #: number of training forward passes since the last update
    version: int | None = None  #: version of the weight in the last training forward pass
    warned: bool = False  #: whether the warning has been emitted since the last update

    def reset(self) -> None:
        """Reset the counts after the bias is updated."""
        self.steps, self.forwards, self.warned = 0, 0, False

    def count_forward(self, weight: Tensor | None) -> None:
        """Count a training forward pass of the router that has this weight. Frozen routers are ignored, because they
        may keep their bias intentionally."""
        if torch.compiler.is_compiling() or weight is None or not weight.requires_grad or is_in_transform():
            return
        self.forwards += 1
        self.steps += self.version not in (None, weight._version)
        self.version = weight._version
        many_steps = self.steps >= self.MAX_STEPS
        if not self.warned and (many_steps or self.forwards >= self.MAX_FORWARDS):
            count = f"{self.steps} optimizer steps" if many_steps else f"{self.forwards} training forward passes"
            self.warned = True
            warnings.warn(
                f"expert_bias=True is set, but the bias was not updated in {count}. Use balance_experts(model, "
                "optimizer) or its Trainer callback, or call gate.update_bias(rate) after each step (rate=0 leaves the "
                "bias unchanged)",
                stacklevel=4,
            )
