"""The product of tokens and a router's weight, in float32 whatever their dtype is.

Axes: t tokens, d model dim, e experts; outer experts stand before them: `...`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.private_torch import is_wrapper_subclass
from mixture_of_experts.tracing import is_wrapped, without_autocast


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
            if (
                _has_wide_product(x, weight)
                and x.dtype == torch.bfloat16
                and not (torch.is_grad_enabled() or is_wrapped(grad))
            ):
                return *_narrow_grads(x, weight, grad, need_x, need_weight), None
            grad_x = (grad @ weight.to(ctx.dtype).mT).to(x.dtype) if need_x else None
            grad_weight = (x.to(ctx.dtype).mT @ grad).to(weight.dtype) if need_weight else None
        return grad_x, grad_weight, None


def _narrow_grads(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of bfloat16 operands without a copy of either, or of the tokens' gradient, in float32.

    Two numbers of bfloat16 add up to one of float32 but for its last 8 bits, and products sum in float32: what is lost
    is a hundredth of what rounding the results to bfloat16 loses.
    """
    (t, e), wide = grad.shape, grad.new_empty(grad.shape[0], 2, grad.shape[1], dtype=x.dtype)
    most, rest = wide.unbind(1)
    if torch.compiler.is_compiling():  # it traces no `out=` with gaps, and makes one kernel of both
        rest.copy_(grad - most.copy_(grad))
    else:
        torch.sub(grad, most.copy_(grad), out=rest)
    wide, grad_x, grad_weight = wide.view(t, 2 * e), None, None
    if need_x:
        grad_x = wide @ torch.cat([weight, weight], dim=-1).mT
    if need_weight:
        sums = _wide_product(x.mT, wide)
        grad_weight = (sums[:, :e] + sums[:, e:]).to(weight.dtype)
    return grad_x, grad_weight


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and _has_wide_product(x, weight):
        return _wide_product(x, weight)
    return x.to(dtype) @ weight.to(dtype)


def _has_wide_product(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a product of them in float32: neither AMD's libraries nor a DTensor have it."""
    alike = x.dtype == weight.dtype and x.ndim == weight.ndim == 2
    plain = not any(map(is_wrapper_subclass, (x, weight)))
    return x.is_cuda and torch.version.hip is None and alike and plain


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight` in float32: the same sums as of copies in float32, without them."""
    mm: Any = torch.mm
    return mm(x, weight, out_dtype=torch.float32)
