"""Dispatch, experts and combine of a whole call in one autograd.Function, in torch's operators, for any GPU.

Axes: t tokens, k choices, r rows (expert by expert), e experts, s slots of an expert, d model dim, h hidden dim,
o dim of the outputs, p inner and q outer dimension of a weight.

For the backward only the products with `w_in` are kept (the input is there anyway); it gathers anew and computes the
activation anew. The gradient of an assignment's weight is read off the hidden layer, so that no row of outputs is kept
(as SonicMoE, arXiv 2512.14080). A token's rows are one gather and one sum, not a few operators for each choice.

Rows are multiplied in slots by `torch.bmm`; without gaps in blocks (`plain.py`), or by whoever calls `run` with another
way. Rows past the last expert's may hold anything, and nobody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Plan, add_rows, read_rows, sum_rows
from mixture_of_experts.ops import hidden as hidden_layer
from mixture_of_experts.ops import plain
from mixture_of_experts.ops.activations import why_unknown
from mixture_of_experts.ops.call import Call, Network
from mixture_of_experts.tracing import in_transform, is_wrapped, without_autocast

SUMMED = 8  # columns of ones by which a bias' gradient is a product: grouped products want a multiple of it


class Products(Protocol):
    """Every expert's rows by its own weights."""

    def by_weights(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(r, p)` by `(e, p, q)`: `(r, q)`."""
        ...

    def by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """`x^T y` of `(r, p)` and `(r, q)`: `(e, p, q)`, zeros for experts without rows."""
        ...


Multiply = Callable[[Plan, int], Products]  # of a plan and a number of experts


class InSlots(NamedTuple):
    """Every expert has as many rows, some of them zeros."""

    plan: Plan
    num_experts: int

    def by_weights(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(self.slots(x), weight).flatten(0, 1)

    def by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(self.slots(x).mT, self.slots(y))

    def slots(self, x: Tensor) -> Tensor:
        return x.view(self.num_experts, -1, x.shape[-1])


class InBlocks:
    """Rows without gaps in blocks, each of which copies its expert's weight: no host sync on any device."""

    def __init__(self, plan: Plan, num_experts: int) -> None:
        assert plan.counts is not None
        self.num_experts, rows = num_experts, plan.num_rows
        self.expert, row, place = plain.in_blocks(plan.counts, rows)
        self.size, self.empty = row.shape[1], (row == rows).view(-1, 1)
        self.row, self.place = row.flatten().clamp(max=rows - 1), place.clamp(max=row.numel() - 1)

    def by_weights(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(self.blocks(x), weight.index_select(0, self.expert)).flatten(0, 1).index_select(0, self.place)

    def by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        products = torch.bmm(self.blocks(x).mT, self.blocks(y))
        zeros = products.new_zeros(self.num_experts, *products.shape[1:])
        return add_rows(zeros, self.expert, products)

    def blocks(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.row).masked_fill_(self.empty, 0).view(-1, self.size, x.shape[-1])


def why_not(call: Call) -> str | None:
    """Activations whose gradient is known, and no transform."""
    if torch.compiler.is_exporting():
        return "an exported graph has torch's own operators only"
    if in_transform():
        return "its gradient does not run under transforms of torch.func"
    return why_unknown(call.network.activation)


def run(call: Call, multiply: Multiply = InBlocks) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`; `multiply` is for rows without gaps."""
    plan = call.decision.plan(ragged=call.decision.prefers_rows())
    if plan.counts is None or plan.num_rows == 0:
        multiply = InSlots
    with without_autocast(call.x.device):
        return _Lean.apply(plan, call.network, multiply, call.x, plan.weight, *call.network.tensors())


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, plan: Plan, network: Network, multiply: Multiply, x: Tensor, weight: Tensor, *weights: Tensor
    ) -> Tensor:
        plan, network = plan._replace(weight=weight), network.filled(weights)
        products = multiply(plan, len(network.w_out))
        tokens = gather(x, plan)
        pre = [
            add_bias(products.by_weights(tokens, w), b, plan) for w, b in zip(network.w_in, network.b_in, strict=True)
        ]
        parts = network.parts(pre)
        hidden = parts[0].new_empty(parts[0].shape)
        hidden_layer.forward(network.activation, parts, hidden)
        y = add_bias(products.by_weights(hidden, network.w_out), network.b_out, plan)
        ctx.settings = plan[5:], network.map(id), multiply  # no tensors: those are saved
        ctx.save_for_backward(x, *plan[:5], *weights, *pre)
        return collect(y, plan, weighted=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        of_plan, network, multiply = ctx.settings
        x, *tensors = ctx.saved_tensors
        number = len(tensors) - len(network.w_in)
        plan, network, pre = Plan(*tensors[:5], *of_plan), network.filled(tensors[5:number]), tensors[number:]
        if torch.is_grad_enabled() or is_wrapped(grad):  # gradients of the gradients, or many gradients at once
            return None, None, None, *plain.gradients(plan, network, grad, x)
        with without_autocast(x.device):
            products = multiply(plan, len(network.w_out))
            return None, None, None, *gradients(plan, network, products, x, grad, pre, ctx.needs_input_grad[3:])


def gradients(
    plan: Plan,
    network: Network,
    products: Products,
    x: Tensor,
    grad: Tensor,
    pre: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, of the assignments' weights and of all weights, those that are needed."""
    need_x, need_weight, *of_weights = needs
    needed = iter(of_weights)
    of: Any = network.map(lambda w: w if next(needed) else None)
    grad_rows = gather(grad, plan)
    grad_hidden = products.by_weights(grad_rows, network.w_out.mT)
    hidden = torch.empty_like(grad_hidden)
    # the gradient of the gate is written over that of the hidden layer, if it is a tensor of its own
    others = [torch.empty_like(part) for part in (pre if network.halves else pre[1:])]
    grad_pre = others if network.halves else [grad_hidden, *others]
    parts, grad_parts = network.parts(pre), network.parts(grad_pre)
    scale, grad_weight = row_weight(plan), None
    if need_weight:
        hidden_layer.forward(network.activation, parts, hidden)
        grad_weight = of_assignments(hidden, grad_hidden, grad_rows, network.b_out, plan)
    grad_hidden.mul_(scale)
    hidden_layer.recompute(network.activation, parts, grad_hidden, grad_parts, hidden)
    hidden_layer.backward(network.activation, parts, grad_hidden, grad_parts)

    grad_out = None if of.w_out is None else products.by_rows(hidden.mul_(scale), grad_rows)
    grad_b_out = None if of.b_out is None else sums(products, grad_rows.mul_(scale))
    del hidden, grad_rows
    grads_b_in = [None if b is None else sums(products, part) for b, part in zip(of.b_in, grad_pre, strict=True)]
    tokens = gather(x, plan) if any(w is not None for w in of.w_in) else x
    grads_in = [
        None if w is None else products.by_rows(tokens, part) for w, part in zip(of.w_in, grad_pre, strict=True)
    ]
    del tokens
    grad_x = None
    if need_x:
        rows = products.by_weights(grad_pre[0], network.w_in[0].mT)
        for part, w in zip(grad_pre[1:], network.w_in[1:], strict=True):
            rows += products.by_weights(part, w.mT)
        grad_x = collect(rows, plan, weighted=False)
    there = zip(network.fields(), (*grads_in, grad_out, *grads_b_in, grad_b_out), strict=True)
    return [grad_x, grad_weight, *(gradient for w, gradient in there if w is not None)]


def gather(x: Tensor, plan: Plan) -> Tensor:
    """Rows of tokens; empty slots are zeros, rows past the last expert's anything."""
    if plan.counts is None or plan.num_tokens == 0:
        return read_rows(x, plan.token)
    return x.index_select(0, plan.token.clamp(max=plan.num_tokens - 1))


def collect(rows: Tensor, plan: Plan, *, weighted: bool) -> Tensor:
    """Every token's sum of rows, weighted or not, in float32 and cast once. Writes into `rows`."""
    if plan.choices is None:
        weight = plan.row_weight() if weighted else None
        return sum_rows(rows, weight, plan.token, plan.row, None, plan.num_tokens)
    if plan.counts is None or plan.num_rows == 0:
        rows = read_rows(rows, plan.row)
    else:
        # an assignment without a row reads the last one, which is no expert's then, as zeros
        rows[-1:].masked_fill_(plan.counts.sum() < plan.num_rows, 0)
        rows = rows.index_select(0, plan.row.clamp(max=plan.num_rows - 1))
    if weighted:
        rows.mul_(plan.weight.unsqueeze(-1))
    return rows.view(plan.num_tokens, plan.choices, rows.shape[-1]).sum(dim=1)


def row_weight(plan: Plan) -> Tensor:
    """`(r, 1)` the weight of every row; of one that is empty, any."""
    number = plan.weight.shape[0]
    if number == 0:
        return plan.weight.new_zeros(plan.num_rows, 1)
    return plan.weight.index_select(0, plan.assignment.clamp(max=number - 1)).unsqueeze(-1)


def of_assignments(hidden: Tensor, grad_hidden: Tensor, grad_rows: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Gradients of the assignments' weights: every row's output times the gradient of what its token got."""
    if plan.num_rows == 0:
        return torch.zeros_like(plan.weight)
    dtype = torch.promote_types(plan.weight.dtype, torch.float32)
    of_row = (hidden * grad_hidden).sum(dim=-1, dtype=dtype)
    if bias is not None:
        of_row += (grad_rows * rows_of(bias, plan)).sum(dim=-1, dtype=dtype)
    found = of_row.index_select(0, plan.row.clamp(max=plan.num_rows - 1))
    return torch.where(plan.row < plan.num_rows, found, 0).to(plan.weight.dtype)


def add_bias(rows: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    return rows if bias is None else rows.add_(rows_of(bias, plan))


def rows_of(bias: Tensor, plan: Plan) -> Tensor:
    """`(r, q)` the bias of every row's expert."""
    if plan.counts is None:
        return bias.repeat_interleave(plan.num_rows // bias.shape[0], dim=0, output_size=plan.num_rows)
    return plain.bias_of_rows(bias, plan.counts, plan.num_rows)


def sums(products: Products, rows: Tensor) -> Tensor:
    """`(e, q)` sum of every expert's rows."""
    return products.by_rows(rows.new_ones(rows.shape[0], SUMMED), rows)[:, 0]
