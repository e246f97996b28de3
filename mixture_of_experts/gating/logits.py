"""Computes router logits with a matrix or a module, in float32 for inputs of any dtype.

Axes: t (tokens), d (model dimension), e (experts), and for modules b (groups) and n (tokens per group). `...` stands
for the outer expert dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixture_of_experts.support.batch_invariance import (
    BATCH_INVARIANT,
    SampledFunction,
    apply_elementwise,
    compute_with_gradient,
    multiply_batch_invariant,
    reject_batch_invariance,
)
from mixture_of_experts.support.checked_module import FixedShapeModule, checked_setting
from mixture_of_experts.support.checks import (
    check_devices,
    check_flag,
    check_number,
    check_size,
    check_sizes,
    describe_shape,
)
from mixture_of_experts.support.implementations import requested_implementation
from mixture_of_experts.support.private_torch import is_functorch_wrapped, is_in_forward_mode, is_wrapper_subclass
from mixture_of_experts.support.tracing import disable_autocast


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute logits `(..., b, n, e)` from tokens `(..., b, n, d)`, a matrix `(..., d, e)` and a bias `(..., e)`.

    The logits are computed in float32 (float64 for a float64 matrix), even under autocast. `x` is saved for the
    backward pass in its own dtype, whereas autograd would save a float32 copy, which may be twice as large.
    """
    check_devices("the router's weights", x, (weight,))
    dtype, rows = torch.float64 if weight.dtype == torch.float64 else torch.float32, x.flatten(-3, -2)
    with disable_autocast(x.device):
        if requested_implementation() == BATCH_INVARIANT:
            logits = multiply_batch_invariant(_differentiable, ROUTER_PRODUCTS[dtype], rows, weight, dtype)
        else:
            logits = _differentiable(rows, weight, dtype)  # this computes one product per outer expert
    if bias is not None:
        logits = logits + bias.to(dtype).unsqueeze(-2)
    return logits.view(*x.shape[:-1], weight.shape[-1])


