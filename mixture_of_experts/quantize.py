"""Frozen experts in 8 bits a number: half of bfloat16's bytes, a quarter of float32's.

Axes: e experts, t tokens, k choices, r rows (sorted by expert, or a token's choices in order), p inner and q outer
dimension of a weight, d model dim, o dim of the outputs.

A weight `(p, q)` is first divided by the largest number of each output channel, its scale `(q,)`. Then it is packed as
torch packs embedding tables of 8 bits, in `(p, q + 8)` bytes. Each of its p rows has q counts of steps, 0 to 255, then
the size of a step and the smallest number, both in float32. The sum over rows of such a table, each times a number, is
the product of one row of tokens, and torch's operator reads the bytes as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.dispatch.decision import Decision
from mixture_of_experts.dispatch.moving import combine, dispatch
from mixture_of_experts.experts import RoutedExperts, StackedExperts, check_slots
from mixture_of_experts.ops.activations import hidden_layer
from mixture_of_experts.ops.grouped import grouped_product
from mixture_of_experts.ops.network import dtype_of_operands
from mixture_of_experts.ops.plain import bias_of_rows
from mixture_of_experts.support import private_torch
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import sum_of_packed_rows, unpacked_rows, wrapped_module
from mixture_of_experts.support.tracing import can_read, without_autocast
from mixture_of_experts.unstack import exchange

Model = TypeVar("Model", bound=nn.Module)

EXTRA = 8  # bytes of a packed row behind its steps
FEW_ROWS = 8  # of an expert; for more, a product with the unpacked weight is faster
LARGEST = 65280  # number that bfloat16 and float16 hold
MOST_TOKENS, MOST_ROWS = 4, 32  # that are computed without sorting them by expert


def quantize_experts(model: Model) -> Model:
    """Replace all stacked experts of a model by `QuantizedExperts`; change the model and return it.

    Their weights are rounded to 8 bits and cannot be trained. Gradients reach tokens, routers and all else, also LoRA
    on these weights, if PEFT and `mixture_of_experts.huggingface.fast_lora` prepared the model before.

    Args:
        model: a model with `MoE` layers anywhere in it, whose experts are frozen.

    Raises:
        ValueError: the model has no stacked experts, or is itself one; experts are trainable, on the meta device, not
            finite, or in a wrapper that computes with their weights, as PEFT's without `fast_lora`.
        TypeError: weights are no plain parameters, for example spread over processes; or a class of experts has a
            `forward` or `compute` of its own.

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
        if isinstance(wrapped_module(module), StackedExperts) and not getattr(module, "gives_parts", False):
            raise ValueError(
                f"{name} is a {type(module).__name__} around experts, which would compute without it: call fast_lora() "
                "of a model with adapters first, or merge them, or quantise before experts are wrapped"
            )
    return exchange(model, StackedExperts, quantized, "stacked experts (Experts, GatedExperts)")


def quantized(experts: StackedExperts, name: str) -> QuantizedExperts:
    """The experts in 8 bits, after a check that their weights are plain, frozen and in memory."""
    for key, weight in experts.named_parameters(recurse=False):
        if type(weight) is not nn.Parameter:
            raise TypeError(f"{name}.{key} is a {type(weight).__name__}: quantise before experts are spread")
        if weight.requires_grad:
            raise ValueError(f"{name}.{key} is trainable, 8 bits are not: call requires_grad_(False) of the experts")
        if weight.is_meta:
            raise ValueError(f"{name}.{key} is on the meta device, without numbers to round: load the weights first")
        if not weight.abs().amax() <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name}.{key} has numbers that are not finite, or too large for float32: mend them first")
    return QuantizedExperts(experts)


