"""Dispatch, experts and combine of a whole call in one autograd.Function, in torch's operators, for any GPU.

Axes: t tokens, k choices, r rows (expert by expert), e experts, s slots of an expert, d model dim, h hidden dim,
o dim of the outputs, p inner and q outer dimension of a weight.

For the backward only the products with `w_in` are kept (the input is there anyway); it gathers anew and computes the
activation anew. The gradient of an assignment's weight is read off the hidden layer, so that no row of outputs is kept
(as SonicMoE, arXiv 2512.14080). A token's rows are one gather and one sum, not a few operators for each choice.

How rows lie, and the products of them, are a class of `Products`: slots, blocks of equal size, or that of whoever calls
`run` with another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Decision, Plan, add_rows, sum_rows
from mixture_of_experts.ops import autograd, plain
from mixture_of_experts.ops import hidden as hidden_layer
from mixture_of_experts.ops.activations import why_unknown
from mixture_of_experts.ops.autograd import Gradients, Kept, Wanted
from mixture_of_experts.ops.call import Call, Network
from mixture_of_experts.tracing import in_transform, largest

SUMMED = 8  # columns of ones by which a bias' gradient is a product: grouped products want a multiple of it


class Products(Protocol):
    """Every expert's rows by its own weights. How rows lie is its own business: they are those of `arrange`'s plan."""

    @staticmethod
    def arrange(decision: Decision) -> tuple[Plan, Tensor | None]:
        """A plan, and the table of the experts' rows that the backward needs again."""
        ...

    def __init__(self, plan: Plan, table: Tensor | None, num_experts: int) -> None: ...

    def gather(self, x: Tensor) -> Tensor:
        """Tokens `(t, p)` to rows `(r, p)`."""
        ...

    def by_weights(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(r, p)` by `(e, p, q)`: `(r, q)`."""
        ...

    def total(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of such products, for `of_choices`: of no rows more, or of one of zeros more."""
        ...

    def by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """`x^T y` of `(r, p)` and `(r, q)`: `(e, p, q)`, zeros for experts without rows."""
        ...

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        """`rows` plus each one's expert's of `(e, q)`."""
        ...

    def of_choices(self, rows: Tensor) -> Tensor:
        """The row of each choice `(a, q)` of a `total`, zeros where it has none."""
        ...

    def pack(self, pre: Tensor) -> Tensor:
        """What is kept of rows for the backward: those that are somebody's."""
        ...

    def unpack(self, pre: Tensor) -> Tensor:
        """The rows again."""
        ...


class InSlots:
    """Every expert has as many rows, some of them zeros."""

    @staticmethod
    def arrange(decision: Decision) -> tuple[Plan, Tensor | None]:
        return decision.plan(), None

    def __init__(self, plan: Plan, table: Tensor | None, num_experts: int) -> None:
        self.plan, self.num_batches = plan, num_experts
        self.empty = (plan.token == plan.num_tokens).unsqueeze(-1)
        self.token = plan.token.clamp(max=largest(plan.num_tokens - 1, 0))

    def gather(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(self.plan.num_rows, x.shape[1])
        return x.index_select(0, self.token).masked_fill_(self.empty, 0)

    def by_weights(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(self.batches(x), self.of_batches(weight)).flatten(0, 1)

    def total(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        (x, weight), *others = pairs
        rows = x.new_empty(self.plan.num_rows + 1, weight.shape[-1])
        rows[-1:].zero_()
        out = self.batches(rows[:-1])
        torch.bmm(self.batches(x), self.of_batches(weight), out=out)
        for x, weight in others:
            out.baddbmm_(self.batches(x), self.of_batches(weight))
        return rows

    def by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(self.batches(x).mT, self.batches(y))

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        self.batches(rows).add_(self.of_batches(bias).unsqueeze(1))

    def of_choices(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.plan.row)

    def pack(self, pre: Tensor) -> Tensor:
        return pre

    unpack = pack

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

    def __init__(self, plan: Plan, table: Tensor | None, num_experts: int) -> None:
        assert table is not None
        super().__init__(plan, None, table.shape[0])
        self.expert, self.num_experts = table, num_experts

    def by_rows(self, x: Tensor, y: Tensor) -> Tensor:
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
    if torch.compiler.is_exporting():
        return "an exported graph has torch's own operators only"
    if in_transform():
        return "its gradient does not run under transforms of torch.func"
    return why_unknown(call.network.activation)


def run(call: Call, products: type[Products] = InBlocks) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`; `products` is for rows without gaps."""
    if not call.decision.prefers_rows():
        products = InSlots
    plan, table = products.arrange(call.decision)
    if plan.num_rows == 0:
        products = InSlots
    return autograd.run(Lean(products, table), call.x, plan, call.network)


class Lean:
    """Computes in torch's operators, with the products of one kind (`autograd.Way`)."""

    def __init__(self, products: type[Products], table: Tensor | None) -> None:
        self.products, self.table = products, table

    def forward(self, x: Tensor, plan: Plan, network: Network, keep: bool) -> tuple[Tensor, Kept]:
        products = self.products(plan, self.table, len(network.w_out))
        tokens = products.gather(x)
        pre = []
        for w, b in zip(network.w_in, network.b_in, strict=True):
            pre.append(products.by_weights(tokens, w))
            if b is not None:
                products.add_bias(pre[-1], b)
        parts = network.parts(pre)
        hidden = parts[0].new_empty(parts[0].shape)
        hidden_layer.forward(network.activation, parts, hidden)
        y = products.total([(hidden, network.w_out)])
        if network.b_out is not None:
            products.add_bias(y, network.b_out)
        kept = [self.table, *map(products.pack, pre)] if keep else []
        return collect(y, plan, products), kept

    def gradients(self, x: Tensor, plan: Plan, network: Network, kept: Kept, grad: Tensor, wanted: Wanted) -> Gradients:
        """Those of rows are for rows of weight 1: the weight is applied where they are summed."""
        table, *packed = kept
        products, of = self.products(plan, table, len(network.w_out)), wanted.network
        pre = [products.unpack(part) for part in packed]
        grad_rows = products.gather(grad)
        grad_hidden = products.by_weights(grad_rows, network.w_out.mT)
        hidden = torch.empty_like(grad_hidden)
        # the gradient of the gate is written over that of the hidden layer, if it is a tensor of its own
        others = [torch.empty_like(part) for part in (pre if network.halves else pre[1:])]
        grad_pre = others if network.halves else [grad_hidden, *others]
        parts, grad_parts = network.parts(pre), network.parts(grad_pre)
        hidden_layer.recompute(network.activation, parts, grad_hidden, grad_parts, hidden)
        grad_weight = None
        if wanted.weight:
            grad_weight = of_assignments(hidden, grad_hidden, grad_rows, network.b_out, plan, products)
        hidden_layer.backward(network.activation, parts, grad_hidden, grad_parts)

        scale = row_weight(plan)
        grad_rows.mul_(scale)
        grad_out = None if of.w_out is None else products.by_rows(hidden, grad_rows)
        grad_b_out = None if of.b_out is None else products.by_rows(summing(torch.ones_like(scale), x), grad_rows)[:, 0]
        del hidden, grad_rows
        grads_b_in = [
            None if b is None else products.by_rows(summing(scale, x), part)[:, 0]
            for b, part in zip(of.b_in, grad_pre, strict=True)
        ]
        grads_in = of_input_weights(of.w_in, products, x, scale, grad_pre)
        grad_x = None
        if wanted.x:
            rows = products.total([(part, w.mT) for part, w in zip(grad_pre, network.w_in, strict=True)])
            grad_x = collect(rows, plan, products)
        grads = network._replace(w_in=grads_in, w_out=grad_out, b_in=grads_b_in, b_out=grad_b_out)
        return grad_x, grad_weight, grads


def of_input_weights(
    weights: Sequence[Tensor | None], products: Products, x: Tensor, scale: Tensor, grad_pre: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the `weights` that are there. The tokens' rows are gone when it returns."""
    if all(w is None for w in weights):
        return [None] * len(weights)
    tokens = products.gather(x).mul_(scale)
    return [None if w is None else products.by_rows(tokens, part) for w, part in zip(weights, grad_pre, strict=True)]


def collect(rows: Tensor, plan: Plan, products: Products) -> Tensor:
    """Every token's weighted sum of the rows of a `total`, in float32 and cast once."""
    if plan.choices is None:
        return sum_rows(rows[: plan.num_rows], plan.row_weight(), plan.token, plan.row, None, plan.num_tokens)
    terms = products.of_choices(rows).mul_(plan.weight.unsqueeze(-1))
    return terms.view(plan.num_tokens, plan.choices, rows.shape[-1]).sum(dim=1)


def row_weight(plan: Plan) -> Tensor:
    """`(r, 1)` the weight of every row, 0 where it is empty."""
    weight = plan.weight.new_zeros(plan.num_rows + 1).scatter(0, plan.row, plan.weight)
    return weight[: plan.num_rows].unsqueeze(-1)  # those without a row all write to the last entry


def of_assignments(
    hidden: Tensor, grad_hidden: Tensor, grad_rows: Tensor, bias: Tensor | None, plan: Plan, products: Products
) -> Tensor:
    """Gradients of the assignments' weights: every row's output times the gradient of what its token got."""
    of_row = torch.zeros(
        plan.num_rows + 1, dtype=torch.promote_types(plan.weight.dtype, torch.float32), device=hidden.device
    )
    torch.sum(hidden * grad_hidden, dim=-1, dtype=of_row.dtype, out=of_row[:-1])
    if bias is not None:
        biases = torch.zeros_like(grad_rows)
        products.add_bias(biases, bias)
        of_row[:-1] += (grad_rows * biases).sum(dim=-1, dtype=of_row.dtype)
    return of_row.index_select(0, plan.row).to(plan.weight.dtype)


def summing(scale: Tensor, x: Tensor) -> Tensor:
    """`(r, SUMMED)` columns of row weights in the dtype of x."""
    return scale.to(x.dtype).expand(-1, SUMMED).contiguous()
