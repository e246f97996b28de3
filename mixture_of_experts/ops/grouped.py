"""Implements grouped matrix products, in which one operator multiplies all experts' rows by the experts' weights
without padding.

Axes: e (experts), r (rows, sorted by expert), p and q (inner and outer dimensions of a weight).

On CUDA, torch's own operator is used. On a CPU, this package defines its own operator, so that compiled graphs can loop
over row counts that are stored in a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.dispatch.permutation import Permutation, permute_without_gaps
from mixture_of_experts.ops import batched, plain
from mixture_of_experts.ops.matmul import matmul_into
from mixture_of_experts.ops.network import Call
from mixture_of_experts.ops.row_network import RowLayout
from mixture_of_experts.support.checks import check_devices, check_tensors
from mixture_of_experts.support.private_torch import (
    has_native_matmul,
    is_exporting,
    is_functorch_wrapped,
    register_flop_formula,
)
from mixture_of_experts.support.tracing import get_device_capability

AMD_ARCHITECTURES = ("gfx942", "gfx950")
# if False, torch loops over the experts on AMD GPUs
IS_AMD_GROUPED_GEMM_ENABLED = os.environ.get("ROCM_ALLOW_GROUP_GEMM_CK") == "1"


def unsupported_reason(call: Call) -> str | None:
    """Return the reason why no operator supports a weight or its low-rank part, or None if all weights are
    supported."""
    for tensor in call.network.tensors().values():
        if tensor.ndim == 3 and (reason := no_operator_reason(call.x, tensor)):
            return reason
    return None


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call."""
    if call.x.is_cuda and batched.unsupported_reason(call) is None:
        return batched.run(call, GroupedLayout)
    return plain.run_permuted(call.x, plain.choose_permutation(call.assignments), call.network, grouped_matmul)


class GroupedLayout(batched.SlotLayout):
    """Arranges rows without gaps, and uses torch's grouped product on CUDA. The permutation's table contains the end of
    each expert's rows.

    Rows after the last expert's rows may contain any values. Only the last of these rows is read. Assignments without a
    row read this last row and multiply it by 0. The last row is finite, because no expert fills it. If assignments
    without a row read a token's row instead, a non-finite token would affect other tokens, because 0 * inf is NaN.
    """

    ends: Tensor
    num_tokens_per_expert: Tensor
    token: Tensor

    @staticmethod
    def arrange(assignments: Assignments) -> Permutation:
        permutation = permute_without_gaps(assignments, spare=1)
        assert permutation.rows_per_expert is not None
        return permutation._replace(table=permutation.rows_per_expert.cumsum(0, dtype=torch.int32))

    def __init__(self, permutation: Permutation) -> None:
        assert permutation.table is not None
        assert permutation.rows_per_expert is not None
        RowLayout.__init__(self, permutation)
        self.ends, self.num_tokens_per_expert = permutation.table, permutation.rows_per_expert
        # Slots whose choice has weight 0 read the last token and multiply it by 0. If this token is not finite, the
        # gradient of the expert's weights is not finite either. Writing zeros instead would require a pass over all
        # rows.
        self.token = permutation.token.clamp(max=permutation.num_tokens - 1)

    def gather_rows(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token)

    def multiply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(x, weight, offs=self.ends)

    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the sum of the products. The permutation's spare row is set to 0, so that no row needs to be
        appended."""
        (x, weight), *others = pairs
        self.row_outputs: Any = self.multiply_rows(x, weight)
        for x, weight in others:
            self.row_outputs += self.multiply_rows(x, weight)
        self.row_outputs[-1:].zero_()
        return self.row_outputs

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        rows += plain.expand_bias(bias, self.num_tokens_per_expert, self.permutation.num_rows)

    def outer_products(self, x: Tensor, y: Tensor, out: object = None) -> Tensor:
        return grouped_outer_product_on_cuda(x, y, self.num_tokens_per_expert, self.ends)

    def gather_outputs(self) -> Tensor:
        return self.row_outputs.index_select(0, self.permutation.row.clamp(max=self.permutation.num_rows - 1))


def grouped_outer_product_on_cuda(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor, ends: Tensor) -> Tensor:
    """Return `x^T y` for each expert's rows, as `(e, p, q)`."""
    out = F.grouped_mm(x.mT, y.contiguous(), offs=ends)
    if torch.version.hip is None and get_device_capability(x.device)[0] == 9:
        return out
    # results for experts without rows are undefined on Blackwell (pytorch/pytorch#172439) and unknown on AMD
    return out.masked_fill_((num_tokens_per_expert == 0).view(-1, 1, 1), 0)