class QuantizedExperts(RoutedExperts):
    """Frozen experts with weights in 8 bits, which `quantize_experts` makes of `Experts` and `GatedExperts`.

    A number is divided by the scale of its output channel. It is then one of 256 that lie evenly between the smallest
    and the largest of its row, of those that one input channel of an expert is multiplied by. The experts that have
    tokens are unpacked one after the other, never the whole stack. On a CPU, few rows are multiplied with the bytes
    directly. On a GPU every product waits for the numbers of rows.

    Attributes:
        w1_packed, w3_packed, w2_packed: buffers `(*e, p, q + 8)` uint8, each row with its step and smallest number; w3
            only if gated.
        w1_scale, w3_scale, w2_scale: buffers `(*e, q)`, of numbers that every dtype of 16 bits holds without rounding.
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
    is_transposed: bool

    def __init__(self, experts: StackedExperts) -> None:
        super().__init__()
        self.dim, self.dim_out, self.hidden_dim = experts.dim, experts.dim_out, experts.hidden_dim
        self.num_experts, self.expert_dims = experts.num_experts, experts.expert_dims
        self.act, self.dropout, self.gated = experts.act, experts.dropout, experts.gated
        self.is_transposed = getattr(experts, "is_transposed", False)  # PEFT reads it
        for number in (1, 3, 2) if self.gated else (1, 2):
            for name, value in zip(("packed", "scale"), pack(getattr(experts, f"w{number}")), strict=True):
                self.register_buffer(f"w{number}_{name}", value)
            bias = getattr(experts, f"b{number}")
            self.register_buffer(f"b{number}", None if bias is None else bias.detach().clone())
        self.train(experts.training)

    def forward(self, x: Tensor, decision: Decision | None = None, *, ffn: Any = None) -> Tensor:
        """Map as `RoutedExperts` does; adapters may give `ffn`, whose `parts` are added to weights."""
        if not isinstance(decision, Decision):
            check_slots(self, x, decision)
            return super().forward(x)
        if ffn is None and self._has_few(x, decision):
            return self._row_by_row(x, decision)
        plan = decision.without_gaps()
        counts = plan.rows_per_expert
        assert counts is not None
        rows = dispatch(x, plan)
        return combine(self.compute(rows, counts, {} if ffn is None else ffn.parts), plan)

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor, parts: Any = None) -> Tensor:
        def linear(x: Tensor, name: str, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            with without_autocast(x.device):
                out = _ByPacked.apply(x, packed, scale, num_tokens_per_expert, False)
                if name in parts:
                    down, up, scaling = parts[name]
                    thin = grouped_product(x, down.to(x.dtype), num_tokens_per_expert) * scaling
                    out = out + grouped_product(thin, up.to(x.dtype), num_tokens_per_expert)
            return out if bias is None else out + bias_of_rows(bias.to(x.dtype), num_tokens_per_expert, x.shape[0])

        parts, dtype = parts or {}, dtype_of_operands(rows.device.type, rows.dtype)
        return self._feed_forward(rows.to(dtype), linear).to(rows.dtype)

    def _has_few(self, x: Tensor, decision: Decision) -> bool:
        """Whether a call has so few tokens that each of its rows is multiplied with the bytes."""
        inference = not (self.training or torch.is_grad_enabled() or decision.k is None)
        if not (inference and can_read(x) and is_direct()):  # a traced graph must not compare lengths
            return False
        # it computes in float32, where weights of an activation may have another dtype
        fits = x.dtype == torch.float32 or (x.dtype != torch.float64 and next(self.act.parameters(), None) is None)
        few = fits and 0 < x.shape[0] <= MOST_TOKENS and decision.expert.shape[0] <= MOST_ROWS
        return few and False not in decision.kept.tolist()

    def _row_by_row(self, x: Tensor, decision: Decision) -> Tensor:
        """Compute a call of few tokens, whose rows are their choices in order; return `(t, o)`. It adds in float32."""
        (t, d), k, expert = x.shape, decision.k, decision.expert
        assert k is not None

        into = places(expert, d)

        def linear(x: Tensor, name: str, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            out = few_by_packed(x, packed, into if name != "w_out" else places(expert, x.shape[1]))
            out.mul_(scale.index_select(0, expert))
            return out if bias is None else out.add_(bias.index_select(0, expert))

        with without_autocast(x.device):
            y = self._feed_forward(x.float().unsqueeze(1).expand(t, k, d).reshape(t * k, d), linear)
            return torch.bmm(decision.weight.to(y.dtype).view(t, 1, k), y.view(t, k, -1)).squeeze(1).to(x.dtype)

    def _feed_forward(self, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        """Outputs for x, by `linear(x, name, packed, scale, bias)`."""
        last = len(self.expert_dims) - 1

        def layer(x: Tensor, number: int, name: str) -> Tensor:
            tensors = (self._buffers[key] for key in (f"w{number}_packed", f"w{number}_scale", f"b{number}"))
            return linear(x, name, *(part.flatten(0, last) if part is not None and last else part for part in tensors))

        into = [layer(x, number, f"w_in.{i}") for i, number in enumerate((1, 3) if self.gated else (1,))]
        hidden = hidden_layer(self.act, into)
        hidden = F.dropout(hidden, self.dropout) if self.dropout and self.training else hidden
        return layer(hidden.to(into[0].dtype), 2, "w_out")  # in autocast an activation may return another dtype

    def like(self, name: str) -> Tensor:
        """A tensor of the shape `(*e, p, q)`, dtype and device of a weight, "w1", "w3" or "w2", without its numbers and
        without memory for them."""
        packed, scale = self.get_buffer(f"{name}_packed"), self.get_buffer(f"{name}_scale")
        return torch.full((), torch.nan, dtype=scale.dtype, device=scale.device).expand(
            *packed.shape[:-1], scale.shape[-1]
        )

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, hidden_dim={self.hidden_dim}"


@torch.no_grad()
def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(*e, p, q)` in bytes `(*e, p, q + 8)`, and the scale `(*e, q)` of each output channel."""
    dims, (p, q) = weight.shape[:-2], weight.shape[-2:]
    scale = weight.abs().amax(dim=-2).to(torch.bfloat16)  # or a later cast would round it
    scale = scale.clamp_(max=LARGEST).to(weight.dtype)
    packed = torch.empty(*dims, p, q + EXTRA, dtype=torch.uint8, device=weight.device)
    for out, matrix, by in zip(packed.flatten(0, -3), weight.flatten(0, -3), scale.flatten(0, -2), strict=True):
        wide = matrix.float() / torch.where(by == 0, 1, by).float()
        low, high = wide.aminmax(dim=-1, keepdim=True)
        step = (high - low) / 255
        out[:, :q] = ((wide - low) / torch.where(step == 0, 1, step)).round_().clamp_(0, 255)
        out[:, q:] = torch.cat([step, low], dim=-1).view(torch.uint8)
    return packed, scale


