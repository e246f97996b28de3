"""The layer by hand for two configurations, top-2 with capacity and dropless SwiGLU: all rows at once, in memory that
stands ready or in new memory.

e experts, r rows, t tokens, k choices, d model dim, h hidden dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contest import Contestant
from benchmarks.layer import loaded
from benchmarks.problem import Inputs, Weights
from mixture_of_experts.decision import decision_of, plan_slots_of
from mixture_of_experts.ops.cpu.batches import Batch
from mixture_of_experts.ops.cpu.fused import plan_chunks
from mixture_of_experts.routing import Routing

aten = torch.ops.aten


class Where(NamedTuple):
    """Where rows are and what they are of."""

    batches: list[Batch]
    table: Tensor  # (t, k) row of each choice, r where it has none
    token: Tensor  # (r,)
    weight: Tensor  # (r, 1)
    choice_weight: Tensor  # (t, k)
    unused: Tensor  # experts without rows

    def by_weights(self, x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> Tensor:
        for batch in self.batches:
            rows, results, matrices = batch.of(x), batch.of(out), weight[batch.experts]
            results.baddbmm_(rows, matrices) if add else torch.bmm(rows, matrices, out=results)
        return out

    def by_rows(self, x: Tensor, y: Tensor, like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        for batch in self.batches:
            torch.bmm(batch.of(x).mT, batch.of(y), out=out[batch.experts])
        return out.index_fill_(0, self.unused, 0)

    def collect(self, rows: Tensor) -> Tensor:
        return F.embedding_bag(self.table, rows, per_sample_weights=self.choice_weight, mode="sum")


@torch.no_grad()
def where_of(case: Case, routing: Routing, weight: Tensor) -> Where:
    """With capacity all slots, as one batch; dropless the layer's batches of experts, whose weight is `weight`."""
    if case.capacity is not None:
        where = plan_slots_of(routing)
        batches, unused = [Batch(slice(0, case.e), case.rows_per_expert, 0)], where.row.new_empty(0)
    else:
        row_bytes = (case.d + (2 if case.gated else 1) * case.h) * weight.element_size()
        where, chunks = plan_chunks(decision_of(routing), case.d * case.h, row_bytes)
        assert where.rows_per_expert is not None
        batches = [batch for chunk in chunks for batch in chunk.batches]
        unused = (where.rows_per_expert == 0).nonzero().flatten()
    table, weights = where.row.view(-1, case.k), where.weight.detach().view(-1, case.k)
    token, row_weight = where.token.clamp(max=where.num_tokens - 1), where.row_weight().unsqueeze(-1)
    return Where(batches, table, token, row_weight, weights, unused)


class Memory(NamedTuple):
    """What a step works in."""

    slots: Tensor  # (r, d)
    out: Tensor  # (r + 1, d); its last row is of the choices that were dropped
    hidden: Tensor  # (r, h)
    grad_hidden: Tensor
    grad_up: Tensor

    @classmethod
    def of(cls, like: Tensor, r: int, d: int, h: int) -> Memory:
        hidden, grad_hidden, grad_up = (like.new_empty(r, h) for _ in range(3))
        out = like.new_empty(r + 1, d)
        out[-1] = 0
        return cls(like.new_empty(r, d), out, hidden, grad_hidden, grad_up)


def whole_batch(case: Case, weights: Weights, inputs: Inputs, ready: bool = True) -> Contestant:
    """The roofline, and all that it leaves out and a layer cannot.

    The gate is this package's, and where dropless the choice of which experts are one product. New memory are the
    output, the gradients and the products that are kept for the backward; a layer of a model cannot have the latter
    before, as every layer keeps its own until its backward. All that a step works in stands ready, which a layer has
    only if it holds that much memory between its steps, or else is new too, once a step.
    """
    module = loaded(case, weights, inputs).train()
    w1, w2, *w3 = (getattr(module.experts, name) for name in ("w1", "w2", "w3")[: 3 if case.gated else 2])
    first, d, h = [w1, *w3], case.d, case.h
    x, grad = inputs.x.detach().requires_grad_(), inputs.grad.reshape(-1, d)
    tokens, one = x.detach().view(-1, d), torch.ones(())
    r = len(where_of(case, module.gate(x), w1).token)
    standing = Memory.of(tokens, r, d, h) if ready else None
    activate, activate_grad = aten.gelu.out, aten.gelu_backward.grad_input
    if case.gated:
        activate, activate_grad = aten.silu.out, aten.silu_backward.grad_input

    def forward(memory: Memory) -> tuple[Routing, Where, list[Tensor], Tensor]:
        slots, out, hidden, *_ = memory
        routing = module.gate(x)
        rows = where_of(case, routing, w1)
        with torch.no_grad():
            torch.index_select(tokens, 0, rows.token, out=slots)
            pre = [rows.by_weights(slots, weight, tokens.new_empty(r, h)) for weight in first]
            activate(pre[0], out=hidden)
            if case.gated:
                hidden.mul_(pre[1])
            rows.by_weights(hidden, w2, out)
            return routing, rows, pre, rows.collect(out).view_as(x)

    @torch.no_grad()
    def backward(memory: Memory, rows: Where, pre: list[Tensor]) -> Tensor:
        """Gradients of all but the gate; returns that of the choices' weights."""
        slots, out, hidden, grad_hidden, grad_up = memory
        grad_slots = out[:r]  # read before the gradients of the slots are written over them
        torch.index_select(grad, 0, rows.token, out=grad_slots)
        rows.by_weights(grad_slots, w2.mT, grad_hidden)
        activate(pre[0], out=hidden)
        if case.gated:
            torch.mul(hidden, grad_hidden, out=grad_up)
            hidden.mul_(pre[1])
        w2.grad = rows.by_rows(hidden, grad_slots.mul_(rows.weight), w2)
        grad_weight = F.pad(hidden.mul_(grad_hidden).sum(dim=-1), (0, 1))[rows.table]
        if case.gated:
            grad_hidden.mul_(pre[1])
        activate_grad(grad_hidden, pre[0], grad_input=grad_hidden)
        slots.mul_(rows.weight)
        for weight, part in zip(first, (grad_hidden, grad_up), strict=False):
            weight.grad = rows.by_rows(slots, part, weight)
            rows.by_weights(part, weight.mT, out, add=weight is not w1)
        x.grad = rows.collect(out).view_as(x)
        return grad_weight

    def step() -> None:
        memory = standing or Memory.of(tokens, r, d, h)
        routing, rows, pre, _ = forward(memory)
        grad_weight = backward(memory, rows, pre)
        aux = module.aux_loss([routing])
        torch.autograd.backward((routing.weight, aux), (grad_weight.view_as(routing.weight), one))

    def output() -> Tensor:
        return forward(standing or Memory.of(tokens, r, d, h))[-1]

    name, place = "whole batch", "buffers that stand ready"
    if not ready:
        name, place = "whole batch in new memory", "buffers that are new in every step"
    note = f"the layer by hand on {r} rows of {d}, working in {place}; this package's gate"
    return Contestant(name, step, case, output, [x], list(module.parameters()), note)