def no_kernel_reason(x: Tensor, weight: Tensor) -> str | None:
    """Return the reason why torch's grouped matmul falls back to a loop with a host sync, or None if it does not."""
    if torch.version.hip is not None:
        card = torch.cuda.get_device_properties(x.device).gcnArchName.partition(":")[0]
        if card not in AMD_ARCHITECTURES or not IS_AMD_GROUPED_GEMM_ENABLED:
            wanted = " or ".join(AMD_ARCHITECTURES)
            return (
                f"torch's grouped product is a single kernel only on {wanted} with ROCM_ALLOW_GROUP_GEMM_CK=1, not on "
                f"{card}"
            )
    elif (card := get_device_capability(x.device))[0] not in (9, 10):
        return "torch's grouped product is a single kernel only on compute capability 9 and 10, got {}.{}".format(*card)
    if x.dtype != torch.bfloat16 or any(size % 8 for size in weight.shape[-2:]):
        return "torch's grouped product requires bfloat16 and sizes that are multiples of 8"
    if weight.shape[0] >= 1024:
        return f"torch's grouped product supports fewer than 1024 experts, got {weight.shape[0]}"
    return None


def grouped_matmul(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor | None = None) -> Tensor:
    """Multiply each expert's rows by its weight, with a grouped operator if one is available.

    The arguments and the result are the same as in `plain.expert_product`.

    Raises:
        ValueError: the shapes do not match, or (on a CPU) a count is negative or the sum of the counts exceeds the
            number of rows.
    """
    check_operands(x, weight, num_tokens_per_expert)
    if num_tokens_per_expert is None or no_operator_reason(x, weight, num_tokens_per_expert) is not None:
        return plain.expert_product(x, weight, num_tokens_per_expert)
    return _GroupedMatmul.apply(x, weight, num_tokens_per_expert, False)


def check_operands(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor | None) -> None:
    """Check that the shapes of the operands match."""
    check_tensors(x=x, weight=weight)
    check_devices("the experts' weights", x, (weight,))
    counts, (e, p, _) = num_tokens_per_expert, weight.shape if weight.ndim == 3 else (0, 0, 0)
    rows = f"(e, s, {p}) with e={e}" if counts is None else f"(r, {p})"
    if not e or x.ndim != (3 if counts is None else 2) or x.shape[-1] != p or (counts is None and x.shape[0] != e):
        raise ValueError(
            f"x and weight must have shapes {rows} and (e, p, q), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if counts is not None and (counts.shape != (e,) or counts.dtype != torch.int64):
        raise ValueError(
            f"num_tokens_per_expert must be an int64 tensor of shape ({e},) with the number of rows of each expert, "
            f"got {counts.dtype} of shape {tuple(counts.shape)}"
        )


def read_counts(num_tokens_per_expert: Tensor, num_rows: int) -> list[int]:
    """Return the counts as a list of integers. Raise a ValueError if a count is negative or the sum of the counts
    exceeds the number of rows."""
    counts = num_tokens_per_expert.tolist()
    if min(counts) < 0 or sum(counts) > num_rows:
        raise ValueError(
            f"num_tokens_per_expert must be nonnegative and sum to at most {num_rows} (the rows of x), got {counts}"
        )
    return counts


def no_operator_reason(*operands: Tensor) -> str | None:
    x, weight, *_ = operands
    if any(is_functorch_wrapped(operand) for operand in operands):
        return "grouped operators do not support transforms of torch.func"
    if x.is_cuda:
        return no_kernel_reason(x, weight)
    if x.device.type != "cpu":
        return f"there is no grouped product on {x.device.type}"
    return "an exported graph may contain only torch's own operators" if is_exporting() else None


class _GroupedMatmul(torch.autograd.Function):
    """Multiplies each expert's rows by its weight, or computes `x^T y` for each expert's rows. Each of the two
    operations is part of the other's gradient."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor, is_outer: bool) -> Tensor:
        """Multiply x `(r, p)` by the weights y `(e, p, q)`. If `is_outer` is True, return `x^T y` of shape `(e, p, q)`
        for y `(r, q)` instead."""
        if not x.is_cuda:
            own = torch.ops.mixture_of_experts
            operator = own.rows_by_rows if is_outer else own.rows_by_weights
            register_flop_formula(operator, _count_grouped_flops)
            return operator(x, y, num_tokens_per_expert)
        ends = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        if is_outer:
            return grouped_outer_product_on_cuda(x, y, num_tokens_per_expert, ends)
        out = F.grouped_mm(x.contiguous(), y, offs=ends)
        past = (torch.arange(x.shape[0], device=x.device) >= ends[-1]).unsqueeze(-1)
        return out.masked_fill_(past, 0)  # the operator does not write these rows

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.is_outer = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, y, number = ctx.saved_tensors
        need_x, need_y, *_ = ctx.needs_input_grad
        left, right = (y, grad) if ctx.is_outer else (grad, y)
        grad_x = grouped_matmul(left, right.mT, number) if need_x else None
        if not need_y:
            return grad_x, None, None, None
        return (
            grad_x,
            grouped_matmul(x, grad, number) if ctx.is_outer else _grouped_outer_product(x, grad, number),
            None,
            None,
        )


def _grouped_outer_product(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    if not any(is_functorch_wrapped(operand) for operand in (x, y, num_tokens_per_expert)):
        return _GroupedMatmul.apply(x, y, num_tokens_per_expert, True)
    return plain.outer_product(x, y, num_tokens_per_expert)  # under a transform


@torch.library.custom_op("mixture_of_experts::rows_by_weights", mutates_args=(), device_types="cpu")
def rows_by_weights(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """Multiply rows by their experts' weights, one expert at a time."""
    counts = read_counts(num_tokens_per_expert, x.shape[0])
    return multiply_by_expert(x, weight, [(expert, count) for expert, count in enumerate(counts) if count])


@rows_by_weights.register_fake
def _(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-1])