def unpack(packed: Tensor) -> Tensor:
    """The numbers `(..., p, q)` in float32 that are packed in `(..., p, q + 8)`."""
    extra = packed[..., -EXTRA:].clone(memory_format=torch.contiguous_format)  # with strides of its own, for a view
    step, low = extra.view(torch.float32).split(1, dim=-1)
    return packed[..., :-EXTRA].float().mul_(step).add_(low)


def product(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x `(r, p)` times one packed weight `(p, q + 8)` with its scale `(q,)`: `(r, q)`."""
    direct = x.is_cpu and x.dtype != torch.float64 and is_direct()
    if direct and x.shape[0] <= FEW_ROWS:
        rows = places(torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), x.shape[1])
        return few_by_packed(x.float(), packed.unsqueeze(0), rows).mul_(scale).to(x.dtype)
    weight, dtype, x = (unpacked_rows if direct else unpack)(packed), x.dtype, to_multiply(x)
    if x.dtype == torch.float16:  # whose range products without scale would leave
        return x @ weight.mul_(scale).to(x.dtype)
    return (x @ weight.to(x.dtype)).mul_(scale).to(dtype)


def product_back(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the rows of `product`, `(r, p)`, from x `(r, q)`, that of its results."""
    weight, dtype, x = unpack(packed), x.dtype, to_multiply(x)
    if x.dtype == torch.float16:
        return x @ weight.mul_(scale).to(x.dtype).mT
    return ((x * scale.to(x.dtype)) @ weight.to(x.dtype).mT).to(dtype)


def to_multiply(x: Tensor) -> Tensor:
    """x in a dtype in which its device has products."""
    return x.float() if x.is_cpu and not private_torch.multiplies(x.dtype) else x


def places(expert: Tensor, p: int) -> Tensor:
    """For rows of these experts `(r,)`, where the rows of their packed weights lie among those of all: `(r, p)`."""
    return torch.arange(p, device=expert.device).add(expert.unsqueeze(1), alpha=p)


def few_by_packed(x: Tensor, packed: Tensor, places: Tensor) -> Tensor:
    """x `(r, p)` float32, each row times the packed weight `(e, p, q + 8)` of its own expert, which `places` tell:
    `(r, q)`. If there are more threads than rows, a product is the sum of parts of it."""
    (r, p), threads = x.shape, torch.get_num_threads()
    parts = -(-threads // r) if threads > r else 1
    parts = parts if p % parts == 0 else 1
    start = torch.arange(0, r * p, p // parts, device=x.device)
    sums = sum_of_packed_rows(packed.flatten(0, 1), places.view(-1), start, x.contiguous().view(-1))
    return sums if parts == 1 else sums.view(r, parts, -1).sum(dim=1)


@torch.library.custom_op("mixture_of_experts::rows_by_packed", mutates_args=())
def rows_by_packed(x: Tensor, packed: Tensor, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
    """Rows `(r, p)` sorted by expert times the weights of their experts, packed `(e, p, q + 8)` and with a scale
    `(e, q)`: `(r, q)`. With `back` the gradient of those, from that of the products: rows `(r, q)` to `(r, p)`. 0 for
    rows past the last expert's."""
    out, start = x.new_zeros(x.shape[0], width(packed, back)), 0
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        if count:
            rows = x[start : start + count]
            out[start : start + count] = (product_back if back else product)(rows, packed[expert], scale[expert])
            start += count
    return out


def width(packed: Tensor, back: bool) -> int:
    """The width of the rows that `rows_by_packed` returns."""
    return packed.shape[1] if back else packed.shape[2] - EXTRA


@rows_by_packed.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape[0], width(packed, back))


class _ByPacked(torch.autograd.Function):
    """`rows_by_packed` with derivatives of any order, also in transforms of torch.func, which ask for such a class."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
        return rows_by_packed(x, packed, scale, num_tokens_per_expert, back)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *tensors, ctx.back = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ByPacked.apply(grad, *ctx.saved_tensors, not ctx.back), None, None, None, None


@cache
def is_direct() -> bool:
    """Whether torch has the operators for packed rows on a CPU, and they compute what `unpack` does. It is found out at
    the first question."""
    here: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    weight, x = torch.arange(-35, 35, **here).view(2, 5, 7) / 4, torch.arange(10, **here).view(2, 5) - 4.5
    expert = torch.tensor([1, 0], device="cpu")
    packed, _ = pack(weight)
    try:
        found, whole = few_by_packed(x, packed, places(expert, 5)), unpacked_rows(packed[1])
    except (AttributeError, RuntimeError):
        return False
    wanted = torch.stack([row @ unpack(packed)[e] for row, e in zip(x, (1, 0), strict=True)])
    return torch.allclose(found, wanted, rtol=1e-4) and torch.allclose(whole, unpack(packed[1]), rtol=1e-4, atol=1e-5)
