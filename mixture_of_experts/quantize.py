"""Frozen experts quantized to 8 or 4 bits per weight. Compared with bfloat16 experts, they use 1/2 (8 bits) or 2/7 (4
bits) of the memory.

Axes: e (experts), t (tokens), k (choices), r (rows, sorted by expert, or the choices of each token in order), p and q
(inner and outer dimensions of a weight), d (model dimension), o (output dimension).

A weight `(p, q)` is first divided by its scale `(q,)`, the largest magnitude in each output channel. `ops/int8.py` and
`ops/int4.py` describe how the quotients are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.dispatch.permutation import permute_without_gaps
from mixture_of_experts.dispatch.rows import combine, dispatch
from mixture_of_experts.experts import RoutedExperts, StackedExperts, check_slot_inputs
from mixture_of_experts.ops import int4, int8, plain
from mixture_of_experts.ops.cpu import decode
from mixture_of_experts.ops.grouped import grouped_matmul
from mixture_of_experts.ops.network import Call, Network, get_operand_dtype
from mixture_of_experts.support import private_torch
from mixture_of_experts.support.batch_invariance import reject_batch_invariance
from mixture_of_experts.support.checks import ModelT
from mixture_of_experts.support.implementations import Implementation, run_first_supported
from mixture_of_experts.support.tracing import disable_autocast, is_host_readable
from mixture_of_experts.unstack import get_plain_weights, replace_modules

RoundedLevels = tuple[Tensor, Tensor, Tensor]  # levels, step and zero of a 4-bit weight
RoundingFunction = Callable[[str, int, Tensor], RoundedLevels | None]  # arguments: stack name, expert index, weight

MAX_SCALE = 65280  # representable in both bfloat16 and float16
MAX_UNPACKED_NUMEL = 1 << 21  # maximum number of weight elements unpacked at a time


def quantize_experts(
    model: ModelT,
    bits: Literal[8, 4] = 8,
    *,
    group: int = 64,
    rounding: RoundingFunction | None = None,
) -> ModelT:
    """Replace all stacked experts in a model with `QuantizedExperts` in place, and return the model.

    The quantized weights cannot be trained. Gradients still flow to tokens, routers and all other parameters, including
    LoRA adapters on these weights if `mixture_of_experts.huggingface.fast_lora` has prepared the model. The experts'
    forward and backward hooks are preserved.

    Args:
        model: a model that contains `MoE` layers with frozen experts.
        bits: number of bits per weight. Each weight is rounded to the nearest of 256 or 16 levels. The error with 4
            bits is 12x as large as with 8 bits.
        group: for 4 bits, the number of adjacent inputs per output that share a step and a zero point: 32, 64, 128 or
            256. The group size must divide the experts' `dim` and `hidden_dim`. Smaller groups are more accurate but
            need more memory. Groups of 32 use 5 bits per weight, and groups of 64 use 4.5 bits.
        rounding: for 4 bits, a function that chooses the levels of each matrix:
            `levels, step, zero = rounding(name, expert, weight)`. The function receives the name of the stacked
            parameter in the model, the expert's index, and a float32 copy of the weight with grouped inputs,
            `(n, group, outputs)`. Each weight becomes `(level - 8) * step + zero`. The levels `(n, group, outputs)`
            must be integers from 0 to 15. The step and zero point `(n, 1, outputs)` are stored in bfloat16 and must
            yield finite weights for all levels. If the function returns None, the matrix is rounded to the nearest
            levels.

    Raises:
        ValueError: if the model contains no stacked experts, or if the model itself is a module of stacked experts. A
            ValueError is also raised if experts are trainable or compiled, are on the meta device, have non-finite
            weights or state-dict hooks, or are inside a wrapper that uses their weights, such as an adapter without
            `fast_lora`. A ValueError is also raised if an argument is invalid, if `group` does not divide the experts'
            dimensions, or if `rounding` returns an invalid result.
        TypeError: if weights are not plain parameters (for example, because they are sharded across processes), or if
            experts have a custom `forward` or `compute` (defined in their class or assigned to the module).

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
    given = {"bits": (bits, (8, 4)), "group": (group, int4.GROUP_SIZES)}
    for argument, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if rounding is not None and not (bits == 4 and callable(rounding)):
        raise ValueError(f"`rounding` must be a function and requires bits=4, got {rounding!r} with bits={bits}")
    make = partial(quantize_stacked_experts, bits=bits, group=group, rounding=rounding)
    return replace_modules(model, StackedExperts, make, "stacked experts (Experts, GatedExperts)", allow_adapters=True)


