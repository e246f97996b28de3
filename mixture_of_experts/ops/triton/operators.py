"""The routed feed-forward network and its gradients as two operators of torch, which launch the kernels.

Axes: t tokens, k choices, a assignments, r rows (sorted by expert, without gaps), e experts, d model dim, h hidden dim,
o output dim, p input weights of an expert (1, or 2 of gated experts).

Operators, so that `torch.compile` sees one call whose shapes it knows, and not the launches in it: how tiles lie, and
how many there are, is nobody else's business, and a new number of tokens compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mixture_of_experts.ops.triton import kernels
from mixture_of_experts.ops.triton.form import Form
from mixture_of_experts.ops.triton.schedule import Blocks, Schedule, find_schedule
from mixture_of_experts.tracing import capability

GROUP = 8  # tiles whose programs run together, so that they find the same weights in the cache
NO_ACTIVATION = Form("plain", "identity")


class Operands(NamedTuple):
    """What both operators are given; `OPERANDS` is the same as a schema of torch.

    Attributes:
        x: `(t, d)`.
        weight: `(a,)`, of each assignment.
        token, assignment: `(r,)` int32, of each row.
        row: `(a,)` int32, of each assignment; r where it has none.
        counts: `(e,)` int64, the rows of each expert.
        choices: k, the assignments of each token; 0 where they are no fixed number.
        w_in, w_out: `(e, d, h)` or as the form's layout says, and `(e, h, o)`, in any strides, of x's dtype.
        b_in, b_out: `(e, h)` likewise or none, and `(e, o)` or None.
    """

    x: Tensor
    weight: Tensor
    token: Tensor
    assignment: Tensor
    row: Tensor
    counts: Tensor
    choices: int
    w_in: Sequence[Tensor]
    w_out: Tensor
    b_in: Sequence[Tensor]
    b_out: Tensor | None

    def in_order(self) -> Operands:
        """The same, without strides what kernels read without."""
        return Operands._make([*(tensor.contiguous() for tensor in self[:6]), *self[6:]])


OPERANDS = (
    "Tensor x, Tensor weight, Tensor token, Tensor assignment, Tensor row, Tensor counts, SymInt choices, "
    "Tensor[] w_in, Tensor w_out, Tensor[] b_in, Tensor? b_out"
)
FORM = "str layout, str activation, float alpha, float limit"  # see `Form`


def split(arguments: Sequence[Any]) -> tuple[Operands, Form, Sequence[Any]]:
    """Operands, form, and what else an operator is given, from where its operands begin."""
    given, form = len(Operands._fields), len(Form._fields)
    return Operands(*arguments[:given]), Form(*arguments[given : given + form]), arguments[given + form :]


class Tiles(NamedTuple):
    """Where the rows lie, in tiles of up to `height`; see `kernels.find_tiles`."""

    expert: Tensor
    first: Tensor
    stop: Tensor
    ends: Tensor
    height: int

    @property
    def number(self) -> int:
        return self.expert.shape[0]


class Grads(NamedTuple):
    """Where gradients are written, of no elements where they are not needed; b_out is None where there is none."""

    x: Tensor
    weight: Tensor
    w_in: list[Tensor]
    w_out: Tensor
    b_in: list[Tensor]
    b_out: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All there are."""
        b_out = [] if self.b_out is None else [self.b_out]
        return [self.x, self.weight, *self.w_in, self.w_out, *self.b_in, *b_out]


def launch(kernel, grid: tuple[int, ...], **arguments: Any) -> None:
    """The one place where a kernel starts."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        kernel[grid](**arguments, enable_fp_fusion=True)


@torch.library.custom_op(
    "mixture_of_experts::triton_ffn",
    mutates_args=(),
    schema=f"({OPERANDS}, {FORM}, bool keep) -> (Tensor, Tensor)",
)
def triton_ffn(*arguments) -> tuple[Tensor, Tensor]:
    """Tokens' outputs `(t, o)`, and pre-activations `(p, r, h)` if `keep` (else of no rows)."""
    given, form, (keep,) = split(arguments)
    check_devices(given)
    given = given.in_order()
    out, pre = empty_outputs(given, form, keep)
    rows, hidden_dim, out_dim = given.token.shape[0], *given.w_out.shape[1:]
    if rows == 0:
        return out.zero_(), pre
    schedule, tiles = tile(given)
    hidden, y = given.x.new_empty(rows, hidden_dim), given.x.new_empty(rows, out_dim)
    w_in, b_in = form.parts(given.w_in), form.parts(given.b_in)
    kept = list(pre) if keep else []
    launch_rows_by_weights(schedule, tiles, given.x, w_in, b_in, hidden, token=given.token, pre=kept, form=form)
    launch_rows_by_weights(schedule, tiles, hidden, [given.w_out], some(given.b_out), y)
    launch_sum_rows(y, given, out, weighted=True)
    return out, pre


