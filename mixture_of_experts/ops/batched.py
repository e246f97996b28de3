"""Computes a whole call (dispatch, experts and combine) with torch's batched matrix products, on any GPU.

Axes: t (tokens), k (choices), r (rows, sorted by expert), e (experts), s (slots per expert), d (model dimension), h
(hidden dimension), o (output dimension), p and q (inner and outer dimensions of a weight).

All choices are handled by a single gather and a single sum. A layout class arranges the rows and implements their
products: `SlotLayout`, `BlockLayout`, or another class passed to `run`. The layout's `arrange` method permutes the
assignments, and may add a table for use in the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.dispatch.permutation import Permutation, permute_to_slots, permute_with_padding
from mixture_of_experts.dispatch.rows import add_rows
from mixture_of_experts.ops import few_tokens, plain, row_network
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.private_torch import is_exporting, is_in_transform
from mixture_of_experts.support.tracing import symbolic_max

BIAS_GRAD_COLUMNS = 8  # number of columns in bias-gradient products; grouped products require multiples of 8


class SlotLayout(row_network.RowLayout):
    """Arranges rows in slots. All experts have the same number of slots, and empty slots contain zeros."""

    num_batches: int
    empty: Tensor
    token: Tensor

    @staticmethod
    def arrange(assignments: Assignments) -> Permutation:
        return permute_to_slots(assignments)

    def __init__(self, permutation: Permutation) -> None:
        super().__init__(permutation)
        self.num_batches = math.prod(permutation.expert_dims)
        self.empty = (permutation.token == permutation.num_tokens).unsqueeze(-1)
        self.token = permutation.token.clamp(max=symbolic_max(permutation.num_tokens - 1, 0))

    def gather_rows(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(self.permutation.num_rows, x.shape[1])
        return x.index_select(0, self.token).masked_fill_(self.empty, 0)

    def multiply_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(self.view_batches(x), self.select_weights(weight)).flatten(0, 1)

    def multiply_and_sum(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        (x, weight), *others = pairs
        self.row_outputs: Any = x.new_empty(self.permutation.num_rows + 1, weight.shape[-1])
        self.row_outputs[-1:].zero_()
        out = self.view_batches(self.row_outputs)
        torch.bmm(self.view_batches(x), self.select_weights(weight), out=out)
        for x, weight in others:
            out.baddbmm_(self.view_batches(x), self.select_weights(weight))
        return self.row_outputs

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        self.view_batches(rows).add_(self.select_weights(bias).unsqueeze(1))

    def outer_products(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.bmm(self.view_batches(x).mT, self.view_batches(y))

    def sum_scaled_rows(self, scale: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
        return self.outer_products(scale.to(rows.dtype).expand(-1, BIAS_GRAD_COLUMNS).contiguous(), rows)[:, 0]

    def combine_rows(self) -> Tensor:
        permutation = self.permutation
        if permutation.k is None:
            return super().combine_rows()
        terms = self.gather_outputs().mul_(permutation.weight.unsqueeze(-1))
        return terms.view(permutation.num_tokens, permutation.k, terms.shape[-1]).sum(dim=1)

    def gather_outputs(self) -> Tensor:
        """Return the output of each assignment, `(a, o)`. The output of an assignment without a row is zero."""
        return self.row_outputs.index_select(0, self.permutation.row)

    def view_batches(self, rows: Tensor) -> Tensor:
        return rows[: self.permutation.num_rows].view(self.num_batches, -1, rows.shape[-1])

    def select_weights(self, weight: Tensor) -> Tensor:
        return weight


class BlockLayout(SlotLayout):
    """Arranges rows in blocks of equal size. Each block contains rows of one expert, and has its own copy of that
    expert's weight. The permutation's table contains the expert of each block.

    This layout needs no host sync, because it always uses the maximum number of blocks. A block has about as many rows
    as the average expert, so there are at most about 2 e blocks. Pre-activations are saved for assignments, but not for
    empty rows.
    """

    num_experts: int
    num_batches: int
    expert: Tensor

    @staticmethod
    def arrange(assignments: Assignments) -> Permutation:
        num_experts = math.prod(assignments.expert_dims)
        size, number = plain.choose_block_sizes(assignments.max_rows, num_experts)
        permutation = permute_with_padding(
            assignments, lambda needed: ((needed + (size - 1)) // size * size, number * size)
        )
        assert permutation.rows_per_expert is not None
        first = torch.arange(0, number * size, size, device=permutation.row.device)
        expert = torch.searchsorted(permutation.rows_per_expert.cumsum(0), first, right=True)
        return permutation._replace(table=expert.clamp_(max=num_experts - 1))

    def __init__(self, permutation: Permutation) -> None:
        super().__init__(permutation)
        assert permutation.table is not None
        self.num_experts = self.num_batches
        self.num_batches, self.expert = permutation.table.shape[0], permutation.table

    def outer_products(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        products = super().outer_products(x, y)
        zeros = products.new_zeros(self.num_experts, *products.shape[1:])
        return add_rows(zeros, self.expert, products)

    def pack(self, pre: Tensor) -> Tensor:
        """Return the pre-activations of all assignments, followed by a row of zeros that `unpack` reads for empty rows.

        If empty rows read the pre-activations of an arbitrary assignment instead, a non-finite token would affect the
        gradients of experts that do not compute it.
        """
        row = self.permutation.row.clamp(max=self.permutation.num_rows - 1)
        packed = pre.new_empty(row.shape[0] + 1, pre.shape[-1])
        torch.index_select(pre, 0, row, out=packed[:-1])
        packed[-1:].zero_()
        return packed

    def unpack(self, pre: Tensor) -> Tensor:
        return pre.index_select(0, self.permutation.assignment)

    def select_weights(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self.expert)


def unsupported_reason(call: Call) -> str | None:
    """Return the reason why this implementation does not support a call, or None if it does. Unknown activations,
    exports and transforms are not supported."""
    if is_exporting():
        return "an exported graph may contain only torch's own operators"
    if is_in_transform():
        return "its gradient does not support transforms of torch.func"
    return call.network.unsupported_activation_reason()


def run(call: Call, layout: type[SlotLayout] = BlockLayout) -> Tensor:
    """Compute the outputs `(t, o)` of a call. The argument `layout` is used only if the call prefers rows without
    gaps."""
    return few_tokens.run(call) if few_tokens.supports_call(call) else run_rows(call, layout)


def run_rows(
    call: Call, layout: type[SlotLayout] = BlockLayout, row_functions: row_network.RowFunctions = row_network
) -> Tensor:
    """Implement `run` for any number of tokens."""
    if not call.assignments.prefers_rows() or call.x.shape[0] == 0:
        layout = SlotLayout
    return row_network.run_layout(layout, row_functions, call.x, layout.arrange(call.assignments), call.network)
