"""Reduces the router's memory use on a GPU by recomputing large results in the backward pass.

Axes: n (tokens), d (model dimension), e (experts), k (choices).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixture_of_experts.support.private_torch import is_exporting, is_in_forward_mode, is_in_transform

Results = TypeVar("Results")
MAX_SAVED_SHARE = 1 / 4  # maximum size of saved float32 results, as a fraction of the tokens' bytes
MIN_ROUTER_WEIGHTS = 1 << 16  # smaller routers always save results, because kernel launches dominate their time


def recomputed_on_gpu(
    function: Callable[..., Results], x: Tensor, weight: Tensor | None, *others: Tensor | None
) -> Results:
    """Return `function(x, weight, *others)`, which computes results `(..., n, e)` from tokens `(..., n, d)` and a
    router `(..., d, e)`.

    On a GPU, large results are recomputed in the backward pass instead of being saved, at the cost of another pass over
    the tokens. Results are saved on a CPU, where recomputation is slow and memory is cheap. Results are also saved if
    they are computed by a module instead of a matrix, because the module may draw random numbers.
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
    """Return `values.gather(-1, index)`. On a GPU, `values` is not saved for the backward pass."""
    if not _on_gpu(values) or is_in_forward_mode():
        return values.gather(-1, index)
    return _Choose.apply(values, index)


def copy_slice_on_gpu(index: Tensor) -> Tensor:
    """Copy a slice of a tensor on a GPU, so that saving the slice does not keep the whole tensor alive."""
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