@torch.library.custom_op("mixture_of_experts::rows_by_rows", mutates_args=(), device_types="cpu")
def rows_by_rows(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """Return the gradient of the weights, which is `x^T y` for each expert's rows."""
    out = x.new_empty(num_tokens_per_expert.shape[0], x.shape[-1], y.shape[-1])
    start = 0
    for expert, count in enumerate(read_counts(num_tokens_per_expert, x.shape[0])):
        if count:
            rows = slice(start, start + count)
            matmul_into(x[rows].mT, y[rows], out[expert])
            start += count
        else:
            out[expert] = 0
    return out


@rows_by_rows.register_fake
def _(x: Tensor, y: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    return x.new_empty(num_tokens_per_expert.shape[0], x.shape[-1], y.shape[-1])


def _count_grouped_flops(x: Tensor, y: Tensor, *_, **__) -> int:
    """Return the FLOP count 2 r p q for x `(r, p)` and either a weight `(..., p, q)` or rows `(r, q)`."""
    return 2 * x.shape[0] * x.shape[1] * y.shape[-1]


def multiply_by_expert(x: Tensor, weight: Tensor, expert_counts: list[tuple[int, int]]) -> Tensor:
    """Multiply rows x, which are sorted by expert, by their experts' weights. The result is 0 for rows after the last
    expert's rows.

    A product with a small number of rows runs on a single thread. Two consecutive experts with the same number of rows
    are therefore computed as one batched product on two threads. This is possible because a slice with a step can
    select any two weights in a stack.

    Args:
        x: `(r, p)`, rows sorted by expert.
        weight: `(e, p, q)`, the weights of all experts.
        expert_counts: (expert, number of rows) pairs for the experts that have rows, in ascending order.
    """
    has_one_expert = len(expert_counts) == 1 and expert_counts[0][1] == x.shape[0]
    # autocast would cast the operands of this operator, but not those of operators that write to `out`
    if has_one_expert and has_native_matmul(x.dtype) and not torch.is_autocast_enabled(x.device.type):
        return x @ weight[expert_counts[0][0]]
    out = x.new_empty(x.shape[0], weight.shape[-1])
    pairs = weight.is_contiguous() or weight.dtype in (torch.float32, torch.float64)  # otherwise torch copies the slice
    start = index = 0
    while index < len(expert_counts):
        expert, count = expert_counts[index]
        if pairs and index + 1 < len(expert_counts) and expert_counts[index + 1][1] == count:
            other, stop, shape = expert_counts[index + 1][0], start + 2 * count, (2, count, -1)
            matrices = weight[expert : other + 1 : other - expert]
            matmul_into(x[start:stop].view(shape), matrices, out[start:stop].view(shape))
            index += 2
        else:
            stop = start + count
            matmul_into(x[start:stop], weight[expert], out[start:stop])
            index += 1
        start = stop
    if start < x.shape[0]:
        out[start:] = 0
    return out