@triton_ffn.register_fake
def _(*arguments):
    given, form, (keep,) = split(arguments)
    check_devices(given)
    return empty_outputs(given, form, keep)


@torch.library.custom_op(
    "mixture_of_experts::triton_ffn_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor pre, {OPERANDS}, {FORM}, bool need_x, bool need_in, bool need_out) -> Tensor[]",
)
def triton_ffn_backward(grad: Tensor, pre: Tensor, *arguments) -> list[Tensor]:
    """Gradients of x, weight, w_in, w_out, b_in and b_out, of no elements where not needed; that of weight always is.

    Args:
        grad: `(t, o)` gradient of the tokens' outputs.
        pre: the pre-activations that `triton_ffn` kept.
        arguments: as it was given.
    """
    given, form, (need_x, need_in, need_out) = split(arguments)
    check_devices(given, grad, pre)
    given, grad = given.in_order(), grad.contiguous()
    grads = empty_grads(given, need_x, need_in, need_out)
    rows = given.token.shape[0]
    if rows == 0:
        return [gradient.zero_() for gradient in grads.tensors()]
    schedule, tiles = tile(given)
    hidden = given.x.new_empty(rows, pre.shape[-1]) if need_out else None
    grad_pre = torch.empty_like(pre)
    launch_hidden_grads(schedule, tiles, given, grad, pre, hidden, grad_pre, grads.weight, form)
    if hidden is not None:
        launch_weight_grads(schedule, tiles, given.token, hidden, [grad], [grads.w_out], of_inputs=False)
        if grads.b_out is not None:
            launch_bias_grads(tiles, grad, grads.b_out, given)
    del hidden  # its memory serves the rows of x
    if need_in:
        launch_weight_grads(
            schedule, tiles, given.token, given.x, list(grad_pre), form.views(grads.w_in), of_inputs=True
        )
        for part, bias in zip(grad_pre, form.views(grads.b_in), strict=False):
            launch_bias_grads(tiles, part, bias)
    if need_x:
        grad_rows = given.x.new_empty(rows, given.x.shape[1])
        launch_row_grads(schedule, tiles, grad_pre, form.parts(given.w_in), grad_rows)
        launch_sum_rows(grad_rows, given, grads.x, weighted=False)
    return grads.tensors()


@triton_ffn_backward.register_fake
def _(grad, pre, *arguments):
    given, _, needs = split(arguments)
    check_devices(given, grad, pre)
    return empty_grads(given, *needs).tensors()


@triton_ffn_backward.register_autograd
def _(ctx, *grads):
    raise RuntimeError("the Triton kernels have no second derivative: compute with ops.use('plain') to take one")


def empty_outputs(given: Operands, form: Form, keep: bool) -> tuple[Tensor, Tensor]:
    """Where outputs of tokens and pre-activations are written."""
    x, (_, hidden_dim, out_dim) = given.x, given.w_out.shape
    pre = x.new_empty(1 if form.layout == "plain" else 2, given.token.shape[0] if keep else 0, hidden_dim)
    return x.new_empty(x.shape[0], out_dim), pre


def empty_grads(given: Operands, need_x: bool, need_in: bool, need_out: bool) -> Grads:
    """Those of two input weights lie alike, as kernels write by one set of strides."""

    def like(tensor: Tensor, needed: bool, **options: Any) -> Tensor:
        return torch.empty_like(tensor, **options) if needed else tensor.new_empty(0)

    return Grads(
        like(given.x, need_x, memory_format=torch.contiguous_format),
        like(given.weight, True, memory_format=torch.contiguous_format),
        [like(given.w_in[0], need_in) for _ in given.w_in],
        like(given.w_out, need_out),
        [like(given.b_in[0], need_in) for _ in given.b_in],
        None if given.b_out is None else like(given.b_out, need_out),
    )


def check_devices(given: Operands, *others: Tensor) -> None:
    on_one_device(given.x, *given[1:6], *given.w_in, given.w_out, *given.b_in, *some(given.b_out), *others)


def on_one_device(first: Tensor, *others: Tensor) -> None:
    """Kernels would read any address, and fake tensors check this for torch's own operators only."""
    for tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(
                f"all tensors of a routed network must be on one device, got {first.device}, {tensor.device}"
            )


