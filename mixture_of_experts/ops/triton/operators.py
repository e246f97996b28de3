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


class Tiles(NamedTuple):
    """Where the rows lie; see `kernels.find_tiles`."""

    expert: Tensor
    first: Tensor
    stop: Tensor
    ends: Tensor

    @property
    def number(self) -> int:
        return self.expert.shape[0]


def launch(kernel, grid: tuple[int, ...], **arguments: Any) -> None:
    """The one place where a kernel starts."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else torch.device(device):
        kernel[grid](**arguments, enable_fp_fusion=True)


@torch.library.custom_op("mixture_of_experts::triton_ffn", mutates_args=())
def triton_ffn(
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    assignment: Tensor,
    row: Tensor,
    counts: Tensor,
    choices: int,
    w_in: Sequence[Tensor],
    w_out: Tensor,
    b_in: Sequence[Tensor],
    b_out: Tensor | None,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens' outputs `(t, o)`, and pre-activations `(p, r, h)` if `keep` (else of no rows).

    Args:
        x: `(t, d)`.
        weight: `(a,)` float32, of each assignment.
        token, assignment: `(r,)` int64, of each row.
        row: `(a,)` int64, of each assignment; r where it has none.
        counts: `(e,)` int64, the rows of each expert.
        choices: k, the assignments of each token; 0 where they are no fixed number.
        w_in, w_out: `(e, d, h)` or as `layout` says, and `(e, h, o)`, in any strides, of x's dtype.
        b_in, b_out: `(e, h)` likewise and `(e, o)`; none, or all.
        layout, activation, alpha, limit: see `Form`.
    """
    form = Form(layout, activation, alpha, limit)
    first, bias = form.parts(w_in), form.parts(b_in) if b_in else None
    tokens, rows = x.shape[0], token.shape[0]
    experts, hidden_dim, out_dim = w_out.shape
    pre = x.new_empty(len(first), rows if keep else 0, hidden_dim)
    if tokens == 0 or rows == 0:
        return x.new_zeros(tokens, out_dim), pre
    x, weight, token, assignment, row, counts = in_order(x, weight, token, assignment, row, counts)
    schedule = schedule_for(x, rows // experts)
    tiles = find_tiles(counts, rows, schedule.rows)
    hidden = x.new_empty(rows, hidden_dim)
    kept = list(pre) if keep else None
    launch_product(schedule, tiles, x, first, bias, hidden, token=token, pre=kept, form=form)
    y = x.new_empty(rows, out_dim)
    launch_product(schedule, tiles, hidden, [w_out], None if b_out is None else [b_out], y)
    return sum_rows(y, weight, token, assignment, row, choices, tokens), pre


@triton_ffn.register_fake
def _(x, weight, token, assignment, row, counts, choices, w_in, w_out, b_in, b_out, layout, _act, _alpha, _limit, keep):
    on_one_device(x, weight, token, assignment, row, counts, *w_in, w_out, *b_in, b_out)
    parts = 1 if layout == "plain" else 2
    pre = x.new_empty(parts, token.shape[0] if keep else 0, w_out.shape[1])
    return x.new_empty(x.shape[0], w_out.shape[2]), pre


@torch.library.custom_op("mixture_of_experts::triton_ffn_backward", mutates_args=())
def triton_ffn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    token: Tensor,
    assignment: Tensor,
    row: Tensor,
    counts: Tensor,
    choices: int,
    w_in: Sequence[Tensor],
    w_out: Tensor,
    b_in: Sequence[Tensor],
    b_out: Tensor | None,
    pre: Tensor,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    need_x: bool,
    need_in: bool,
    need_out: bool,
) -> list[Tensor]:
    """Gradients of x, weight, w_in, w_out, b_in and b_out, of no elements where not needed.

    Args:
        grad: `(t, o)` gradient of the tokens' outputs.
        the others: as `triton_ffn`, and the pre-activations that it kept.
    """
    form = Form(layout, activation, alpha, limit)
    (tokens, dim), rows = x.shape, token.shape[0]
    experts, hidden_dim, _ = w_out.shape
    grads = empty_grads(x, weight, w_in, w_out, b_in, b_out, need_x, need_in, need_out)
    grads_in, (grad_out, *rest) = grads[2 : 2 + len(w_in)], grads[2 + len(w_in) :]
    if tokens == 0 or rows == 0:
        return [gradient.zero_() for gradient in grads]
    x, weight, token, assignment, row, counts, grad = in_order(x, weight, token, assignment, row, counts, grad)
    schedule = schedule_for(x, rows // experts)
    tiles = find_tiles(counts, rows, schedule.rows)
    hidden = x.new_empty(rows, hidden_dim) if need_out else None
    grad_pre = torch.empty_like(pre)
    launch_hidden_grads(
        schedule, tiles, grad, token, assignment, row, weight, w_out, b_out, pre, hidden, grad_pre, grads[1], form
    )
    where = (token, tiles.ends)
    if need_out:
        assert hidden is not None
        of_bias = None if b_out is None else [grads[-1]]
        launch_weight_grads(schedule, where, hidden, [grad], [grad_out], of_bias, False, (weight, assignment))
    if need_in:
        of_bias = form.views(rest[: len(b_in)]) if b_in else None
        launch_weight_grads(schedule, where, x, list(grad_pre), form.views(grads_in), of_bias, True, None)
    if need_x:
        grad_rows = x.new_empty(rows, dim)
        launch_row_grads(schedule, tiles, grad_pre, form.parts(w_in), grad_rows)
        grads[0] = sum_rows(grad_rows, None, token, assignment, row, choices, tokens)
    return grads


@triton_ffn_backward.register_fake
def _(grad, x, weight, token, assignment, row, counts, choices, w_in, w_out, b_in, b_out, pre, *rest):
    on_one_device(grad, x, weight, token, assignment, row, counts, *w_in, w_out, *b_in, b_out, pre)
    need_x, need_in, need_out = rest[-3:]
    return empty_grads(x, weight, w_in, w_out, b_in, b_out, need_x, need_in, need_out)


def empty_grads(
    x: Tensor,
    weight: Tensor,
    w_in: Sequence[Tensor],
    w_out: Tensor,
    b_in: Sequence[Tensor],
    b_out: Tensor | None,
    need_x: bool,
    need_in: bool,
    need_out: bool,
) -> list[Tensor]:
    """Where gradients are written; those of two input weights lie alike, as kernels write by one set of strides."""
    like_in = [w_in[0]] * len(w_in) + [b_in[0]] * len(b_in) if b_in else [w_in[0]] * len(w_in)
    of_in = [torch.empty_like(tensor) if need_in else tensor.new_empty(0) for tensor in like_in]
    of_out = [
        torch.empty_like(tensor) if need_out else tensor.new_empty(0) for tensor in (w_out, b_out) if tensor is not None
    ]
    number = len(w_in)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        *of_in[:number],
        of_out[0],
        *of_in[number:],
        *of_out[1:],
    ]