def module_logits(module: nn.Module, x: Tensor, num_experts: int) -> Tensor:
    """Compute the logits of tokens `(..., b, n, d)` with a module, and return them in float32 (float64 if the module
    returns float64), even under autocast. The module runs in the dtype of the tokens or that of its weights, whichever
    is wider."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if not isinstance(module, RouterLogits):
        reject_batch_invariance(f"logits are computed by {type(module).__name__}")
    with disable_autocast(x.device):
        if weight is None or isinstance(module, RouterLogits):
            logits = module(x)
        else:
            logits = call_in_dtype(module, x, torch.promote_types(x.dtype, weight.dtype))
    if not isinstance(logits, Tensor) or logits.shape != (*x.shape[:-1], num_experts):
        wanted = (*x.shape[:-1], num_experts)
        raise ValueError(
            f"`logits` must return a tensor of shape {wanted}, with one logit per token and expert, got "
            f"{describe_shape(logits)}"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def call_in_dtype(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Call a module on `x`, with both inputs and weights cast to `dtype`."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.is_floating_point()}
    if next(iter(weights.values())).dtype == dtype:
        return module(x.to(dtype))
    return functional_call(module, {name: weight.to(dtype) for name, weight in weights.items()}, (x.to(dtype),))


class RouterLogits(FixedShapeModule):
    """A router module that computes the logits `multiplier * norm(x) w` in float32 and optionally soft-caps them.

    Args:
        dim, num_experts: model dimension d and number of experts e.
        norm_eps: epsilon of the RMS normalization, which divides tokens by their root mean square and multiplies them
            by `norm_weight (*outer, d)`. If None, normalization is disabled.
        multiplier: factor by which the logits are multiplied.
        softcap: maximum magnitude of the logits, enforced with `softcap * tanh(logits / softcap)`, or None for no
            limit.
        bias: whether to add `bias (*outer, e)` to the product.
        outer_expert_dims: leading dimensions of weights and inputs, as in `TopKGating`.
        device, dtype: device and dtype of the weights.

    Shape:
        The module maps `(*outer, b, n, d)` to `(*outer, b, n, e)` in float32, or in float64 for float64 weights.
        `weight` has the shape `(*outer, d, e)`.

    Example:
        >>> import torch
        >>> from mixture_of_experts import TopKGating
        >>> gate = TopKGating(dim=8, num_experts=4, logits=RouterLogits(8, 4, norm_eps=1e-6, softcap=30.0))
        >>> gate(torch.randn(2, 16, 8)).probs.shape
        torch.Size([2, 16, 4])
    """

    dim: int
    num_experts: int
    norm_eps: float | None
    softcap: float | None
    weight: nn.Parameter

    norm_weight: Tensor | None
    bias: Tensor | None
    multiplier: float = checked_setting(check_number)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        norm_eps: float | None = None,
        multiplier: float = 1.0,
        softcap: float | None = None,
        bias: bool = False,
        outer_expert_dims: int | Sequence[int] = (),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_experts = check_size("dim", dim), check_size("num_experts", num_experts)
        outer = check_sizes("outer_expert_dims", outer_expert_dims)
        self.norm_eps = None if norm_eps is None else check_number("norm_eps", norm_eps, at_least=0.0)
        self.multiplier = multiplier
        self.softcap = None if softcap is None else check_number("softcap", softcap, above=0.0)
        self.weight = nn.Parameter(torch.empty(*outer, dim, num_experts, device=device, dtype=dtype))
        for name, enabled, size in (("norm_weight", norm_eps is not None, dim), ("bias", bias, num_experts)):
            vector = torch.empty(*outer, size, device=device, dtype=dtype) if check_flag(name, enabled) else None
            self.register_parameter(name, None if vector is None else nn.Parameter(vector))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize `weight` from a normal distribution with standard deviation 1 / sqrt(d), `bias` with zeros, and
        `norm_weight` with ones."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_eps is not None and self.norm_weight is not None:
            dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            x = x.to(dtype)
            x = x * (x.square().mean(dim=-1, keepdim=True) + self.norm_eps).rsqrt()
            x = x * self.norm_weight.to(dtype)[..., None, None, :]
        logits = router_logits(x, self.weight, self.bias)
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits if self.softcap is None else self.softcap * apply_elementwise(torch.tanh, logits / self.softcap)


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
        with disable_autocast(x.device):
            if (
                _has_wide_product(x, weight)
                and x.dtype == torch.bfloat16
                and not (torch.is_grad_enabled() or is_functorch_wrapped(grad))
            ):
                return *_narrow_grads(x, weight, grad, need_x, need_weight), None
            grad_x = (grad @ weight.to(ctx.dtype).mT).to(x.dtype) if need_x else None
            grad_weight = (x.to(ctx.dtype).mT @ grad).to(weight.dtype) if need_weight else None
        return grad_x, grad_weight, None


def _narrow_grads(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of bfloat16 operands without creating float32 copies of the operands or of the tokens'
    gradient.

    `grad` is split into two bfloat16 tensors. Their sum represents all but the last 8 bits of the float32 values.
    Products are accumulated in float32. The resulting error is 100x smaller than the error from rounding the results to
    bfloat16.
    """
    *outer, t, e = grad.shape
    wide = grad.new_empty(*outer, t, 2, e, dtype=x.dtype)
    most, rest = wide.unbind(-2)
    if torch.compiler.is_compiling():  # torch.compile cannot trace a strided `out=`, but it fuses both steps
        rest.copy_(grad - most.copy_(grad))
    else:
        torch.sub(grad, most.copy_(grad), out=rest)
    wide, grad_x, grad_weight = wide.view(*outer, t, 2 * e), None, None
    if need_x:
        grad_x = wide @ torch.cat([weight, weight], dim=-1).mT
    if need_weight:
        sums = _wide_product(x.mT, wide)
        grad_weight = (sums[..., :e] + sums[..., e:]).to(weight.dtype)
    return grad_x, grad_weight


def _differentiable(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype == weight.dtype:
        return x @ weight
    if is_in_forward_mode():
        return x.to(dtype) @ weight.to(dtype)
    return _Logits.apply(x, weight, dtype) if torch.is_grad_enabled() else _product(x, weight, dtype)


def _compute_router_product(dtype: torch.dtype, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    return compute_with_gradient(lambda x: _differentiable(x, weight, dtype), x, y)


#: sampled functions for `_differentiable`, keyed by the dtype of the logits
ROUTER_PRODUCTS: dict[torch.dtype, SampledFunction] = {
    dtype: partial(_compute_router_product, dtype) for dtype in (torch.float32, torch.float64)
}


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and _has_wide_product(x, weight):
        return _wide_product(x, weight)
    return x.to(dtype) @ weight.to(dtype)


def _has_wide_product(x: Tensor, weight: Tensor) -> bool:
    """Return whether `_wide_product` supports these operands. AMD's libraries and DTensors do not implement this
    product."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    return x.dtype == weight.dtype and x.ndim == weight.ndim and not any(map(is_wrapper_subclass, (x, weight)))


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `x @ weight` with float32 accumulation and output, without creating float32 copies of the operands."""
    *outer, t, d = x.shape
    if not outer:
        mm: Any = torch.mm
        return mm(x, weight, out_dtype=torch.float32)
    bmm: Any = torch.bmm
    wide = bmm(x.reshape(-1, t, d), weight.reshape(-1, d, weight.shape[-1]), out_dtype=torch.float32)
    return wide.view(*outer, t, weight.shape[-1])
