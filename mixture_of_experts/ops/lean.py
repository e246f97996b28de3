"""Dispatch, experts and combine of a whole call in one function of autograd, in torch's operators, for any GPU.

Axes: t tokens, k choices, r rows (expert by expert), e experts, s slots of an expert, d model dim, h hidden dim,
o dim of the outputs, p inner and q outer dimension of a weight.

A token's rows are one gather and one sum, not a few operators for each choice.

How rows lie, and the products of them, are a class: slots, blocks of equal size, or that of whoever calls `run` with
another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Decision, Plan, add_rows, sum_rows
from mixture_of_experts.ops import autograd, plain, rows
from mixture_of_experts.ops.activations import why_unknown
from mixture_of_experts.ops.autograd import Gradients, Kept, Wanted
from mixture_of_experts.ops.call import Call, Network
from mixture_of_experts.tracing import exporting, in_transform, largest

SUMMED = 8  # columns of ones by which a bias' gradient is a product: grouped products want a multiple of it


class InSlots:
    """`rows.Products` of rows as `arrange` lays them: here every expert has as many, some of them zeros."""

    @staticmethod
    def arrange(decision: Decision) -> tuple[Plan, Tensor | None]:
        """A plan, and a table of its rows that the backward needs again."""
        return decision.plan(), None

    def __init__(self, plan: Plan, table: Tensor | None) -> None:
        self.plan, self.num_batches = plan, math.prod(plan.num_experts)
        self.empty = (plan.token == plan.num_tokens).unsqueeze(-1)
        self.token = plan.token.clamp(max=largest(plan.num_tokens - 1, 0))

    def gather(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(self.plan.num_rows, x.shape[1])
        return x.index_select(0, self.token).masked_fill_(self.empty, 0)

    def by_weights(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.bmm(self.batches(x), self.of_batches(weight)).flatten(0, 1)

    def total(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Of one row of zeros more."""
        (x, weight), *others = pairs
        rows = x.new_empty(self.plan.num_rows + 1, weight.shape[-1])
        rows[-1:].zero_()
        out = self.batches(rows)
        torch.bmm(self.batches(x), self.of_batches(weight), out=out)
        for x, weight in others:
            out.baddbmm_(self.batches(x), self.of_batches(weight))
        return rows

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        self.batches(rows).add_(self.of_batches(bias).unsqueeze(1))

    def by_rows(self, x: Tensor, y: Tensor, out: object = None) -> Tensor:
        return torch.bmm(self.batches(x).mT, self.batches(y))

    def sums(self, scale: Tensor, rows: Tensor, out: object) -> Tensor:
        return self.by_rows(scale.to(rows.dtype).expand(-1, SUMMED).contiguous(), rows)[:, 0]

    def of_choices(self, rows: Tensor) -> Tensor:
        """The row of each choice `(a, q)` of a `total`, zeros where it has none."""
        return rows.index_select(0, self.plan.row)

    def pack(self, pre: Tensor) -> Tensor:
        """What is kept of rows for the backward."""
        return pre

    def unpack(self, pre: Tensor) -> Tensor:
        """The rows again."""
        return pre

    def batches(self, rows: Tensor) -> Tensor:
        return rows[: self.plan.num_rows].view(self.num_batches, -1, rows.shape[-1])

    def of_batches(self, weight: Tensor) -> Tensor:
        return weight


class InBlocks(InSlots):
    """Every expert has rows in blocks of equal size, each of which copies its weight: no host sync on any device.

    There are as many blocks as can be needed, whatever the numbers of rows are; a block has about as many rows as an
    expert has on average, so that there are at most about 2 e. Kept are pre-activations of choices, not of all rows.
    """

    @staticmethod
    def arrange(decision: Decision) -> tuple[Plan, Tensor | None]:
        whole = WholeBlocks()
        return decision.plan(ragged=True, widen=whole), whole.expert

    def __init__(self, plan: Plan, table: Tensor | None) -> None:
        assert table is not None
        super().__init__(plan, None)
        self.num_experts, self.num_batches, self.expert = self.num_batches, table.shape[0], table

    def by_rows(self, x: Tensor, y: Tensor, out: object = None) -> Tensor:
        products = super().by_rows(x, y)
        zeros = products.new_zeros(self.num_experts, *products.shape[1:])
        return add_rows(zeros, self.expert, products)

    def pack(self, pre: Tensor) -> Tensor:
        return pre.index_select(0, self.plan.row.clamp(max=self.plan.num_rows - 1))

    def unpack(self, pre: Tensor) -> Tensor:
        return pre.index_select(0, self.plan.assignment.clamp(max=pre.shape[0] - 1))

    def of_batches(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self.expert)


class WholeBlocks:
    """Gives every expert rows for as many blocks as it needs, and notes whose each block is."""

    expert: Tensor | None = None

    def __call__(self, counts: Tensor, num_rows: int) -> tuple[Tensor, int]:
        experts = counts.shape[0]
        size, number = plain.block_sizes(num_rows, experts)
        counts = (counts + (size - 1)) // size * size
        first = torch.arange(0, number * size, size, device=counts.device)
        self.expert = torch.searchsorted(counts.cumsum(0), first, right=True).clamp_(max=experts - 1)
        return counts, number * size


def why_not(call: Call) -> str | None:
    """Activations whose gradient is known, and no transform."""
    if exporting():
        return "an exported graph has torch's own operators only"
    if in_transform():
        return "its gradient does not run under transforms of torch.func"
    return why_unknown(call.network.activation)


def run(call: Call, products: type[InSlots] = InBlocks) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`; `products` is for rows without gaps."""
    if not call.decision.prefers_rows():
        products = InSlots
    plan, table = products.arrange(call.decision)
    if plan.num_rows == 0:
        products = InSlots
    return autograd.run(Lean(products, table), call.x, plan, call.network)


class Lean:
    """Computes in torch's operators, with the products of one kind (`autograd.Way`)."""

    def __init__(self, products: type[InSlots], table: Tensor | None) -> None:
        self.products, self.table = products, table

    def forward(self, x: Tensor, plan: Plan, network: Network, keep: bool) -> tuple[Tensor, Kept]:
        products = self.products(plan, self.table)
        pre, y = rows.forward(products, x, network, keep)
        return collect(y, plan, products), [self.table, *map(products.pack, pre)] if keep else []

    def gradients(self, x: Tensor, plan: Plan, network: Network, kept: Kept, grad: Tensor, wanted: Wanted) -> Gradients:
        table, *packed = kept
        products = self.products(plan, table)
        pre = [products.unpack(part) for part in packed]
        scale, grad_scale = rows.scales(plan)
        y, grads = rows.gradients(products, x, network, pre, grad, scale, grad_scale[:-1], wanted.network, wanted.x)
        grad_x = None if y is None else collect(y, plan, products)
        return grad_x, grad_scale.index_select(0, plan.row).to(plan.weight.dtype), grads


def collect(y: Tensor, plan: Plan, products: InSlots) -> Tensor:
    """Every token's weighted sum of the rows of a `total`, in float32 and cast once."""
    if plan.choices is None:
        return sum_rows(y[: plan.num_rows], plan.row_weight(), plan.token, plan.row, None, plan.num_tokens)
    terms = products.of_choices(y).mul_(plan.weight.unsqueeze(-1))
    return terms.view(plan.num_tokens, plan.choices, y.shape[-1]).sum(dim=1)