@triton_ffn_backward.register_autograd
def _(ctx, *grads):
    raise RuntimeError("the Triton kernels have no second derivative: compute with ops.use('plain') to take one")


def on_one_device(x: Tensor, *others: Tensor | None) -> None:
    """Fake tensors check this for torch's own operators only."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(f"all tensors of a routed network must be on one device, got {x.device}, {other.device}")


def in_order(*tensors: Tensor) -> list[Tensor]:
    """What kernels read without strides."""
    return [tensor.contiguous() for tensor in tensors]


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


def find_tiles(counts: Tensor, rows: int, height: int) -> Tiles:
    """As many tiles as there can be: every expert may have one that is not full."""
    experts = counts.shape[0]
    number = triton.cdiv(rows, height) + experts
    tiles = Tiles(*(counts.new_empty(size, dtype=torch.int32) for size in (number, number, number, experts)))
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


def launch_product(
    schedule: Schedule,
    tiles: Tiles,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor] | None,
    out: Tensor,
    *,
    token: Tensor | None = None,
    pre: list[Tensor] | None = None,
    form: Form | None = None,
) -> None:
    """*up*, which gathers tokens, or *down*."""
    inner, columns = weights[0].shape[1:]
    two = len(weights) == 2
    blocks = narrowed(schedule.two if two else schedule.one, weights[0])
    launch(
        kernels.rows_by_weights,
        (tiles.number * triton.cdiv(columns, blocks.n),),
        x=x,
        token=token,
        weight=weights[0],
        weight_up=weights[1] if two else None,
        bias=biases[0] if biases else None,
        bias_up=biases[1] if biases and two else None,
        pre=pre[0] if pre else None,
        pre_up=pre[1] if pre and two else None,
        out=out,
        **table_of(tiles),
        C=inner,
        N=columns,
        **strides("weight", weights[0], "ecn"),
        **strides("bias", biases[0] if biases else None, "en"),
        ACTIVATION=form.activation if form else "identity",
        ALPHA=form.alpha if form else 0.0,
        LIMIT=form.limit if form else 0.0,
        GATED=two,
        GATHER=token is not None,
        **options(schedule, blocks, weights[0].dtype, inner),
    )


def launch_hidden_grads(
    schedule: Schedule,
    tiles: Tiles,
    grad: Tensor,
    token: Tensor,
    assignment: Tensor,
    row: Tensor,
    weight: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    pre: Tensor,
    hidden: Tensor | None,
    grad_pre: Tensor,
    grad_weight: Tensor,
    form: Form,
) -> None:
    """Gradients of the pre-activations, and those of the assignments' weights."""
    blocks = narrowed(schedule.hidden_grads, w_out)
    rows, hidden_dim, out_dim = token.shape[0], *w_out.shape[1:]
    num_blocks = triton.cdiv(hidden_dim, blocks.n)
    partial = pre.new_empty(num_blocks, rows, dtype=torch.float32)
    two = form.layout != "plain"
    launch(
        kernels.hidden_grads,
        (tiles.number * num_blocks,),
        grad=grad,
        token=token,
        assignment=assignment,
        row_weight=weight,
        weight=w_out,
        bias=None if b_out is None else b_out.contiguous(),
        pre=pre[0],
        pre_up=pre[1] if two else None,
        hidden=hidden,
        grad_pre=grad_pre[0],
        grad_pre_up=grad_pre[1] if two else None,
        partial=partial,
        **table_of(tiles),
        num_rows=rows,
        C=out_dim,
        N=hidden_dim,
        **strides("weight", w_out, "enc"),
        ACTIVATION=form.activation,
        ALPHA=form.alpha,
        LIMIT=form.limit,
        GATED=two,
        **options(schedule, blocks, w_out.dtype, out_dim),
    )
    assignments = row.shape[0]
    launch(
        kernels.sum_partials,
        (triton.cdiv(assignments, 256),),
        partial=partial,
        row_of=row,
        out=grad_weight,
        num_rows=rows,
        num_assignments=assignments,
        blocks=num_blocks,
        BLOCK=256,
    )


