"""The product of tokens and a router's weight, in float32 whatever their dtype is.

Axes: t tokens, d model dim, e experts; outer experts stand before them: `...`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixture_of_experts.tracing import without_autocast


def router_logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`x weight` in `dtype`: `(..., t, d)` by `(..., d, e)`.

    Of operands of lower precision autograd would keep copies in `dtype` for the backward: twice the tokens.
    """
    with without_autocast(x.device):
        return x @ weight if x.dtype == dtype == weight.dtype else _Logits.apply(x, weight, dtype)


class _Logits(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return _product(x, weight, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.dtype = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        with without_autocast(x.device):
            grad_x = (grad @ weight.to(ctx.dtype).mT).to(x.dtype) if need_x else None
            grad_weight = (x.to(ctx.dtype).mT @ grad).to(weight.dtype) if need_weight else None
        return grad_x, grad_weight, None


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    alike = x.dtype == weight.dtype and x.ndim == weight.ndim == 2
    # neither AMD's libraries nor a DTensor have such a product
    if x.is_cuda and torch.version.hip is None and alike and not any(map(is_traceable_wrapper_subclass, (x, weight))):
        mm: Any = torch.mm
        return mm(x, weight, out_dtype=dtype)  # the same sums, without the copies
    return x.to(dtype) @ weight.to(dtype)