def quantize_stacked_experts(
    experts: StackedExperts, name: str, bits: int, group: int, rounding: RoundingFunction | None
) -> QuantizedExperts:
    """Quantize experts after checking that their weights are plain, frozen and materialized, and have suitable
    dimensions."""
    for key, weight in get_plain_weights(experts, name).items():
        if weight.requires_grad:
            raise ValueError(
                f"{name}.{key} is trainable, but {bits}-bit weights cannot be trained; call requires_grad_(False) on "
                "the experts first"
            )
        if weight.is_meta:
            raise ValueError(f"{name}.{key} is on the meta device and has no values; load the weights first")
        if not max(map(abs, weight.aminmax())) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"{name}.{key} has values that are not finite or exceed the range of float32; repair the weights first"
            )
    uneven = [f"{key}={size}" for key in ("dim", "hidden_dim") if (size := getattr(experts, key)) % group]
    if bits == 4 and uneven:
        raise ValueError(
            f"4-bit quantization requires dimensions that are multiples of group={group}, but {name} has "
            f"{' and '.join(uneven)}. Pass a smaller group (one of {', '.join(map(str, int4.GROUP_SIZES))}), or "
            "quantize these experts separately with bits=8"
        )
    return QuantizedExperts(experts, bits, group, rounding=rounding and partial(call_rounding, rounding, name))


def call_rounding(
    rounding: RoundingFunction, stack: str, key: str, expert: int, weight: Tensor
) -> RoundedLevels | None:
    """Call the user's rounding function for a matrix, and check that its result can be stored."""
    found, of = rounding(f"{stack}.{key}", expert, weight), f"rounding, for {stack}.{key} of expert {expert},"
    if found is None:
        return None
    n, group, q = weight.shape
    shapes = [(n, group, q), (n, 1, q), (n, 1, q)]
    if not isinstance(found, tuple) or [getattr(part, "shape", None) for part in found] != shapes:
        raise ValueError(
            f"{of} must return levels, step and zero with shapes {shapes}, or None to round to the nearest level, got "
            f"{found!r:.99}"
        )
    levels, step, zero = found
    if not levels.equal(levels.round().clamp(0, 15)):
        found = f"{levels.min()} to {levels.max()}"
        raise ValueError(f"{of} must return integer levels from 0 to 15, got {found}; round and clamp them")
    for name, part in (("step", step), ("zero", zero)):
        if not part.bfloat16().isfinite().all():
            raise ValueError(
                f"{of} must return a {name} that is finite in bfloat16, got values from {part.min()} to {part.max()}"
            )
    step, zero = (part.bfloat16().float() for part in (step, zero))
    for level in (0, 15):  # products in `int4.unpack_matrix` may overflow; checking the extreme levels is sufficient
        if not (level * step + (zero - 8 * step)).isfinite().all():
            raise ValueError(
                f"{of} must return a step and a zero that yield finite weights for all levels from 0 to 15, got steps "
                f"from {step.min()} to {step.max()} and zeros from {zero.min()} to {zero.max()}; use smaller steps"
            )
    return found