def launch_row_grads(schedule: Schedule, tiles: Tiles, grad_pre: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """Gradients of rows of tokens."""
    blocks = narrowed(schedule.row_grads, weights[0])
    columns, inner = weights[0].shape[1:]
    two = len(weights) == 2
    launch(
        kernels.row_grads,
        (tiles.number * triton.cdiv(columns, blocks.n),),
        grad_pre=grad_pre[0],
        grad_pre_up=grad_pre[1] if two else None,
        weight=weights[0],
        weight_up=weights[1] if two else None,
        out=out,
        **table_of(tiles),
        C=inner,
        N=columns,
        **strides("weight", weights[0], "enc"),
        GATED=two,
        **options(schedule, blocks, weights[0].dtype, inner),
    )


def launch_weight_grads(
    schedule: Schedule,
    where: tuple[Tensor, Tensor],
    x: Tensor,
    y: list[Tensor],
    grads: list[Tensor],
    biases: list[Tensor] | None,
    gather_x: bool,
    weighted: tuple[Tensor, Tensor] | None,
) -> None:
    """`x^T y` of every expert, either side gathered. `weighted`: weights by which rows of y count in biases."""
    experts, lines, columns = grads[0].shape
    two = len(grads) == 2
    blocks = schedule.two_weight_grads if two else schedule.one_weight_grads
    token, ends = where
    row_weight, assignment = weighted if weighted and biases else (None, None)
    launch(
        kernels.weight_grads,
        (experts * triton.cdiv(lines, blocks.m) * triton.cdiv(columns, blocks.n),),
        x=x,
        y=y[0],
        y_up=y[1] if two else None,
        token=token,
        ends=ends,
        out=grads[0],
        out_up=grads[1] if two else None,
        bias=biases[0] if biases else None,
        bias_up=biases[1] if biases and two else None,
        row_weight=row_weight,
        assignment=assignment,
        M=lines,
        N=columns,
        **strides("out", grads[0], "emn"),
        **strides("bias", biases[0] if biases else None, "en"),
        GATED=two,
        GATHER_X=gather_x,
        GATHER_Y=not gather_x,
        PRECISION=precision(x.dtype),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        GROUP=GROUP,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def sum_rows(
    rows: Tensor,
    weight: Tensor | None,
    token: Tensor,
    assignment: Tensor,
    row: Tensor,
    choices: int,
    num_tokens: int,
) -> Tensor:
    """`(t, d)` every token's rows, by weight. Without `choices` their places are found by a stable sort."""
    num_rows, dim = rows.shape
    out = rows.new_empty(num_tokens, dim)
    start = None
    if choices == 0:
        ordered, row = token.sort(stable=True)
        start = torch.searchsorted(ordered, torch.arange(num_tokens + 1, device=token.device))
    block = min(1024, max(16, triton.next_power_of_2(dim)))
    launch(
        kernels.sum_rows,
        (num_tokens, triton.cdiv(dim, block)),
        rows=rows,
        row_of=row,
        start_of=start,
        weight=weight,
        assignment=assignment,
        out=out,
        num_rows=num_rows,
        D=dim,
        CHOICES=choices,
        BLOCK=block,
    )
    return out


def table_of(tiles: Tiles) -> dict[str, Any]:
    table = dict(tile_expert=tiles.expert, tile_first=tiles.first, tile_stop=tiles.stop)
    return {**table, "num_tiles": tiles.number}


def strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """Strides of a tensor as the arguments `name_axis`."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def narrowed(blocks: Blocks, weight: Tensor) -> Blocks:
    """Loads of every second column take more registers: smaller blocks, and as many threads as there may be."""
    adjacent = 1 in weight.stride()[1:]
    small = Blocks(32, max(blocks.c // 2, 16), 8, min(blocks.stages, 3))
    return blocks if adjacent else small


def options(schedule: Schedule, blocks: Blocks, dtype: torch.dtype, inner: int) -> dict[str, Any]:
    """Sizes of a product's blocks."""
    return dict(
        PRECISION=precision(dtype),
        EVEN=inner % blocks.c == 0,
        BLOCK_M=schedule.rows,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        GROUP=GROUP,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
