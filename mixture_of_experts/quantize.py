"""Frozen experts in int8, with one scale for each output channel: half of bfloat16's bytes, a quarter of float32's.

Axes: e experts, t tokens, r rows (sorted by expert), p inner and q outer dimension of a weight, d model dim,
o dim of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.dispatch.decision import Decision
from mixture_of_experts.experts import RoutedExperts, StackedExperts
from mixture_of_experts.ops.activations import hidden_layer
from mixture_of_experts.ops.plain import bias_of_rows
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import int8_product, wrapped_module
from mixture_of_experts.support.tracing import can_read, without_autocast
from mixture_of_experts.unstack import exchange

Model = TypeVar("Model", bound=nn.Module)

FEW_ROWS = 16  # of an expert; for more a product of bfloat16 is faster
MULTIPLE = 16  # of p; for others torch's operator reads beyond the weight


def quantize_experts(model: Model) -> Model:
    """Replace all stacked experts of a model by `QuantizedExperts`; change the model and return it.

    Their weights are rounded to int8 and cannot be trained. Gradients reach tokens, routers and all else. Quantise in
    the dtype in which you compute: a later cast rounds the scales.

    Args:
        model: a model with `MoE` layers anywhere in it, whose experts are frozen.

    Raises:
        ValueError: the model has no stacked experts, or is itself one; experts are trainable, on the meta device, or in
            a wrapper, as PEFT's adapters are.
        TypeError: weights are no plain parameters, for example spread over processes.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> moe, x = MoE(dim=16, num_experts=4, second_policy_eval="all").eval(), torch.randn(1, 10, 16)
        >>> before = moe(x)[0]
        >>> _ = moe.experts.requires_grad_(False)
        >>> quantize_experts(moe).experts
        QuantizedExperts(
          16, 4, hidden_dim=64
          (act): GELU(approximate='none')
        )
        >>> bool((moe(x)[0] - before).norm() < 0.02 * before.norm())
        True
    """
    for name, module in check_model("model", model).named_modules():
        if isinstance(wrapped_module(module), StackedExperts):
            raise ValueError(
                f"{name} is a {type(module).__name__} around experts, which would compute without it: merge adapters, "
                "or quantise before experts are wrapped"
            )
    return exchange(model, StackedExperts, quantized, "stacked experts (Experts, GatedExperts)")


def quantized(experts: StackedExperts, name: str) -> QuantizedExperts:
    """The experts in int8, after a check that their weights are plain, frozen and in memory."""
    for key, weight in experts.named_parameters(recurse=False):
        if type(weight) is not nn.Parameter:
            raise TypeError(f"{name}.{key} is a {type(weight).__name__}: quantise before experts are spread")
        if weight.requires_grad:
            raise ValueError(f"{name}.{key} is trainable, and int8 is not: call requires_grad_(False) of the experts")
        if weight.is_meta:
            raise ValueError(f"{name}.{key} is on the meta device, without numbers to round: load the weights first")
    return QuantizedExperts(experts)


class QuantizedExperts(RoutedExperts):
    """Frozen experts with weights in int8, which `quantize_experts` makes of `Experts` and `GatedExperts`.

    A weight is `int8 * scale`, rounded to nearest. The experts that have tokens are dequantised one after the other,
    never the whole stack. On a CPU in bfloat16, few rows are multiplied with int8 directly. On a GPU every product
    waits for the numbers of rows.

    Attributes:
        w1_int8, w3_int8, w2_int8: buffers `(*e, q, p)`, the transposed weights; w3 only if gated.
        w1_scale, w3_scale, w2_scale: buffers `(*e, q)`.
        b1, b3, b2: biases `(*e, q)` as buffers, or None.

    Args:
        experts: the experts whose settings and weights it takes.
    """

    act: nn.Module
    dim: int
    dim_out: int
    hidden_dim: int
    num_experts: int | tuple[int, ...]
    expert_dims: tuple[int, ...]
    dropout: float
    gated: bool
    w2_scale: Tensor

    def __init__(self, experts: StackedExperts) -> None:
        super().__init__()
        self.dim, self.dim_out, self.hidden_dim = experts.dim, experts.dim_out, experts.hidden_dim
        self.num_experts, self.expert_dims = experts.num_experts, experts.expert_dims
        self.act, self.dropout, self.gated = experts.act, experts.dropout, experts.gated
        for number in (1, 3, 2) if self.gated else (1, 2):
            for name, value in zip(("int8", "scale"), to_int8(getattr(experts, f"w{number}")), strict=True):
                self.register_buffer(f"w{number}_{name}", value)
            bias = getattr(experts, f"b{number}")
            self.register_buffer(f"b{number}", None if bias is None else bias.detach().clone())
        self.train(experts.training)

    def forward(self, x: Tensor, decision: Decision | None = None) -> Tensor:
        decoding = not (self.training or torch.is_grad_enabled()) and x.shape[0] == 1 and can_read(x)
        wanted = (*self.expert_dims, "s", self.dim)
        if decision is None and (*x.shape[:-2], "s", x.shape[-1]) != wanted:
            raise ValueError(f"they read slots of shape ({', '.join(map(str, wanted))}), got {tuple(x.shape)}")
        if decision is None or decision.k is None or not decoding:
            return super().forward(x, decision)
        out = x.new_zeros(1, self.dim_out, dtype=torch.promote_types(x.dtype, torch.float32))
        chosen = zip(decision.expert.tolist(), decision.weight.tolist(), decision.kept.tolist(), strict=True)
        for expert, weight, kept in chosen:
            if kept:
                out.add_(self._of_expert(x, expert), alpha=weight)
        return out.to(x.dtype)

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            out = rows_by_int8(x, weight, scale, num_tokens_per_expert, False)
            return out if bias is None else out + bias_of_rows(bias.to(x.dtype), num_tokens_per_expert, x.shape[0])

        return self._feed_forward(rows, linear)

    def _of_expert(self, x: Tensor, expert: int) -> Tensor:
        """Tokens `(t, d)`, all of them by one expert: `(t, o)`."""

        def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            out = product(x, weight[expert], scale[expert])
            return out if bias is None else out + bias[expert].to(x.dtype)

        return self._feed_forward(x, linear)

    def _feed_forward(self, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        """Outputs for x, in the dtype of the scales or of autocast, by `linear(x, weight, scale, bias)`."""
        last, kind = len(self.expert_dims) - 1, x.device.type

        def layer(x: Tensor, number: int) -> Tensor:
            parts = (self._buffers[name] for name in (f"w{number}_int8", f"w{number}_scale", f"b{number}"))
            return linear(x, *(part.flatten(0, last) if part is not None and last else part for part in parts))

        dtype = self.w2_scale.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        with without_autocast(x.device):
            read = x.to(dtype)
            hidden = hidden_layer(self.act, [layer(read, number) for number in ((1, 3) if self.gated else (1,))])
            hidden = F.dropout(hidden, self.dropout) if self.dropout and self.training else hidden
            return layer(hidden, 2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, hidden_dim={self.hidden_dim}"


@torch.no_grad()
def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(*e, p, q)` as int8 `(*e, q, p)`, and the scale `(*e, q)` of each output channel, expert by expert. What
    is rounded is divided by the scale in the dtype of the weight, so that rounding the scale costs nothing."""
    found = []
    for matrix in weight.flatten(0, -3):
        wide = matrix.mT.to(torch.promote_types(weight.dtype, torch.float32))
        scale = (wide.abs().amax(dim=-1) / 127).to(weight.dtype)
        scale = torch.where(scale == 0, 1, scale)
        found.append(((wide / scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), scale))
    small, scales = (torch.stack(parts) for parts in zip(*found, strict=True))
    dims, (p, q) = weight.shape[:-2], weight.shape[-2:]
    return small.view(*dims, q, p), scales.view(*dims, q)


