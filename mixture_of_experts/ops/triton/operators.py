"""Two torch operators that launch the kernels for a routed feed-forward network and its gradients.

Axes: t (tokens), k (choices), a (assignments), r (rows sorted by expert, without gaps), e (experts), d (model
dimension), h (hidden dimension), o (output dimension), p (input weights per expert, 2 for gated experts with separate
weights, otherwise 1).

In `torch.compile` graphs, each operator is a single call with known shapes rather than several launches. Tile positions
and the number of tiles are internal, so one graph supports any number of tokens. The tile height is a constant of the
compiled program, and depends on the mean number of rows per expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mixture_of_experts.kernels import ffn as kernels
from mixture_of_experts.kernels.launching import launch_kernel
from mixture_of_experts.ops.triton.network_spec import NetworkSpec
from mixture_of_experts.ops.triton.schedule import (
    TILES_PER_PROGRAM,
    BlockSizes,
    Schedule,
    WeightBlockSizes,
    find_entries,
    find_schedule,
    get_input_precision,
)
from mixture_of_experts.support.private_torch import is_fake_tensor

NO_ACTIVATION = NetworkSpec("plain", "identity")
# indices must fit in int32 and may run up to two blocks of 128 rows past the last row
MAX_KERNEL_ROWS = (1 << 31) - 256


class FFNOperands(NamedTuple):
    """The operands of both operators. Their torch schema is `OPERANDS_SCHEMA`.

    Attributes:
        x: `(t, d)`.
        weight: `(a,)` float32, weight of each assignment.
        token, assignment: `(r,)` int32, token and assignment of each row.
        row: `(a,)` int32, row of each assignment, or r if it has none.
        counts: `(e,)` int64, row count of each expert.
        num_choices: k, number of choices per token.
        w_in: weights `(e, d, h)`, or as described by `spec.layout`, with any strides and the same dtype as x.
        w_out: weight `(e, h, o)`, with any strides and the same dtype as x.
        b_in: one bias `(e, h)` for each weight in w_in, or an empty sequence.
        b_out: one bias `(e, o)`, or an empty sequence.
        spec: the network's layout and activation.
    """

    x: Tensor
    weight: Tensor
    token: Tensor
    assignment: Tensor
    row: Tensor
    counts: Tensor
    num_choices: int
    w_in: Sequence[Tensor]
    w_out: Tensor
    b_in: Sequence[Tensor]
    b_out: Sequence[Tensor]
    spec: NetworkSpec

    def flatten(self) -> list[Any]:
        """Flatten the operands into arguments of an operator, because operators do not accept tuples."""
        return [*self[:-1], *self.spec]

    def list_differentiable(self) -> list[Tensor]:
        """Return the tensors for which gradients can be computed."""
        return [self.x, self.weight, *self.w_in, self.w_out, *self.b_in, *self.b_out]

    def align_tensors(self) -> FFNOperands:
        """Return the operands with the alignment used in the self-check. Other alignments would run programs that the
        self-check does not cover."""
        w_in = [make_dense(weight) for weight in self.w_in]
        if len({weight.stride() for weight in w_in}) > 1:  # the kernels require both weights to have the same strides
            w_in = [weight.contiguous() for weight in w_in]
        b_in, b_out = ([align_tensor(bias) for bias in biases] for biases in (self.b_in, self.b_out))
        tables, weights = map(align_tensor, self[:6]), (w_in, make_dense(self.w_out), b_in, b_out)
        return FFNOperands._make([*tables, self.num_choices, *weights, self.spec])


def make_dense(weight: Tensor) -> Tensor:
    """Return the weight, or an aligned copy if neither its rows nor its columns are contiguous and aligned."""
    inner, outer = sorted(weight.stride()[1:])
    regular = inner == 1 and outer % 16 == weight.stride(0) % 16 == 0
    return align_tensor(weight, contiguous=not regular)


def align_tensor(tensor: Tensor, contiguous: bool = True) -> Tensor:
    """Return the tensor, made contiguous if requested, and copied if it does not start at a multiple of 16 bytes."""
    tensor = tensor.contiguous() if contiguous else tensor
    return tensor if is_fake_tensor(tensor) or tensor.data_ptr() % 16 == 0 else tensor.clone()


OPERANDS_SCHEMA = (
    "Tensor x, Tensor weight, Tensor token, Tensor assignment, Tensor row, Tensor counts, SymInt choices, "
    "Tensor[] w_in, Tensor w_out, Tensor[] b_in, Tensor[] b_out, str layout, str activation, float alpha, float limit"
)


def split_arguments(arguments: Sequence[Any], *others: Tensor) -> tuple[FFNOperands, Sequence[Any]]:
    """Split an operator's arguments into the operands and the rest, and check that all tensors are on the same
    device."""
    form = FFNOperands._fields.index("spec")
    end = form + len(NetworkSpec._fields)
    given = FFNOperands._make([*arguments[:form], NetworkSpec(*arguments[form:end])])
    check_same_device(*given.list_differentiable(), *given[2:6], *others)
    return given, arguments[end:]


class TileTable(NamedTuple):
    """The table of tiles. Each tile has up to `height` rows. See `find_tiles_kernel`."""

    table: Tensor
    expert_ends: Tensor
    height: int


@torch.library.custom_op(
    "mixture_of_experts::triton_ffn",
    mutates_args=(),
    schema=f"({OPERANDS_SCHEMA}, bool keep) -> (Tensor, Tensor)",
)
def triton_ffn(*arguments) -> tuple[Tensor, Tensor]:
    """Return the token outputs `(t, o)`, and the products with the input weights `(p, r, q)`, where q is the number of
    weight columns.

    If `keep` is False, the products have no rows.
    """
    given, (keep,) = split_arguments(arguments)
    out, pre = allocate_outputs(given, keep)
    given = given.align_tensors()
    rows, hidden_dim, out_dim = given.token.shape[0], *given.w_out.shape[1:]
    if rows == 0:
        return out.zero_(), pre
    schedule, tiles = make_tiles(given)
    hidden, y = given.x.new_empty(rows, hidden_dim), given.x.new_empty(rows, out_dim)
    kept = list(pre) if keep else []
    launch_grouped_matmul(schedule.up, tiles, given.x, given.w_in, given.b_in, hidden, given.spec, given.token, kept)
    launch_grouped_matmul(schedule.down, tiles, hidden, [given.w_out], given.b_out, y)
    launch_sum_rows(given, y, out)
    return out, pre


@triton_ffn.register_fake
def _(*arguments):
    given, (keep,) = split_arguments(arguments)
    return allocate_outputs(given, keep)


@torch.library.custom_op(
    "mixture_of_experts::triton_ffn_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor pre, {OPERANDS_SCHEMA}, bool need_x, bool need_in, bool need_out) -> Tensor[]",
)
def triton_ffn_backward(grad: Tensor, pre: Tensor, *arguments) -> list[Tensor]:
    """Return the gradients of x, weight, w_in, w_out, b_in and b_out. Gradients that are not needed are empty, except
    that the gradient of weight is always computed.

    Args:
        grad: `(t, o)`, gradient of the token outputs.
        pre: the products returned by `triton_ffn`.
        arguments: the operands of `triton_ffn`, followed by `need_x`, `need_in` and `need_out`.
    """
    given, (need_x, need_in, need_out) = split_arguments(arguments, grad, pre)
    grads = allocate_grads(given, need_x, need_in, need_out)
    given, grad = given.align_tensors(), align_tensor(grad)
    rows, token = given.token.shape[0], given.token
    if rows == 0:
        return [gradient.zero_() for gradient in grads.list_differentiable()]
    schedule, tiles = make_tiles(given)
    hidden = given.x.new_empty(rows, given.w_out.shape[1]) if need_out else None
    grad_pre = torch.empty_like(pre)
    partial = launch_hidden_grads(schedule.hidden_grads, tiles, given, grad, pre, hidden, grad_pre)
    if hidden is not None:
        launch_weight_grads(schedule.weight_grads, tiles, token, hidden, [grad], [grads.w_out], of_inputs=False)
        for bias in grads.b_out:
            launch_bias_grads(tiles, grad, bias, given)
    del hidden  # frees memory for `grad_rows`
    if need_in:
        launch_weight_grads(schedule.weight_grads, tiles, token, given.x, list(grad_pre), grads.w_in, of_inputs=True)
        for part, bias in zip(grad_pre, grads.b_in, strict=False):
            launch_bias_grads(tiles, part, bias)
    grad_rows = None
    if need_x:
        grad_rows = given.x.new_empty(rows, given.x.shape[1])
        launch_row_grads(schedule.row_grads, tiles, grad_pre, given.w_in, grad_rows)
    launch_sum_rows(given, grad_rows, grads.x, partial=partial, grad_weight=grads.weight)
    return grads.list_differentiable()


@triton_ffn_backward.register_fake
def _(grad, pre, *arguments):
    given, needs = split_arguments(arguments, grad, pre)
    return allocate_grads(given, *needs).list_differentiable()


@triton_ffn_backward.register_autograd
def _(ctx, *grads):
    raise RuntimeError("the Triton kernels do not support second derivatives; use ops.use('plain') to compute them")


def allocate_outputs(operands: FFNOperands, keep: bool) -> tuple[Tensor, Tensor]:
    """Allocate memory for the token outputs and for the products with the input weights."""
    rows = operands.token.shape[0] if keep else 0
    pre = operands.x.new_empty(len(operands.w_in), rows, operands.w_in[0].shape[-1])
    return operands.x.new_empty(operands.x.shape[0], operands.w_out.shape[-1]), pre


def allocate_grads(operands: FFNOperands, need_x: bool, need_in: bool, need_out: bool) -> FFNOperands:
    """Return the operands, with each differentiable tensor replaced by memory for its gradient.

    Gradients that are not needed are empty. The gradients of two input weights have the same strides, as the kernels
    require.
    """

    def like(tensor: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(tensor) if needed else tensor.new_empty(0)

    return operands._replace(
        x=operands.x.new_empty(operands.x.shape if need_x else 0),
        weight=operands.weight.new_empty(operands.weight.shape),
        w_in=[like(operands.w_in[0], need_in) for _ in operands.w_in],
        w_out=like(operands.w_out, need_out),
        b_in=[like(operands.b_in[0], need_in) for _ in operands.b_in],
        b_out=[like(bias, need_out) for bias in operands.b_out],
    )


def check_same_device(first: Tensor, *others: Tensor | None) -> None:
    """Check that all tensors are on the same device. Without this check, kernels would read invalid addresses, and fake
    tensors would not be checked at all."""
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"all tensors of a routed network must be on the same device, got {first.device} and {tensor.device}"
            )


def get_schedule(x: Tensor, mean_rows: int) -> Schedule:
    """Return the schedule entry for the given tokens and mean row count on their card."""
    return find_schedule(find_entries(x.device, x.dtype), mean_rows)


def make_tiles(operands: FFNOperands) -> tuple[Schedule, TileTable]:
    """Return the block sizes and tiles for a call."""
    rows = operands.token.shape[0]
    check_row_count(operands.row.shape[0])
    schedule = get_schedule(operands.x, rows // operands.w_out.shape[0])
    return schedule, launch_find_tiles(operands.counts, rows, schedule.rows)


def check_row_count(number: int) -> None:
    """Raise an error if int32 is too small to index all rows, including the unused rows of partially filled blocks."""
    if number > MAX_KERNEL_ROWS:
        raise ValueError(
            f"the kernels support at most {MAX_KERNEL_ROWS} rows, got {number}; pass fewer tokens per call"
        )


def launch_find_tiles(counts: Tensor, rows: int, height: int) -> TileTable:
    """Launch the kernel that writes the table of tiles. The table has the maximum possible size, because each expert
    may have a partially filled tile."""
    check_row_count(rows)
    experts = counts.shape[0]
    number = count_max_tiles(rows, experts, height)
    table, ends = (counts.new_empty(size, dtype=torch.int32) for size in ((number, 3), (experts,)))
    launch_kernel(
        kernels.find_tiles_kernel,
        (triton.cdiv(number, TILES_PER_PROGRAM),),
        counts=counts,
        tiles=table,
        ends=ends,
        num_tiles=number,
        num_experts=experts,
        ROWS=height,
        BLOCK=TILES_PER_PROGRAM,
        BLOCK_E=64,
    )
    return TileTable(table, ends, height)


def count_max_tiles(rows: int, experts: int, height: int) -> int:
    """Return the maximum number of tiles. Each expert with rows may have one partially filled tile."""
    experts = min(rows, experts)
    return experts + (rows - experts) // height


def launch_grouped_matmul(
    blocks: BlockSizes,
    tiles: TileTable,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    out: Tensor,
    spec: NetworkSpec = NO_ACTIVATION,
    token: Tensor | None = None,
    pre: Sequence[Tensor] = (),
) -> None:
    """Launch the *up* product, which gathers tokens, or the *down* product, which does not."""
    parts, biases, pre = map(spec.split_parts, (weights, biases, pre))
    launch_product(
        kernels.grouped_matmul_kernel,
        tiles,
        blocks,
        parts[0],
        "ecn",
        columns=out.shape[1],
        width=blocks.n if spec.layout == "plain" else blocks.n // 2,
        x=x,
        token=token,
        num_tokens=x.shape[0],
        **make_pair_arguments("weight", parts),
        **make_pair_arguments("bias", biases),
        **make_stride_arguments("bias", biases, "en"),
        **make_pair_arguments("pre", pre),
        pre_r=pre[0].stride(0) if pre else 0,
        out=out,
        **spec.kernel_constants(),
    )


def launch_hidden_grads(
    blocks: BlockSizes,
    tiles: TileTable,
    operands: FFNOperands,
    grad: Tensor,
    pre: Tensor,
    hidden: Tensor | None,
    grad_pre: Tensor,
) -> Tensor:
    """Write the gradients of the pre-activations, and return partial sums `(r, blocks)` of the row weights'
    gradients."""
    hidden_dim = operands.w_out.shape[1]
    partial = pre.new_empty(pre.shape[1], -(-hidden_dim // blocks.n), dtype=torch.float32)
    launch_product(
        kernels.hidden_grads,
        tiles,
        blocks,
        operands.w_out,
        "enc",
        columns=hidden_dim,
        width=blocks.n,
        grad=grad,
        token=operands.token,
        assignment=operands.assignment,
        row_weight=operands.weight,
        num_tokens=grad.shape[0],
        num_assignments=operands.row.shape[0],
        weight=operands.w_out,
        bias=next(iter(operands.b_out), None),
        **make_pair_arguments("pre", operands.spec.split_parts(pre)),
        pre_r=pre.stride(1),
        hidden=hidden,
        **make_pair_arguments("grad_pre", operands.spec.split_parts(grad_pre)),
        partial=partial,
        **operands.spec.kernel_constants(),
    )
    return partial


def launch_row_grads(
    blocks: BlockSizes, tiles: TileTable, grad_pre: Tensor, weights: Sequence[Tensor], out: Tensor
) -> None:
    """Launch the kernel that computes the gradients of token rows."""
    launch_product(
        kernels.row_grads,
        tiles,
        blocks,
        weights[0],
        "enc",
        columns=out.shape[1],
        width=blocks.n,
        **make_pair_arguments("grad_pre", grad_pre),
        **make_pair_arguments("weight", weights),
        out=out,
    )


def launch_product(
    kernel: Any,
    tiles: TileTable,
    blocks: BlockSizes,
    weight: Tensor,
    axes: str,
    /,
    *,
    columns: int,
    width: int,
    **arguments: Any,
) -> None:
    """Launch a kernel that multiplies rows by a weight. `axes` is the order of the weight's axes e, c (summed over) and
    n.

    Each program writes `width` of the `columns` columns in the result.
    """
    length = weight.shape[axes.index("c")]
    launch_kernel(
        kernel,
        (tiles.table.shape[0] * triton.cdiv(columns, width),),
        tiles=tiles.table,
        num_tiles=tiles.table.shape[0],
        C=length,
        N=columns,
        **make_stride_arguments("weight", [weight], axes),
        **arguments,
        PRECISION=get_input_precision(weight.dtype),
        EVEN=length % blocks.c == 0,
        BLOCK_M=tiles.height,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def launch_weight_grads(
    blocks: WeightBlockSizes,
    tiles: TileTable,
    token: Tensor,
    x: Tensor,
    y: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    of_inputs: bool,
) -> None:
    """Write `x^T y` for each expert's rows. The rows of x are gathered for input weights, and the rows of y are
    gathered for output weights."""
    experts, lines, columns = grads[0].shape
    launch_kernel(
        kernels.weight_grads,
        (len(grads) * experts * triton.cdiv(lines, blocks.m) * triton.cdiv(columns, blocks.n),),
        x=x,
        **make_pair_arguments("y", y),
        token=token,
        ends=tiles.expert_ends,
        **make_pair_arguments("out", grads),
        num_tokens=x.shape[0] if of_inputs else y[0].shape[0],
        M=lines,
        N=columns,
        **make_stride_arguments("out", grads, "emn"),
        GATHER_X=of_inputs,
        PRECISION=get_input_precision(x.dtype),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def launch_bias_grads(tiles: TileTable, y: Tensor, out: Tensor, operands: FFNOperands | None = None) -> None:
    """Launch the kernel that sums each expert's rows of y. If `operands` is given, rows are first gathered from y and
    weighted."""
    (experts, columns), block = out.shape, 64
    token, weight, assignment = (
        (None,) * 3 if operands is None else (operands.token, operands.weight, operands.assignment)
    )
    launch_kernel(
        kernels.bias_grads_kernel,
        (experts * triton.cdiv(columns, block),),
        y=y,
        token=token,
        row_weight=weight,
        assignment=assignment,
        ends=tiles.expert_ends,
        out=out,
        num_tokens=y.shape[0],
        num_assignments=0 if weight is None else weight.shape[0],
        N=columns,
        **make_stride_arguments("out", [out], "en"),
        BLOCK_N=block,
        BLOCK_C=32,
    )


def launch_sum_rows(
    operands: FFNOperands,
    rows: Tensor | None,
    out: Tensor,
    *,
    partial: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> None:
    """Launch the kernel that sums each token's rows. In the forward pass, rows are weighted. In the backward pass, the
    gradients of these weights are also computed."""
    dim = 1 if rows is None else rows.shape[1]
    block = min(1024, max(16, triton.next_power_of_2(dim)))
    launch_kernel(
        kernels.sum_rows_kernel,
        (operands.x.shape[0], triton.cdiv(dim, block)),
        rows=rows,
        row_of=operands.row,
        weight=operands.weight if partial is None else None,
        out=out,
        partial=partial,
        grad_weight=grad_weight,
        num_rows=operands.token.shape[0],
        D=dim,
        blocks=0 if partial is None else partial.shape[1],
        CHOICES=operands.num_choices,
        WIDTH=triton.next_power_of_2(operands.num_choices),
        BLOCK=block,
    )


def make_pair_arguments(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor | None]:
    """Return up to two tensors as keyword arguments `name` and `name_up`."""
    first, second, *_ = *tensors, None, None
    return {name: first, f"{name}_up": second}


def make_stride_arguments(name: str, tensors: Sequence[Tensor], axes: str) -> dict[str, int]:
    """Return the tensors' common strides as keyword arguments `name_axis`, or zeros if there are no tensors."""
    values = tensors[0].stride() if tensors else (0,) * len(axes)
    return {f"{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}