def some(tensor: Tensor | None) -> list[Tensor]:
    """It, or none."""
    return [] if tensor is None else [tensor]


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are taken: as torch's own switch says."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def schedule_for(x: Tensor, mean_rows: int) -> Schedule:
    """The table's entry for these operands on this card."""
    if x.device.type == "cpu":
        return find_schedule("interpreted", mean_rows, None)
    kind = "half" if x.element_size() == 2 else precision(x.dtype)
    return find_schedule(kind, mean_rows, capability(x.device))


def tile(given: Operands) -> tuple[Schedule, Tiles]:
    """Sizes of blocks for a call, and where its rows lie in tiles of this size."""
    rows = given.token.shape[0]
    check_number(given.row.shape[0])
    schedule = schedule_for(given.x, rows // given.w_out.shape[0])
    return schedule, find_tiles(given.counts, rows, schedule.rows)


def check_number(number: int) -> None:
    """Rows, and the choices of all tokens, have numbers of int32."""
    if number >= 1 << 31:
        raise ValueError(f"the kernels count fewer than 2^31 rows, not {number}: call them with fewer tokens at a time")


def find_tiles(counts: Tensor, rows: int, height: int) -> Tiles:
    """As many tiles as there can be: every expert may have one that is not full."""
    check_number(rows)
    experts = counts.shape[0]
    number = triton.cdiv(rows, height) + experts
    expert, first, stop = (counts.new_empty(number, dtype=torch.int32) for _ in range(3))
    tiles = Tiles(expert, first, stop, counts.new_empty(experts, dtype=torch.int32), height)
    launch(
        kernels.find_tiles,
        (triton.cdiv(number, 32),),
        counts=counts,
        tile_expert=tiles.expert,
        tile_first=tiles.first,
        tile_stop=tiles.stop,
        ends=tiles.ends,
        num_tiles=number,
        num_experts=experts,
        ROWS=height,
        BLOCK=32,
        BLOCK_E=64,
    )
    return tiles


def launch_rows_by_weights(
    schedule: Schedule,
    tiles: Tiles,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    out: Tensor,
    *,
    token: Tensor | None = None,
    pre: Sequence[Tensor] = (),
    form: Form = NO_ACTIVATION,
) -> None:
    """*up*, which gathers tokens, or *down*."""
    two = len(weights) == 2
    launch_product(
        kernels.rows_by_weights,
        tiles,
        narrowed(schedule.two if two else schedule.one, weights[0]),
        weights[0],
        "ecn",
        x=x,
        token=token,
        **pair("weight", weights),
        **pair("bias", biases),
        **strides("bias", biases, "en"),
        **pair("pre", pre),
        out=out,
        **activation_of(form),
        GATED=two,
        GATHER=token is not None,
    )


def launch_hidden_grads(
    schedule: Schedule,
    tiles: Tiles,
    given: Operands,
    grad: Tensor,
    pre: Tensor,
    hidden: Tensor | None,
    grad_pre: Tensor,
    grad_weight: Tensor,
    form: Form,
) -> None:
    """Gradients of the pre-activations, and those of the assignments' weights."""
    blocks = narrowed(schedule.hidden_grads, given.w_out)
    two, rows, hidden_dim = pre.shape[0] == 2, *pre.shape[1:]
    num_blocks = triton.cdiv(hidden_dim, blocks.n)
    partial = pre.new_empty(num_blocks, rows, dtype=torch.float32)
    launch_product(
        kernels.hidden_grads,
        tiles,
        blocks,
        given.w_out,
        "enc",
        grad=grad,
        token=given.token,
        assignment=given.assignment,
        row_weight=given.weight,
        weight=given.w_out,
        bias=None if given.b_out is None else given.b_out.contiguous(),
        **pair("pre", list(pre)),
        hidden=hidden,
        **pair("grad_pre", list(grad_pre)),
        partial=partial,
        num_rows=rows,
        **activation_of(form),
        GATED=two,
    )
    assignments = given.row.shape[0]
    launch(
        kernels.sum_partials,
        (triton.cdiv(assignments, 256),),
        partial=partial,
        row_of=given.row,
        out=grad_weight,
        num_rows=rows,
        num_assignments=assignments,
        blocks=num_blocks,
        BLOCK=256,
    )


def launch_row_grads(schedule: Schedule, tiles: Tiles, grad_pre: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """Gradients of rows of tokens."""
    launch_product(
        kernels.row_grads,
        tiles,
        narrowed(schedule.row_grads, weights[0]),
        weights[0],
        "enc",
        **pair("grad_pre", list(grad_pre)),
        **pair("weight", weights),
        out=out,
        GATED=len(weights) == 2,
    )


def launch_product(kernel, tiles: Tiles, blocks: Blocks, weight: Tensor, axes: str, /, **arguments: Any) -> None:
    """A kernel that multiplies rows by weights, whose axes are e, c (summed over) and n (columns of the result)."""
    sizes = dict(zip(axes, weight.shape, strict=True))
    launch(
        kernel,
        (tiles.number * triton.cdiv(sizes["n"], blocks.n),),
        **arguments,
        tile_expert=tiles.expert,
        tile_first=tiles.first,
        tile_stop=tiles.stop,
        num_tiles=tiles.number,
        C=sizes["c"],
        N=sizes["n"],
        **strides("weight", [weight], axes),
        PRECISION=precision(weight.dtype),
        EVEN=sizes["c"] % blocks.c == 0,
        BLOCK_M=tiles.height,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        GROUP=GROUP,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def launch_weight_grads(
    schedule: Schedule, tiles: Tiles, token: Tensor, x: Tensor, y: list[Tensor], grads: list[Tensor], *, of_inputs: bool
) -> None:
    """`x^T y` of every expert. Of input weights x is gathered, else y."""
    experts, lines, columns = grads[0].shape
    two = len(grads) == 2
    blocks = schedule.two_weight_grads if two else schedule.one_weight_grads
    launch(
        kernels.weight_grads,
        (experts * triton.cdiv(lines, blocks.m) * triton.cdiv(columns, blocks.n),),
        x=x,
        **pair("y", y),
        token=token,
        ends=tiles.ends,
        **pair("out", grads),
        M=lines,
        N=columns,
        **strides("out", grads, "emn"),
        GATED=two,
        GATHER_X=of_inputs,
        GATHER_Y=not of_inputs,
        PRECISION=precision(x.dtype),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        GROUP=GROUP,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def launch_bias_grads(tiles: Tiles, y: Tensor, out: Tensor, given: Operands | None = None) -> None:
    """Sums of every expert's rows: of y itself; or, `given` the operands, of what is gathered, by weight."""
    (experts, columns), block = out.shape, 64
    launch(
        kernels.bias_grads,
        (experts * triton.cdiv(columns, block),),
        y=y,
        token=None if given is None else given.token,
        row_weight=None if given is None else given.weight,
        assignment=None if given is None else given.assignment,
        ends=tiles.ends,
        out=out,
        N=columns,
        **strides("out", [out], "en"),
        BLOCK_N=block,
        BLOCK_C=32,
        num_warps=4,
    )


def launch_sum_rows(rows: Tensor, given: Operands, out: Tensor, *, weighted: bool) -> None:
    """Every token's rows, by weight or not. Without `choices` their places are found by a stable sort."""
    (num_tokens, dim), row, start = out.shape, given.row, None
    if given.choices == 0:
        ordered, row = given.token.sort(stable=True)
        start = torch.searchsorted(ordered, torch.arange(num_tokens + 1, dtype=ordered.dtype, device=ordered.device))
    block = min(1024, max(16, triton.next_power_of_2(dim)))
    launch(
        kernels.sum_rows,
        (num_tokens, triton.cdiv(dim, block)),
        rows=rows,
        row_of=row,
        start_of=start,
        weight=given.weight if weighted else None,
        assignment=given.assignment,
        out=out,
        num_rows=rows.shape[0],
        D=dim,
        CHOICES=given.choices,
        BLOCK=block,
    )


def pair(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Two tensors, one or none as the arguments `name` and `name_up`."""
    first, second, *_ = *tensors, None, None
    return {name: first, f"{name}_up": second}


def strides(name: str, tensors: Sequence[Tensor], axes: str) -> dict[str, int]:
    """Strides of the first tensor, and so of all, as the arguments `name_axis`; zeros where there is none."""
    values = tensors[0].stride() if tensors else (0,) * len(axes)
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def activation_of(form: Form) -> dict[str, Any]:
    return dict(ACTIVATION=form.activation, ALPHA=form.alpha, LIMIT=form.limit)


def narrowed(blocks: Blocks, weight: Tensor) -> Blocks:
    """Loads of every second column take more registers: smaller blocks, and as many threads as there may be."""
    adjacent = 1 in weight.stride()[1:]
    small = Blocks(32, max(blocks.c // 2, 16), 8, min(blocks.stages, 3))
    return blocks if adjacent else small