def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x `(n, p)` times a weight `(q, p)` of int8, times the scale `(q,)` of each output: `(n, q)`."""
    scale = scale.to(x.dtype)
    if DIRECT and x.is_cpu and x.dtype == torch.bfloat16 and x.shape[0] <= FEW_ROWS and x.shape[1] % MULTIPLE == 0:
        return int8_product(x, weight, scale)
    return (x @ weight.to(x.dtype).mT).mul_(scale)


@torch.library.custom_op("mixture_of_experts::rows_by_int8", mutates_args=())
def rows_by_int8(x: Tensor, weight: Tensor, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
    """Rows `(r, p)` sorted by expert times the weights `(e, q, p)` of their experts: `(r, q)`. With `back` the gradient
    of those, from that of the products: rows `(r, q)` to `(r, p)`. 0 for rows past the last expert's."""
    out, start = x.new_zeros(x.shape[0], weight.shape[2 if back else 1]), 0
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        if count:
            rows, w, s = x[start : start + count], weight[expert], scale[expert]
            out[start : start + count] = (rows * s.to(x.dtype)) @ w.to(x.dtype) if back else product(rows, w, s)
            start += count
    return out


@rows_by_int8.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if back else 1])


def _save(ctx, inputs, output) -> None:
    _, *tensors, ctx.back = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    return rows_by_int8(grad, *ctx.saved_tensors, not ctx.back), None, None, None, None


rows_by_int8.register_autograd(_backward, setup_context=_save)


def is_direct() -> bool:
    """Whether torch multiplies with int8 in one operator on a CPU, and rightly: compared with a product of float32."""
    x = torch.arange(-48, 48, device="cpu").view(3, 32).to(torch.bfloat16)
    weight = torch.arange(-128, 127, device="cpu")[:160].view(5, 32).to(torch.int8)
    scale = torch.tensor([0.5, 1, 2, 4, 8], dtype=torch.bfloat16, device="cpu")
    try:
        found = int8_product(x, weight, scale).float()
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, (x.float() @ weight.float().T) * scale.float(), rtol=0.01, atol=0.0)


DIRECT = is_direct()
