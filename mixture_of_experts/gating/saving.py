"""What routers save for the backward: little, where numbers of every token and expert would be as much as the tokens.

Axes: n tokens, d model dim, e experts, k choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixture_of_experts.tracing import exporting, in_transform

Results = TypeVar("Results")
SMALL = 1 / 4  # of the bytes of the tokens: what a result in float32 may take and still be saved
LEAST = 1 << 16  # numbers of a router from which on results are computed anew; below it launches are all the time


def recomputed(function: Callable[..., Results], x: Tensor, weight: Tensor, *others: Tensor | None) -> Results:
    """`function(x, weight, *others)` of tokens `(..., n, d)` and a router `(..., d, e)`.

    Where its results `(..., n, e)` are large on a GPU, the backward computes anew what it needs of them: one pass more
    over the tokens. On a CPU that would take time that shows, and memory is less dear.
    """
    if not (torch.is_grad_enabled() and _are_large(x, weight) and _can_recompute(x)):
        return function(x, weight, *others)
    return checkpoint(function, x, weight, *others, use_reentrant=False, preserve_rng_state=False)  # type: ignore


def _are_large(x: Tensor, weight: Tensor) -> bool:
    dim, experts = weight.shape[-2:]
    return dim * experts >= LEAST and 4 * experts > SMALL * x.element_size() * dim


def _can_recompute(x: Tensor) -> bool:
    """On a GPU; transforms of torch.func know no hooks on what is saved, and exporters no recomputation."""
    return _on_gpu(x) and not (exporting() or in_transform())


def _on_gpu(x: Tensor) -> bool:
    return x.device.type not in ("cpu", "meta")


def gather_chosen(values: Tensor, index: Tensor) -> Tensor:
    """`values.gather(-1, index)`, of `(..., n, e)` those at `(..., n, k)`; on a GPU the values are not saved for it."""
    return _Choose.apply(values, index) if _on_gpu(values) else values.gather(-1, index)


def without_whole(index: Tensor) -> Tensor:
    """A part of a tensor that on a GPU does not save the whole of it."""
    return index.contiguous() if _on_gpu(index) else index


class _Choose(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        values, index = inputs
        ctx.length = values.shape[-1]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(*grad.shape[:-1], ctx.length).scatter_add(-1, index, grad), None
