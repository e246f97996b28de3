"""Dispatch, experts and combine of a whole call in one function of autograd, for the CPU.

Axes: t tokens, r rows (expert by expert, some of them padding), d model dim, o dim of the outputs.

On a CPU fresh memory costs as much as arithmetic: a new page is about a microsecond. So rows are computed in chunks of
experts, which are small enough that what lies between the products stays in the caches, and that the allocator gives
the memory of one chunk to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch import Plan, sum_rows
from mixture_of_experts.ops import autograd, rows
from mixture_of_experts.ops.autograd import Gradients, Kept, Wanted
from mixture_of_experts.ops.call import Call, Network
from mixture_of_experts.ops.cpu.schedule import Chunk, Schedule


def run(call: Call) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`."""
    x, network = call.x, call.network
    h, o = network.w_out.shape[-2:]
    dim = max(x.shape[-1], o)
    row_bytes = (dim + sum(w.shape[-1] for w in network.w_in)) * x.element_size()
    schedule = Schedule(dim, h, row_bytes, torch.get_num_threads())
    plan = call.decision.plan(ragged=True, widen=schedule)  # which asks the schedule for rows, and so makes its chunks
    return autograd.run(Fused(schedule.chunks), x, plan, network)


class Fused:
    """Computes chunk by chunk (`autograd.Way`)."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks

    def forward(self, x: Tensor, plan: Plan, network: Network, keep: bool) -> tuple[Tensor, Kept]:
        y = _rows_and_zeros(x, plan, network.w_out.shape[-1])
        kept = [x.new_empty(plan.num_rows, w.shape[-1]) for w in network.w_in] if keep else []
        for chunk in self.chunks:
            rows.forward(InChunk(chunk, plan, y), x, network, keep, [part[chunk.rows] for part in kept])
        return _collect(y, plan), kept

    def gradients(self, x: Tensor, plan: Plan, network: Network, kept: Kept, grad: Tensor, wanted: Wanted) -> Gradients:
        grads = wanted.network.map(torch.empty_like)
        assert plan.counts is not None
        if unused := [expert for expert, number in enumerate(plan.counts.tolist()) if not number]:
            for gradient in grads.tensors():
                gradient[unused] = 0
        y, (scale, grad_scale) = _rows_and_zeros(x, plan, x.shape[-1]), rows.scales(plan)
        grad = grad.contiguous()
        for chunk in self.chunks:
            here, products = chunk.rows, InChunk(chunk, plan, y)
            pre = [part[here] for part in kept]
            rows.gradients(products, x, network, pre, grad, scale[here], grad_scale[here], grads, wanted.x)
        grad_x = _collect(y, plan) if wanted.x else None
        return grad_x, grad_scale.index_select(0, plan.row).to(plan.weight.dtype), grads


class InChunk:
    """`rows.Products` of a chunk: of each batch one product. The totals are written to the chunk's rows of `y`."""

    def __init__(self, chunk: Chunk, plan: Plan, y: Tensor) -> None:
        token = plan.token[chunk.rows]
        self.token, self.empty = token.clamp(max=plan.num_tokens - 1), (token == plan.num_tokens).nonzero().squeeze(-1)
        self.y, self.batches, self.start = y[chunk.rows], chunk.batches, chunk.rows.start

    def gather(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.token).index_fill_(0, self.empty, 0)

    def by_weights(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[-1]) if out is None else out
        for batch in self.batches:
            torch.bmm(batch.of(x, self.start), weight[batch.experts], out=batch.of(out, self.start))
        return out

    def total(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        (x, weight), *others = pairs
        self.by_weights(x, weight, self.y)
        for x, weight in others:
            for batch in self.batches:
                batch.of(self.y, self.start).baddbmm_(batch.of(x, self.start), weight[batch.experts])
        return self.y

    def add_bias(self, rows: Tensor, bias: Tensor) -> None:
        for batch in self.batches:
            batch.of(rows, self.start).add_(bias[batch.experts].unsqueeze(1))

    def by_rows(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        for batch in self.batches:
            torch.bmm(batch.of(x, self.start).mT, batch.of(y, self.start), out=out[batch.experts])
        return out

    def sums(self, scale: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        self.by_rows(scale.to(rows.dtype), rows, out.unsqueeze(1))
        return out


def _rows_and_zeros(x: Tensor, plan: Plan, width: int) -> Tensor:
    """Memory for rows `(r, width)`, and a row of zeros, which assignments without a row read."""
    rows = x.new_empty(plan.num_rows + 1, width)
    rows[-1] = 0
    return rows


def _collect(rows: Tensor, plan: Plan) -> Tensor:
    """Each token's weighted sum of rows `(r + 1, o)`, the last of which is zeros."""
    weight = plan.weight.detach()  # else `embedding_bag` prepares for a backward
    if plan.choices is None or rows.dtype != weight.dtype:  # the sum is taken in float32
        weight = plan.row_weight().detach() if plan.choices is None else weight
        return sum_rows(rows[:-1], weight, plan.token, plan.row, plan.choices, plan.num_tokens)
    shape = plan.num_tokens, plan.choices
    return F.embedding_bag(plan.row.view(shape), rows, per_sample_weights=weight.view(shape), mode="sum")
