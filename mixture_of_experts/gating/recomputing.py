"""Saves memory in routers: on a GPU, large results for every token and expert are recomputed in the backward.

Axes: n tokens, d model dim, e experts, k choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixture_of_experts.support.private_torch import is_exporting, is_in_forward_mode, is_in_transform

Results = TypeVar("Results")
MAX_SAVED_SHARE = 1 / 4  # a float32 result of at most this share of the tokens' bytes is saved
MIN_ROUTER_WEIGHTS = 1 << 16  # results of routers with fewer weights are saved: there launches take all the time


def recomputed_on_gpu(
    function: Callable[..., Results], x: Tensor, weight: Tensor | None, *others: Tensor | None
) -> Results:
    """Return `function(x, weight, *others)`, results `(..., n, e)` of tokens `(..., n, d)` and a router `(..., d, e)`.

    On a GPU, if the results are large, the backward computes them again instead of saving them; this takes one more
    pass over the tokens. On a CPU recomputing is slow and memory is cheap, so results are saved; so are those without a
    matrix, by a module, which may draw random numbers.
    """
    large = weight is not None and _on_gpu(x) and torch.is_grad_enabled() and _are_large(x, weight)
    if not large or is_exporting() or is_in_transform():
        return function(x, weight, *others)
    return checkpoint(function, x, weight, *others, use_reentrant=False, preserve_rng_state=False)  # type: ignore


def _are_large(x: Tensor, weight: Tensor) -> bool:
    dim, experts = weight.shape[-2:]
    return dim * experts >= MIN_ROUTER_WEIGHTS and 4 * experts > MAX_SAVED_SHARE * x.element_size() * dim


def _on_gpu(x: Tensor) -> bool:
    return x.device.type not in ("cpu", "meta")


def gather_chosen(values: Tensor, index: Tensor) -> Tensor:
    """`values.gather(-1, index)`, of `(..., n, e)` at `(..., n, k)`; on a GPU it does not save the values."""
    if not _on_gpu(values) or is_in_forward_mode():
        return values.gather(-1, index)
    return _Choose.apply(values, index)


def without_whole(index: Tensor) -> Tensor:
    """A copy of a part of a tensor on a GPU, so that saving the part does not keep the whole tensor alive."""
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
