"""Dispatch, experts and combine of a whole call in one autograd.Function, for the CPU.

Axes: t tokens, r rows (expert by expert, some of them padding), e experts, d model dim, h hidden dim, o dim of outputs.

On a CPU fresh memory costs as much as arithmetic: a new page is about a microsecond. So what lies between the products
is in buffers that every chunk of experts uses again, activations are written in place, and for the backward only the
products with `w_in` are kept (the input is there anyway); it gathers anew and computes the activation anew. The weight
of an assignment is applied where a row is d wide, not h wide, and its gradient is read off the hidden layer, so that no
row of outputs is kept (as SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.dispatch import Plan, sum_rows
from mixture_of_experts.ops import autograd
from mixture_of_experts.ops import hidden as hidden_layer
from mixture_of_experts.ops.autograd import Gradients, Kept, Wanted
from mixture_of_experts.ops.call import Call, Network
from mixture_of_experts.ops.cpu.memory import in_huge_pages
from mixture_of_experts.ops.cpu.schedule import Chunk, Schedule, gather, rows_by_rows, rows_by_weights


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
        most_rows, o = _most_rows(self.chunks), network.w_out.shape[-1]
        kept = [in_huge_pages(x.new_empty(plan.num_rows if keep else most_rows, w.shape[-1])) for w in network.w_in]
        y = in_huge_pages(x.new_empty(plan.num_rows + 1, o))
        y[-1] = 0
        buffer = x.new_empty(most_rows, network.w_out.shape[-2])
        apart = None if o == x.shape[-1] else x.new_empty(most_rows, x.shape[-1])
        for chunk, token, empty in _with_tables(self.chunks, plan):
            out, hidden = y[chunk.rows], buffer[: chunk.num_rows]
            tokens = out if apart is None else apart[: chunk.num_rows]  # results are written over their tokens
            pre = [part[chunk.rows] if keep else part[: chunk.num_rows] for part in kept]
            gather(x, token, empty, tokens)
            for w, b, part in zip(network.w_in, network.b_in, pre, strict=True):
                rows_by_weights(chunk, tokens, w, part, b)
            hidden_layer.forward(network.activation, network.parts(pre), hidden)
            rows_by_weights(chunk, hidden, network.w_out, out, network.b_out)
        return _collect(y, plan), kept

    def gradients(self, x: Tensor, plan: Plan, network: Network, kept: Kept, grad: Tensor, wanted: Wanted) -> Gradients:
        return _Backward(plan, network, self.chunks, x, grad.contiguous(), wanted).run(kept)


class _Backward:
    """Gradients of x, of the assignments' weights, and of those of the experts' weights that are needed."""

    def __init__(
        self, plan: Plan, network: Network, chunks: list[Chunk], x: Tensor, grad: Tensor, wanted: Wanted
    ) -> None:
        self.plan, self.network, self.chunks, self.x, self.grad = plan, network, chunks, x, grad
        self.need_x = wanted.x
        self.grads: Any = wanted.network.map(lambda w: in_huge_pages(torch.empty_like(w)))
        assert plan.counts is not None
        if unused := [expert for expert, number in enumerate(plan.counts.tolist()) if not number]:
            for gradient in self.grads.tensors():
                gradient[unused] = 0
        self.row_weight, self.grad_row_weight = plan.row_weight(), plan.weight.new_zeros(plan.num_rows + 1)

        rows, d, (h, o) = _most_rows(chunks), x.shape[-1], network.w_out.shape[-2:]
        self.tokens, self.hidden, self.grad_hidden = (x.new_empty(rows, width) for width in (d, h, h))
        self.grad_rows = in_huge_pages(x.new_empty(plan.num_rows + 1 if self.need_x else 0, d))
        # the gradients of a chunk's tokens are written over those of its outputs, if they are as wide
        self.grad_out = None if self.need_x and o == d else x.new_empty(rows, o)
        # and that of the gate over that of the hidden layer, if it is a tensor of its own
        self.grad_pre = [x.new_empty(rows, w.shape[-1]) for w in (network.w_in if network.halves else network.w_in[1:])]

    def run(self, kept: Sequence[Tensor]) -> Gradients:
        for chunk, token, empty in _with_tables(self.chunks, self.plan):
            self._add(chunk, token, empty, [part[chunk.rows] for part in kept])
        grad_x = None
        if self.need_x:
            self.grad_rows[-1] = 0
            grad_x = _collect(self.grad_rows, self.plan)
        return grad_x, self.grad_row_weight.index_select(0, self.plan.row), self.grads

    def _add(self, chunk: Chunk, token: Tensor, empty: Tensor, pre: Sequence[Tensor]) -> None:
        network, grads, number = self.network, self.grads, chunk.num_rows
        tokens, hidden, grad_hidden = self.tokens[:number], self.hidden[:number], self.grad_hidden[:number]
        grad_tokens = self.grad_rows[chunk.rows]
        grad_out = grad_tokens if self.grad_out is None else self.grad_out[:number]
        grad_pre = [*([] if network.halves else [grad_hidden]), *(buffer[:number] for buffer in self.grad_pre)]
        parts, grad_parts = network.parts(pre), network.parts(grad_pre)
        scale = self.row_weight[chunk.rows].to(self.x.dtype).unsqueeze(-1)
        grad_row_weight = self.grad_row_weight[chunk.rows]

        gather(self.x, token, empty, tokens)
        gather(self.grad, token, empty, grad_out)
        rows_by_weights(chunk, grad_out, network.w_out.mT, grad_hidden)
        hidden_layer.recompute(network.activation, parts, grad_hidden, grad_parts, hidden)
        if network.b_out is not None:
            of_bias = tokens.new_empty(number, 1)
            rows_by_weights(chunk, grad_out, network.b_out.unsqueeze(-1), of_bias)
            grad_row_weight += of_bias.squeeze(-1)
        rows_by_rows(chunk, scale, grad_out, grads.b_out)
        if grads.w_out is not None:
            rows_by_rows(chunk, hidden, grad_out.mul_(scale), grads.w_out)
        grad_row_weight += hidden.mul_(grad_hidden).sum(dim=-1, dtype=grad_row_weight.dtype)
        hidden_layer.backward(network.activation, parts, grad_hidden, grad_parts)
        tokens.mul_(scale)
        for part, grad_w, grad_b in zip(grad_pre, grads.w_in, grads.b_in, strict=True):
            rows_by_rows(chunk, tokens, part, grad_w)
            rows_by_rows(chunk, scale, part, grad_b)
        if self.need_x:
            for index, (part, w) in enumerate(zip(grad_pre, network.w_in, strict=True)):
                rows_by_weights(chunk, part, w.mT, grad_tokens, add=index > 0)


def _most_rows(chunks: list[Chunk]) -> int:
    return max((chunk.num_rows for chunk in chunks), default=0)


def _with_tables(chunks: list[Chunk], plan: Plan) -> list[tuple[Chunk, Tensor, Tensor]]:
    """Each chunk, the tokens of its rows, and which of its rows are empty."""
    token = plan.token.clamp(max=plan.num_tokens - 1)
    empty = plan.token == plan.num_tokens
    return [(chunk, token[chunk.rows], empty[chunk.rows].nonzero().squeeze(-1)) for chunk in chunks]


def _collect(rows: Tensor, plan: Plan) -> Tensor:
    """Each token's weighted sum of rows `(r + 1, o)`, the last of which is zeros."""
    weight = plan.weight.detach()  # else `embedding_bag` prepares for a backward
    if plan.choices is None or rows.dtype != weight.dtype:  # the sum is taken in float32
        weight = plan.row_weight().detach() if plan.choices is None else weight
        return sum_rows(rows[:-1], weight, plan.token, plan.row, plan.choices, plan.num_tokens)
    shape = plan.num_tokens, plan.choices
    return F.embedding_bag(plan.row.view(shape), rows, per_sample_weights=weight.view(shape), mode="sum")
