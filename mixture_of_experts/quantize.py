"""Frozen experts in 8 or 4 bits a number: a half or two sevenths of bfloat16's bytes.

Axes: e experts, t tokens, k choices, r rows (sorted by expert, or a token's choices in order), p inner and q outer
dimension of a weight, d model dim, o dim of the outputs.

A weight `(p, q)` is first divided by the largest number of each output channel, its scale `(q,)`. How the rest is
stored, `ops/bits8.py` and `ops/bits4.py` say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.dispatch.decision import Decision
from mixture_of_experts.dispatch.moving import combine, dispatch
from mixture_of_experts.experts import RoutedExperts, StackedExperts, check_slots
from mixture_of_experts.ops import bits4, bits8
from mixture_of_experts.ops.activations import hidden_layer
from mixture_of_experts.ops.grouped import grouped_product
from mixture_of_experts.ops.network import dtype_of_operands
from mixture_of_experts.ops.plain import bias_of_rows
from mixture_of_experts.support import private_torch
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import wrapped_module
from mixture_of_experts.support.same_bits import refuse_same_bits
from mixture_of_experts.support.tracing import can_read, without_autocast
from mixture_of_experts.unstack import exchange, plain_weights

Model = TypeVar("Model", bound=nn.Module)
Chosen = tuple[Tensor, Tensor, Tensor]  # levels, step and zero of 4 bits
Rounding = Callable[[str, int, Tensor], Chosen | None]  # of a stack's name, an expert's index and weight

LARGEST = 65280  # number that bfloat16 and float16 hold
MOST_TOKENS, MOST_ROWS = 4, 32  # that are computed without sorting them by expert
UNPACKED = 1 << 21  # most numbers of a weight that are packed or unpacked at a time
AXES = {"packed": -2, "groups": -3}  # of a weight's inputs, in what is stored of it


def quantize_experts(
    model: Model,
    bits: Literal[8, 4] = 8,
    *,
    group: int = 64,
    fallback: Literal[8] | None = None,
    rounding: Rounding | None = None,
) -> Model:
    """Replace all stacked experts of a model by `QuantizedExperts`; change the model and return it.

    Their weights are rounded and cannot be trained. Gradients reach tokens, routers and all else, also LoRA on these
    weights, if PEFT and `mixture_of_experts.huggingface.fast_lora` prepared the model before.

    Args:
        model: a model with `MoE` layers anywhere in it, whose experts are frozen.
        bits: of a number. Each is rounded to the nearest of 256 or 16 levels; 4 bits err 12 times as much.
        group: with 4 bits, how many inputs of an output share a step and a zero point: 32, 64, 128 or 256, which must
            divide the sizes of the experts. Fewer err less, and take more memory: 32 take 5 bits a number, 64 4.5.
        fallback: bits of experts whose sizes `group` does not divide; None refuses them.
        rounding: with 4 bits, a function that chooses the numbers of each matrix: `levels, step, zero = rounding(name,
            expert, weight)`. It gets the name of the stack among the model's parameters, the index of the expert, and a
            copy of its weight in float32, the inputs in groups: `(n, group, outputs)`. A number becomes
            `(level - 8) * step + zero`. Levels `(n, group, outputs)` are whole, from 0 to 15; step and zero
            `(n, 1, outputs)` are stored in bfloat16. For a matrix for which it returns None, the nearest are taken.

    Raises:
        ValueError: the model has no stacked experts, or is itself one; experts are trainable, on the meta device, not
            finite, or in a wrapper that computes with their weights, as PEFT's without `fast_lora`; `group` does not
            divide their sizes; an argument is none of those above; or `rounding` returns other shapes or numbers.
        TypeError: weights are no plain parameters, for example spread over processes; a class of experts has a
            `forward` or `compute` of its own; or `rounding` returns neither three tensors nor None.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> moe, x = MoE(dim=16, num_experts=4, second_policy_eval="all").eval(), torch.randn(1, 10, 16)
        >>> before = moe(x)[0]
        >>> _ = moe.experts.requires_grad_(False)
        >>> quantize_experts(moe).experts
        QuantizedExperts(
          16, 4, hidden_dim=64, bits=8
          (act): GELU(approximate='none')
        )
        >>> bool((moe(x)[0] - before).norm() < 0.02 * before.norm())
        True
    """
    given = {"bits": (bits, (8, 4)), "group": (group, bits4.GROUPS), "fallback": (fallback, (8, None))}
    for argument, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if rounding is not None and not (bits == 4 and callable(rounding)):
        raise ValueError(f"rounding must be a function, with bits=4, got {rounding!r} with bits={bits}")
    for name, module in check_model("model", model).named_modules():
        if isinstance(wrapped_module(module), StackedExperts) and not getattr(module, "gives_parts", False):
            raise ValueError(
                f"{name} is a {type(module).__name__} around experts, which would compute without it: call fast_lora() "
                "of a model with adapters first, or merge them, or quantise before experts are wrapped"
            )
    make = partial(quantized, bits=bits, group=group, fallback=fallback, rounding=rounding)
    return exchange(model, StackedExperts, make, "stacked experts (Experts, GatedExperts)")


def quantized(
    experts: StackedExperts, name: str, bits: int, group: int, fallback: int | None, rounding: Rounding | None
) -> QuantizedExperts:
    """The experts in few bits, after a check that their weights are plain, frozen and in memory, and fit."""
    for key, weight in plain_weights(experts, name).items():
        if weight.requires_grad:
            raise ValueError(
                f"{name}.{key} is trainable, {bits} bits are not: call requires_grad_(False) of the experts"
            )
        if weight.is_meta:
            raise ValueError(f"{name}.{key} is on the meta device, without numbers to round: load the weights first")
        if not max(map(abs, weight.aminmax())) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name}.{key} has numbers that are not finite, or too large for float32: mend them first")
    uneven = [f"{key}={size}" for key in ("dim", "hidden_dim") if (size := getattr(experts, key)) % group]
    if bits == 4 and uneven and fallback is None:
        raise ValueError(
            f"{name} has {' and '.join(uneven)}, in 4 bits a multiple of group={group}: give a smaller group, one of "
            f"{', '.join(map(str, bits4.GROUPS))}, or fallback=8"
        )
    own = None if rounding is None or uneven else partial(chosen, rounding, name)
    return QuantizedExperts(experts, 8 if uneven else bits, group, rounding=own)


def chosen(rounding: Rounding, stack: str, key: str, expert: int, weight: Tensor) -> Chosen | None:
    """What a function of the user's returns for a matrix, after a check that it can be stored."""
    found, of = rounding(f"{stack}.{key}", expert, weight), f"rounding of {stack}.{key}, expert {expert},"
    if found is None:
        return None
    if not (isinstance(found, tuple) and [isinstance(part, Tensor) for part in found] == [True] * 3):
        raise TypeError(f"{of} must return levels, step and zero, or None for the nearest numbers, got {found!r}")
    n, group, q = weight.shape
    for name, part, size in zip(("levels", "step", "zero"), found, (group, 1, 1), strict=True):
        if part.shape != (n, size, q):
            raise ValueError(f"{of} must return {name} of shape {(n, size, q)}, got {tuple(part.shape)}")
        low, high = part.min().item(), part.max().item()
        if name == "levels" and not (0 <= low <= high <= 15 and part.equal(part.round())):
            raise ValueError(f"{of} must return whole levels from 0 to 15, got {low} to {high}: round and clamp them")
        if not part.bfloat16().isfinite().all():
            raise ValueError(f"{of} must return {name} finite in bfloat16, got {low} to {high}")
    return found