class QuantizedExperts(RoutedExperts):
    """Frozen experts with 8-bit or 4-bit weights, created from `Experts` or `GatedExperts` by `quantize_experts`.

    Each weight is divided by the scale of its output channel. With 8 bits, the result is rounded to one of 256 levels
    that are evenly spaced between the smallest and the largest weight in its row. A row contains the weights of one
    input channel of an expert. With 4 bits, the result is rounded to one of 16 evenly spaced levels of its group, which
    contains adjacent inputs of one output. Only experts that have tokens are unpacked, one expert at a time and in
    parts. On a CPU, a small number of rows is multiplied directly by the packed bytes; with 4 bits, these rows are
    first rounded to bfloat16. On a GPU, every matrix product requires a sync to read the row counts.

    Attributes:
        w1_packed, w3_packed, w2_packed: uint8 buffers; `w3_packed` exists only if the experts are gated. The shape with
            8 bits is `(*e, p, q + 8)`, and each row also contains its step and smallest weight. The shape with 4 bits
            is `(*e, q / b, p, b / 2)`, with two weights per byte in blocks of b outputs.
        w1_groups, w3_groups, w2_groups: for 4 bits, uint8 buffers `(*e, p / group, q, 4)` that contain each group's
            step and zero point in bfloat16.
        w1_scale, w3_scale, w2_scale: buffers `(*e, q)` whose values are exactly representable in both bfloat16 and
            float16. The scale is 1 for matrices that `rounding` quantized.
        b1, b3, b2: biases `(*e, q)` as buffers, or None.

    Args:
        experts: the stacked experts to quantize.
        bits, group: see `quantize_experts`.
        block: block size b. Default: the block size of this machine's operator for packed matrix products.
        rounding: see `quantize_experts`, but here its first argument is "w1", "w3" or "w2".
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
        rounding: RoundingFunction | None = None,
    ) -> None:
        super().__init__()
        for name in (*experts.shape_attributes, "act", "dropout", "gated"):
            setattr(self, name, getattr(experts, name))
        self.is_transposed = getattr(experts, "is_transposed", False)  # adapters read this attribute
        for number in (1, 3, 2) if self.gated else (1, 2):
            key = f"w{number}"
            choose = rounding and partial(rounding, key)
            for name, value in pack_stack(getattr(experts, key), bits, group, block, choose).items():
                self.register_buffer(f"{key}_{name}", value)
            bias = getattr(experts, f"b{number}")
            self.register_buffer(f"b{number}", None if bias is None else bias.detach().clone())
        self.train(experts.training)

    @property
    def bits(self) -> int:
        return 4 if "w1_groups" in self._buffers else 8

    def settings(self) -> dict[str, int]:
        """Return the constructor arguments other than `experts`."""
        if self.bits == 8:
            return {}
        packed, groups = self.get_buffer("w1_packed"), self.get_buffer("w1_groups")
        return {"bits": 4, "group": self.dim // groups.shape[-3], "block": 2 * packed.shape[-1]}

    def repack(self, block: int | None = None) -> None:
        """Repack 4-bit weights for another block size.

        By default, weights on a CPU are repacked for this machine's operator, because another machine may have packed
        them.
        """
        for name, value in self.named_buffers(recurse=False):
            if self.bits == 4 and name.endswith("_packed") and (block or value.is_cpu):
                self._buffers[name] = int4.repack_nibbles(value, block or int4.find_cpu_block())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}w1_packed")
        if given is not None and given.ndim == len(self.expert_dims) + 3:  # with 4 bits
            self.repack(2 * given.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.repack()

    def variant_reason(self) -> str:
        return f"{self.bits}-bit experts implement their own computation of rows; use experts that are not quantized"

    def forward(self, x: Tensor, assignments: Assignments | None = None, *, ffn: Any = None) -> Tensor:
        """Apply the experts to tokens or slots; see `RoutedExperts`. Adapters can pass an `ffn` whose `factors` are
        added to the weights."""
        reject_batch_invariance(self.variant_reason())
        if not isinstance(assignments, Assignments):
            check_slot_inputs(self, x, assignments)
            return super().forward(x)
        call = Call(x, assignments, self._build_network(ffn and ffn.factors), self.training)
        return run_first_supported("experts", QUANTIZED_IMPLEMENTATIONS, call)

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return compute_sorted_rows(rows, self._build_network(), num_tokens_per_expert)

    def _build_network(self, parts: Any = None) -> Network:
        """Return the network. Each weight is a pair that contains the stored tensors (packed, groups, scale) and either
        an adapter's factors from `parts` or None."""
        last, dropout = len(self.expert_dims) - 1, self.dropout if self.training else 0.0

        def layer(number: int, name: str) -> Any:
            keys = (*(f"w{number}_{part}" for part in ("packed", "groups", "scale")), f"b{number}")
            tensors = (self._buffers.get(key) for key in keys)
            *stored, bias = (part.flatten(0, last) if part is not None and last else part for part in tensors)
            return (stored, parts and parts.get(name)), bias

        up, gate, (w_out, b_out) = layer(1, "w_in.0"), layer(3, "w_in.1"), layer(2, "w_out")
        w_in, b_in = zip(*(up, gate)[: 1 + self.gated], strict=True)
        return Network(w_in, w_out, self.act, b_in, b_out, dropout=dropout)

    def placeholder_weight(self, name: str) -> Tensor:
        """Return a placeholder with the shape `(*e, p, q)`, dtype and device of a weight ("w1", "w3" or "w2"), without
        allocating memory for its elements."""
        packed, scale = self.get_buffer(f"{name}_packed"), self.get_buffer(f"{name}_scale")
        nothing = torch.full((), torch.nan, dtype=scale.dtype, device=scale.device)
        return nothing.expand(*self.expert_dims, packed.shape[-2], scale.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, hidden_dim={self.hidden_dim}, bits={self.bits}"


def row_by_row_unsupported_reason(call: Call) -> str | None:
    """Return the reason why the rows of a call cannot be multiplied by the packed bytes one by one, or None if they can
    be multiplied this way."""
    network: Any = call.network
    (packed, groups, _), _ = network.w_in[0]
    if not call.is_inference():
        return "it supports only eval mode without gradients, and token choice"
    if any(factors for _, factors in (*network.w_in, network.w_out)):
        return "adapters are multiplied expert by expert"
    if not is_host_readable(call.x):  # a traced graph must not compare lengths
        return "it reads which choices are kept, which requires plain CPU tensors outside of graphs and transforms"
    if not (int8 if groups is None else int4).has_direct_matmul(packed):
        return "torch has no operator on this machine that multiplies with these bytes"
    has_weights = next(network.activation.parameters(), None) is not None
    if call.x.dtype == torch.float64 or (call.x.dtype != torch.float32 and has_weights):
        return f"it computes in float32, but tokens or weights of the activation are {call.x.dtype}"
    if call.assignments.expert.shape[0] > decode.MAX_DECODE_ROWS or not decode.has_few_kept_tokens(call):
        return (
            f"it supports 1 to {decode.MAX_ROW_SUM_TOKENS} tokens with at most {decode.MAX_DECODE_ROWS} choices in "
            "total, all of them kept"
        )
    return None


def run_row_by_row(call: Call) -> Tensor:
    """Process a small number of tokens in float32 without sorting rows by expert, and return the outputs `(t, o)`."""

    def multiply(x: Tensor, weight: Any) -> Tensor:
        return multiply_few_rows(x, *weight[0], expert=call.assignments.expert)

    with disable_autocast(call.x.device):
        return decode.compute_row_by_row(call._replace(x=call.x.float()), multiply, multiply).to(call.x.dtype)


def run_expert_by_expert(call: Call) -> Tensor:
    """Process all tokens of a call after sorting rows by expert, and return the outputs `(t, o)`."""
    permutation: Any = permute_without_gaps(call.assignments)
    rows = dispatch(call.x, permutation)
    return combine(compute_sorted_rows(rows, call.network, permutation.rows_per_expert), permutation)


def compute_sorted_rows(rows: Tensor, network: Network, num_tokens_per_expert: Tensor) -> Tensor:
    """Apply the experts to rows `(r, d)` sorted by expert, and return the outputs `(r, o)`. Unpack the weights of
    experts with many rows."""
    dtype = get_operand_dtype(rows.device.type, rows.dtype)
    network = network.map(lambda part: part.to(dtype) if isinstance(part, Tensor) else part)  # casts biases

    def product(x: Tensor, weight: Any, counts: Tensor | None) -> Tensor:
        x, (stored, factors) = x.to(dtype), weight  # under autocast, an activation may return another dtype
        with disable_autocast(x.device):
            out = _PackedMatmul.apply(x, *stored, counts, False)
            if factors is not None:
                down, up = (factor.to(dtype) for factor in factors)
                out = out + grouped_matmul(grouped_matmul(x, down, counts), up, counts)
            return out

    return plain.feed_forward(rows, network, num_tokens_per_expert, product).to(rows.dtype)


QUANTIZED_IMPLEMENTATIONS = {
    "row_by_row": Implementation(row_by_row_unsupported_reason, run_row_by_row),
    "expert_by_expert": Implementation(plain.unsupported_reason, run_expert_by_expert),
}


@torch.no_grad()
def pack_stack(
    weight: Tensor,
    bits: int = 8,
    group: int = 64,
    block: int | None = None,
    rounding: Callable[..., RoundedLevels | None] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors that represent weights `(*e, p, q)`: "packed", "groups" (4 bits only), and the output "scale"
    `(*e, q)`, which is 1 for matrices that `rounding` quantized."""
    if weight.ndim > 2:
        flat = weight.flatten(0, -3)
        # on the meta device, packing a single matrix is sufficient
        some = flat[:1] if weight.is_meta else flat
        made = [pack_stack(one, bits, group, block, rounding and partial(rounding, i)) for i, one in enumerate(some)]
        made *= len(flat) // len(some)
        return {name: torch.stack([each[name] for each in made]).unflatten(0, weight.shape[:-2]) for name in made[0]}
    # casting to bfloat16 makes later casts exact
    scale = torch.maximum(weight.amax(dim=0), -weight.amin(dim=0)).to(torch.bfloat16)
    scale = scale.clamp_(max=MAX_SCALE).to(weight.dtype)
    if given := rounding and rounding(weight.to(torch.float32, copy=True).unflatten(0, (-1, group))):
        return {**int4.pack_levels(*given, block or int4.find_cpu_block()), "scale": torch.ones_like(scale)}
    numbers = weight.float() / torch.where(scale == 0, 1, scale.float())
    packed = (
        int8.pack_matrix(numbers) if bits == 8 else int4.pack_matrix(numbers, group, block or int4.find_cpu_block())
    )
    return {**packed, "scale": scale}


def iter_unpacked(packed: Tensor, groups: Tensor | None, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Unpack one weight `(p, q)` to float32 without applying its scale, and yield it in parts that contain whole
    groups.

    Each part is a pair: a slice of the inputs and the unpacked values.
    """
    p, q, most = packed.shape[-2], scale.shape[-1], max(int4.GROUP_SIZES)
    size = most * max(1, MAX_UNPACKED_NUMEL // q // most)
    for start in range(0, p, size):
        inputs = slice(start, min(start + size, p))
        some = packed[..., inputs, :]
        if groups is None:
            yield inputs, int8.unpack_matrix(some)
        else:
            group = p // groups.shape[0]
            yield inputs, int4.unpack_matrix(some, groups[start // group : inputs.stop // group])[:, :q]


def multiply_packed(x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor, transposed: bool) -> Tensor:
    """Multiply `x` by a packed weight with scale `(q,)`, or by its transpose if `transposed` is True. `x` is `(r, p)`
    or, if transposed, `(r, q)`."""
    form = int8 if groups is None else int4
    if (
        not transposed
        and x.dtype != torch.float64
        and x.shape[0] <= form.MAX_DIRECT_ROWS
        and form.has_direct_matmul(packed)
    ):
        return multiply_few_rows(x, packed, groups, scale)
    wide = x.is_cpu and not private_torch.has_native_matmul(x.dtype)
    rows, dtype = x.float() if wide else x, torch.float64 if x.dtype == torch.float64 else torch.float32
    scaled = rows.dtype == torch.float16  # unscaled products would overflow
    rows = rows * scale.to(rows.dtype) if transposed and not scaled else rows
    out = rows.new_zeros(x.shape[0], output_width(packed, scale, transposed), dtype=dtype)
    for inputs, weight in iter_unpacked(packed, groups, scale):
        weight = (weight.mul_(scale) if scaled else weight).to(rows.dtype)
        if transposed:
            out[:, inputs] = rows @ weight.mT
        else:
            out += rows[:, inputs] @ weight
    return out if transposed or scaled else out.mul_(scale)


def multiply_few_rows(
    x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor, expert: Tensor | None = None
) -> Tensor:
    """Multiply `x` `(r, p)` by a packed weight using torch's operator, and return the float32 product `(r, q)`. If
    `expert` is passed, multiply each row by its own expert's weight from a stack."""
    out = int8.multiply_rows(x, packed, expert) if groups is None else int4.multiply_rows(x, packed, groups, expert)
    out = out if out.shape[-1] == scale.shape[-1] else out[:, : scale.shape[-1]]
    return out * (scale if expert is None else scale.index_select(0, expert))


@torch.library.custom_op("mixture_of_experts::rows_by_packed", mutates_args=())
def rows_by_packed(
    x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor, num_tokens_per_expert: Tensor, transposed: bool
) -> Tensor:
    """Multiply rows `(r, p)`, sorted by expert, by their experts' packed weights, which have the scale `(e, q)`.

    The result is `(r, q)`, with zeros after the last expert's rows. If `transposed` is True, map the gradient of these
    products `(r, q)` to the gradient of the rows `(r, p)`.
    """
    out, start = x.new_zeros(x.shape[0], output_width(packed, scale, transposed)), 0
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        if count:
            own, rows = None if groups is None else groups[expert], slice(start, start := start + count)
            out[rows] = multiply_packed(x[rows], packed[expert], own, scale[expert], transposed)
    return out


def output_width(packed: Tensor, scale: Tensor, transposed: bool) -> int:
    """Return the width of the output rows of `rows_by_packed`."""
    return packed.shape[-2] if transposed else scale.shape[-1]


@rows_by_packed.register_fake
def _(x: Tensor, packed: Tensor, groups: Any, scale: Tensor, num_tokens_per_expert: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape[0], output_width(packed, scale, back))


class _PackedMatmul(torch.autograd.Function):
    """Makes `rows_by_packed` differentiable to any order. `torch.func` transforms require an autograd function."""

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
        return _PackedMatmul.apply(grad, *ctx.saved_tensors, not ctx.back), None, None, None, None, None