class QuantizedExperts(RoutedExperts):
    """Frozen experts with weights in 8 or 4 bits, which `quantize_experts` makes of `Experts` and `GatedExperts`.

    A number is divided by the scale of its output channel. In 8 bits it is then one of 256 that lie evenly between the
    smallest and the largest of its row, of those that one input channel of an expert is multiplied by. In 4 bits it is
    one of 16 that lie evenly among those of its group, neighbouring inputs of one output. The experts that have tokens
    are unpacked one after the other, in parts, never the whole stack. On a CPU, few rows are multiplied with the bytes
    directly; in 4 bits they are rounded to bfloat16 for that. On a GPU every product waits for the numbers of rows.

    Attributes:
        w1_packed, w3_packed, w2_packed: uint8 buffers; w3 only if gated. In 8 bits `(*e, p, q + 8)`, each row with its
            step and smallest number. In 4 bits `(*e, q / b, p, b / 2)`, two numbers a byte, in blocks of b outputs.
        w1_groups, w3_groups, w2_groups: in 4 bits, uint8 buffers `(*e, p / group, q, 4)`: the step and the zero point
            of each group, in bfloat16.
        w1_scale, w3_scale, w2_scale: buffers `(*e, q)`, of numbers that every dtype of 16 bits holds without rounding.
            They are 1 where `rounding` chose.
        b1, b3, b2: biases `(*e, q)` as buffers, or None.

    Args:
        experts: the experts whose settings and weights it takes.
        bits, group: as in `quantize_experts`.
        block: b; by default that of this machine's operator, which has to read the bytes as they are.
        rounding: as in `quantize_experts`; the name is "w1", "w3" or "w2".
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

    def __init__(
        self,
        experts: StackedExperts,
        bits: int = 8,
        group: int = 64,
        block: int | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__()
        for name in (*experts.sizes, "act", "dropout", "gated"):
            setattr(self, name, getattr(experts, name))
        self.is_transposed = getattr(experts, "is_transposed", False)  # PEFT reads it
        for number in (1, 3, 2) if self.gated else (1, 2):
            key = f"w{number}"
            choose = rounding and partial(rounding, key)
            for name, value in pack(getattr(experts, key), bits, group, block, choose).items():
                self.register_buffer(f"{key}_{name}", value)
            bias = getattr(experts, f"b{number}")
            self.register_buffer(f"b{number}", None if bias is None else bias.detach().clone())
        self.train(experts.training)

    @property
    def bits(self) -> int:
        return 4 if "w1_groups" in self._buffers else 8

    def settings(self) -> dict[str, int]:
        """The arguments that make such experts, beside experts."""
        if self.bits == 8:
            return {}
        packed, groups = self.get_buffer("w1_packed"), self.get_buffer("w1_groups")
        return {"bits": 4, "group": self.dim // groups.shape[-3], "block": 2 * packed.shape[-1]}

    def rearrange(self, block: int | None = None) -> None:
        """Put numbers of 4 bits in other blocks; by default in those of this machine's operator, if they are on a CPU:
        they may come from another machine."""
        for name, value in self._packed_in_4_bits():
            if block or value.is_cpu:
                self._buffers[name] = bits4.rearranged(value, block or bits4.block_of_cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, value in self._packed_in_4_bits():
            given = state_dict.get(prefix + name)
            if given is not None and given.ndim == value.ndim:
                state_dict[prefix + name] = bits4.rearranged(given, 2 * value.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _packed_in_4_bits(self) -> list[tuple[str, Tensor]]:
        return [part for part in self.named_buffers(recurse=False) if self.bits == 4 and part[0].endswith("_packed")]

    def forward(self, x: Tensor, decision: Decision | None = None, *, ffn: Any = None) -> Tensor:
        """Map as `RoutedExperts` does; adapters may give `ffn`, whose `parts` are added to weights."""
        refuse_same_bits(f"experts in {self.bits} bits compute rows by themselves")
        if not isinstance(decision, Decision):
            check_slots(self, x, decision)
            return super().forward(x)
        if ffn is None and self._has_few(x, decision):
            return self._row_by_row(x, decision)
        plan: Any = decision.without_gaps()
        return combine(self.compute(dispatch(x, plan), plan.rows_per_expert, () if ffn is None else ffn.parts), plan)

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor, parts: Any = ()) -> Tensor:
        def linear(x: Tensor, name: str, stored: list[Any], bias: Tensor | None) -> Tensor:
            with without_autocast(x.device):
                out = _ByPacked.apply(x, *stored, num_tokens_per_expert, False)
                if name in parts:
                    down, up = parts[name]
                    thin = grouped_product(x, down.to(x.dtype), num_tokens_per_expert)
                    out = out + grouped_product(thin, up.to(x.dtype), num_tokens_per_expert)
            return out if bias is None else out + bias_of_rows(bias.to(x.dtype), num_tokens_per_expert, x.shape[0])

        dtype = dtype_of_operands(rows.device.type, rows.dtype)
        return self._feed_forward(rows.to(dtype), linear).to(rows.dtype)

    def _has_few(self, x: Tensor, decision: Decision) -> bool:
        """Whether a call has so few tokens that each of its rows is multiplied with the bytes."""
        inference = not (self.training or torch.is_grad_enabled() or decision.k is None)
        form = bits8 if self.bits == 8 else bits4
        # a traced graph must not compare lengths
        if not (inference and can_read(x) and form.is_direct(self.get_buffer("w1_packed"))):
            return False
        # it computes in float32, where weights of an activation may have another dtype
        fits = x.dtype == torch.float32 or (x.dtype != torch.float64 and next(self.act.parameters(), None) is None)
        few = fits and 0 < x.shape[0] <= MOST_TOKENS and decision.expert.shape[0] <= MOST_ROWS
        return few and False not in decision.kept.tolist()

    def _row_by_row(self, x: Tensor, decision: Decision) -> Tensor:
        """Compute a call of few tokens, whose rows are their choices in order; return `(t, o)`. It adds in float32."""
        (t, d), k, expert = x.shape, decision.k, decision.expert
        assert k is not None

        def linear(x: Tensor, name: str, stored: list[Any], bias: Tensor | None) -> Tensor:
            packed, groups, scale = stored
            out = few(x, packed, groups, scale, expert)
            return out if bias is None else out.add_(bias.index_select(0, expert))

        with without_autocast(x.device):
            y = self._feed_forward(x.float().unsqueeze(1).expand(t, k, d).reshape(t * k, d), linear)
            return torch.bmm(decision.weight.to(y.dtype).view(t, 1, k), y.view(t, k, -1)).squeeze(1).to(x.dtype)

    def _feed_forward(self, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        """Outputs for x, by `linear(x, name, (packed, groups, scale), bias)`."""
        last = len(self.expert_dims) - 1

        def layer(x: Tensor, number: int, name: str) -> Tensor:
            keys = (*(f"w{number}_{part}" for part in ("packed", "groups", "scale")), f"b{number}")
            tensors = (self._buffers.get(key) for key in keys)
            *stored, bias = (part.flatten(0, last) if part is not None and last else part for part in tensors)
            return linear(x, name, stored, bias)

        into = [layer(x, number, f"w_in.{i}") for i, number in enumerate((1, 3) if self.gated else (1,))]
        hidden = hidden_layer(self.act, into)
        hidden = F.dropout(hidden, self.dropout) if self.dropout and self.training else hidden
        return layer(hidden.to(into[0].dtype), 2, "w_out")  # in autocast an activation may return another dtype

    def like(self, name: str) -> Tensor:
        """A tensor of the shape `(*e, p, q)`, dtype and device of a weight, "w1", "w3" or "w2", without its numbers and
        without memory for them."""
        packed, scale = self.get_buffer(f"{name}_packed"), self.get_buffer(f"{name}_scale")
        nothing = torch.full((), torch.nan, dtype=scale.dtype, device=scale.device)
        return nothing.expand(*self.expert_dims, packed.shape[-2], scale.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, hidden_dim={self.hidden_dim}, bits={self.bits}"


@torch.no_grad()
def pack(
    weight: Tensor,
    bits: int = 8,
    group: int = 64,
    block: int | None = None,
    choose: Callable[[int, Tensor], Chosen | None] | None = None,
) -> dict[str, Tensor]:
    """What is stored of weights `(*e, p, q)`: "packed", with 4 bits "groups", and the "scale" `(*e, q)` of outputs,
    which is 1 where `choose` gave the numbers of a matrix."""
    scale = torch.maximum(weight.amax(dim=-2), -weight.amin(dim=-2)).to(torch.bfloat16)  # or a cast would round it
    scale = scale.clamp_(max=LARGEST).to(weight.dtype)
    block = 0 if bits == 8 else block or bits4.block_of_cpu()

    def packed(i: int, matrix: Tensor, own: Tensor) -> dict[str, Tensor]:
        if given := choose and choose(i, matrix.to(torch.float32, copy=True).unflatten(0, (-1, group))):
            own.fill_(1)
            return bits4.stored(*given, block)
        numbers = (matrix[part].float() / torch.where(own == 0, 1, own.float()) for part in in_parts(*matrix.shape))
        parts = [bits8.pack(some) if bits == 8 else bits4.pack(some, group, block) for some in numbers]
        return {name: torch.cat([part[name] for part in parts], dim=AXES[name]) for name in parts[0]}

    every = list(zip(weight.flatten(0, -3), scale.flatten(0, -2), strict=True))
    # of weights without numbers one stands for all
    made = [packed(0, *every[0])] * len(every) if weight.is_meta else [packed(i, *each) for i, each in enumerate(every)]
    stacks = {name: torch.stack([each[name] for each in made]) for name in made[0]}
    return {**{name: stack.unflatten(0, weight.shape[:-2]) for name, stack in stacks.items()}, "scale": scale}


def in_parts(p: int, q: int) -> Iterator[slice]:
    """The inputs of a weight `(p, q)`, in parts that end where groups end."""
    most = max(bits4.GROUPS)
    size = most * max(1, UNPACKED // q // most)
    return (slice(start, min(start + size, p)) for start in range(0, p, size))


def unpack(packed: Tensor, groups: Tensor | None, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The numbers of one weight `(p, q)` without its scale, in float32, in parts: some inputs, and their numbers."""
    p, q = packed.shape[-2], scale.shape[-1]
    for inputs in in_parts(p, q):
        some = packed[..., inputs, :]
        if groups is None:
            yield inputs, bits8.unpack(some)
        else:
            group = p // groups.shape[0]
            yield inputs, bits4.unpack(some, groups[inputs.start // group : inputs.stop // group])[:, :q]


def product(x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor) -> Tensor:
    """x `(r, p)` times one packed weight with its scale `(q,)`: `(r, q)`."""
    form = bits8 if groups is None else bits4
    if x.dtype != torch.float64 and x.shape[0] <= form.FEW_ROWS and form.is_direct(packed):
        return few(x, packed, groups, scale).to(x.dtype)
    rows, dtype = to_multiply(x), torch.float64 if x.dtype == torch.float64 else torch.float32
    out, scaled = x.new_zeros(x.shape[0], scale.shape[0], dtype=dtype), rows.dtype == torch.float16
    for inputs, weight in unpack(packed, groups, scale):
        weight = weight.mul_(scale) if scaled else weight  # products without it would leave the range of float16
        out += rows[:, inputs] @ weight.to(rows.dtype)
    return (out if scaled else out.mul_(scale)).to(x.dtype)


def product_back(x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor) -> Tensor:
    """The gradient of the rows of `product`, `(r, p)`, from x `(r, q)`, that of its results."""
    rows, out = to_multiply(x), x.new_empty(x.shape[0], packed.shape[-2])
    scaled = rows.dtype == torch.float16
    rows = rows if scaled else rows * scale.to(rows.dtype)
    for inputs, weight in unpack(packed, groups, scale):
        weight = weight.mul_(scale) if scaled else weight
        out[:, inputs] = rows @ weight.to(rows.dtype).mT
    return out


def to_multiply(x: Tensor) -> Tensor:
    """x in a dtype in which its device has products."""
    return x.float() if x.is_cpu and not private_torch.multiplies(x.dtype) else x


def few(x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor, expert: Tensor | None = None) -> Tensor:
    """x `(r, p)` times one packed weight, or each row times that of its own expert among all, by torch's operator, in
    float32: `(r, q)`."""
    out = bits8.few(x, packed, expert) if groups is None else bits4.few(x, packed, groups, expert)
    return out[:, : scale.shape[-1]] * (scale if expert is None else scale.index_select(0, expert))


@torch.library.custom_op("mixture_of_experts::rows_by_packed", mutates_args=())
def rows_by_packed(
    x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor, num_tokens_per_expert: Tensor, back: bool
) -> Tensor:
    """Rows `(r, p)` sorted by expert times the packed weights of their experts, with a scale `(e, q)`: `(r, q)`. With
    `back` the gradient of those, from that of the products: rows `(r, q)` to `(r, p)`. 0 for rows past the last
    expert's."""
    out, start = x.new_zeros(x.shape[0], width(packed, scale, back)), 0
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        if count:
            own, rows = None if groups is None else groups[expert], slice(start, start := start + count)
            out[rows] = (product_back if back else product)(x[rows], packed[expert], own, scale[expert])
    return out


def width(packed: Tensor, scale: Tensor, back: bool) -> int:
    """The width of the rows that `rows_by_packed` returns."""
    return packed.shape[-2] if back else scale.shape[-1]


@rows_by_packed.register_fake
def _(x: Tensor, packed: Tensor, groups: Any, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape[0], width(packed, scale, back))


class _ByPacked(torch.autograd.Function):
    """`rows_by_packed` with derivatives of any order, also in transforms of torch.func, which ask for such a class."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, packed, groups, scale, num_tokens_per_expert, back) -> Tensor:
        return rows_by_packed(x, packed, groups, scale, num_tokens_per_expert, back)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *tensors, ctx.back = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _ByPacked.apply(grad, *ctx.saved_tensors, not ctx.back), None, None, None, None, None
