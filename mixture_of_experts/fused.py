"""Dispatch, experts and combine of a whole call in one autograd.Function, for the CPU.

Axes: t tokens, a assignments, r rows (sorted by expert), e experts, w rows of an expert in its chunk, d model dim,
h hidden dim.

On a CPU fresh memory costs as much as arithmetic: a new page is about a microsecond. So tokens are gathered into
buffers that are used again for every chunk of experts, products and activations are written in place, and of all
that is in between only the products with the first weights are kept for the backward (the input is there anyway).
The backward gathers anew and computes the activation anew. The weight of an assignment is applied where a row is
d wide, not h wide, and its gradient is read off the hidden layer, so that no row of outputs is kept
(as SonicMoE, arXiv 2512.14080).

The result is that of `combine(experts(dispatch(x)))`, which is also what runs under vmap and in a double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.dispatch import Plan, combine, dispatch, sum_rows
from mixture_of_experts.grouped import expert_matmul

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation that writes where it is told to, and its gradient likewise."""

    function: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], object]  # (h, out)
    write_grad: Callable[[Tensor, Tensor, Tensor], object]  # (grad, h, out)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda h: F.gelu(h, approximate=approximate),
        lambda h, out: aten.gelu.out(h, approximate=approximate, out=out),
        lambda grad, h, out: aten.gelu_backward.grad_input(grad, h, approximate=approximate, grad_input=out),
    )


_SILU = Activation(
    F.silu,
    lambda h, out: aten.silu.out(h, out=out),
    lambda grad, h, out: aten.silu_backward.grad_input(grad, h, grad_input=out),
)
_RELU = Activation(
    torch.relu,
    lambda h, out: torch.clamp_min(h, 0, out=out),
    lambda grad, h, out: aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
)


def find_activation(act: nn.Module) -> Activation | None:
    """The activation in the form needed here; None if there is none for it."""
    if type(act) is nn.GELU:
        return _gelu(act.approximate)
    return {nn.SiLU: _SILU, nn.ReLU: _RELU}.get(type(act))


def takes(x: Tensor, act: nn.Module, weights: list[Tensor]) -> bool:
    """Whether `fused_experts` can run: plain tensors on the CPU, not while a graph is traced."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or find_activation(act) is None:
        return False
    return type(x) is Tensor and all(type(weight) in (Tensor, nn.Parameter) for weight in weights)


def fused_experts(x: Tensor, plan: Plan, act: nn.Module, first: list[Tensor], last: Tensor) -> Tensor:
    """`combine(act(rows first[0]) [* rows first[1]] last)` of tokens `(t, d)`.

    Args:
        x: `(t, d)`.
        plan: rows without gaps (`plan.counts` is set).
        act: an activation known to `find_activation`.
        first: one weight `(e, d, h)`, or two of them for gated experts.
        last: `(e, h, d)`.
    """
    assert plan.counts is not None
    activation = find_activation(act)
    weights = [*first, last]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, plan.weight, *weights))
    call = Call(plan.choices, plan.num_tokens, activation, keep)
    tables = (plan.row, plan.assignment, plan.token, plan.counts)
    return _Fused.apply(call, x, plan.weight, *tables, *weights)[0]


class Call(NamedTuple):
    """What of a call is not a tensor."""

    choices: int | None
    num_tokens: int
    activation: Activation
    keep: bool  # whether to keep what the backward reads (else it is computed anew)


class Chunk(NamedTuple):
    """Neighbouring experts computed together, each with as many rows as the fullest of them."""

    start: int  # first expert
    stop: int
    width: int
    row: int  # first row in the padded layout

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + (self.stop - self.start) * self.width)


def chunks_of(counts: list[int], row_bytes: int) -> list[Chunk]:
    """Experts in chunks that are large enough to keep all cores busy and waste few rows on padding.

    Experts without rows are in no chunk.
    """
    chunks: list[Chunk] = []
    row = start = 0
    while start < len(counts):
        if counts[start] == 0:
            start += 1
            continue
        stop, width, used = start + 1, counts[start], counts[start]
        while stop < len(counts) and not ((stop - start) >= 8 and (stop - start) * width * row_bytes >= CHUNK_BYTES):
            wider = max(width, counts[stop])
            if wider * (stop + 1 - start) > (used + counts[stop]) * MOST_PADDING:
                break
            stop, width, used = stop + 1, wider, used + counts[stop]
        chunks.append(Chunk(start, stop, width, row))
        row += (stop - start) * width
        start = stop
    return chunks


CHUNK_BYTES = 16 << 20
MOST_PADDING = 1.15


class Layout(NamedTuple):
    """The padded rows of all chunks and their tables; `rows` is also the sentinel of `row`."""

    chunks: list[Chunk]
    rows: int
    row: Tensor  # (a,) padded row of each assignment, `rows` where it has none
    token: Tensor  # (rows,) token of each padded row, 0 where it is empty
    empty: Tensor  # (rows,) bool
    weight: Tensor  # (rows,) weight of each padded row, 0 where it is empty


def lay_out(call: Call, weight: Tensor, row: Tensor, assignment: Tensor, token: Tensor, counts: Tensor, width: int):
    """Make the padded layout of rows `width` elements wide."""
    numbers = counts.tolist()
    chunks = chunks_of(numbers, width * weight.element_size())
    total = sum(numbers)
    rows = sum((chunk.stop - chunk.start) * chunk.width for chunk in chunks)
    shift, first = [0] * len(numbers), 0
    firsts = []
    for number in numbers:
        firsts.append(first)
        first += number
    for chunk in chunks:
        for expert in range(chunk.start, chunk.stop):
            shift[expert] = chunk.row + (expert - chunk.start) * chunk.width - firsts[expert]
    shifts = torch.repeat_interleave(torch.tensor(shift), counts, output_size=total)
    padded = torch.arange(total) + shifts  # padded row of each row
    table = torch.full((assignment.shape[0] + 1,), rows)
    table[:total] = padded
    weight_of = torch.cat([weight, weight.new_zeros(1)])[assignment[:total]]
    token_of = token[:total]
    filled = token_of < call.num_tokens
    tokens = torch.zeros(rows, dtype=torch.int64).index_copy_(0, padded, torch.where(filled, token_of, 0))
    empty = torch.ones(rows, dtype=torch.bool).index_copy_(0, padded, ~filled)
    weights = weight.new_zeros(rows).index_copy_(0, padded, weight_of)
    return Layout(chunks, rows, table[row], tokens, empty, weights)


class Buffers:
    """Memory for one chunk, used again for the next."""

    def __init__(self, like: Tensor, chunks: list[Chunk]) -> None:
        self.like = like
        self.most = max(((chunk.stop - chunk.start) * chunk.width for chunk in chunks), default=0)
        self.held: dict[tuple[str, int], Tensor] = {}

    def get(self, name: str, chunk: Chunk, width: int) -> Tensor:
        """`(experts, w, width)` uninitialised."""
        if (name, width) not in self.held:
            self.held[name, width] = self.like.new_empty(self.most, width)
        count = chunk.stop - chunk.start
        return self.held[name, width][: count * chunk.width].view(count, chunk.width, width)


def _gather(x: Tensor, layout: Layout, chunk: Chunk, out: Tensor) -> Tensor:
    """Tokens of the chunk's rows, zeros where a row is empty."""
    flat = out.flatten(0, 1)
    torch.index_select(x, 0, layout.token[chunk.rows], out=flat)
    empty = layout.empty[chunk.rows].nonzero().squeeze(-1)
    if empty.numel():
        flat.index_fill_(0, empty, 0)
    return out


def _product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`x @ weight` of a chunk, written into `out`."""
    if x.shape[0] == 1:
        torch.mm(x[0], weight[0], out=out[0])
    else:
        torch.bmm(x, weight, out=out)
    return out


class _Fused(torch.autograd.Function):
    """Returns the tokens' outputs `(t, d)`, and what is kept for the backward."""

    @staticmethod
    def forward(call: Call, x, weight, row, assignment, token, counts, *weights):  # noqa: ANN001, ANN205
        *first, last = weights
        layout = lay_out(call, weight, row, assignment, token, counts, last.shape[-2])
        buffers = Buffers(x, layout.chunks)
        hidden_dim, dim = last.shape[-2:]
        kept = [x.new_empty(layout.rows if call.keep else 0, hidden_dim) for _ in first]
        y = x.new_empty(layout.rows + 1, dim)
        y[-1] = 0
        for chunk in layout.chunks:
            experts = slice(chunk.start, chunk.stop)
            tokens = _gather(x, layout, chunk, buffers.get("x", chunk, dim))
            pre = _first_products(call, tokens, first, chunk, kept, buffers)
            hidden = _hidden(call.activation, pre, buffers.get("hidden", chunk, hidden_dim))
            _product(hidden, last[experts], y[chunk.rows].view(*tokens.shape[:2], dim))
        return _collect(call, y, weight, layout), *kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        ctx.call, *tensors = inputs
        kept = output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        ctx.num_kept = len(kept)

    @staticmethod
    def backward(ctx, grad, *_):  # noqa: ANN001, ANN205
        if grad is None:
            return (None,) * (7 + ctx.num_kept + 1)
        wanted = ctx.needs_input_grad
        needs = (wanted[1], wanted[2], any(wanted[7:]))
        grads = _FusedBackward.apply(ctx.call, needs, ctx.num_kept, grad, *ctx.saved_tensors)
        grad_x, grad_weight, *grad_weights = (g if need else None for g, need in zip(grads, wanted[1:3] + wanted[7:]))
        return None, grad_x, grad_weight, None, None, None, None, *grad_weights

    @staticmethod
    def vmap(info, in_dims, call, *tensors):  # noqa: ANN001, ANN205
        out = torch.vmap(lambda *t: _plain(call, *t), in_dims[1:], randomness=info.randomness)(*tensors)
        number = len(tensors) - 7
        return (out, *(out.new_empty(0, 0) for _ in range(number))), (0, *([None] * number))


class _FusedBackward(torch.autograd.Function):
    """Gradients of x, the assignments' weights and the experts' weights. See `_Fused.backward`."""

    @staticmethod
    def forward(call: Call, needs, num_kept: int, grad, x, weight, row, assignment, token, counts, *rest):  # noqa: ANN001, ANN205
        *first, last = rest[: num_kept + 1]
        kept = rest[num_kept + 1 :]
        layout = lay_out(call, weight, row, assignment, token, counts, last.shape[-2])
        buffers = Buffers(x, layout.chunks)
        hidden_dim, dim = last.shape[-2:]
        grad = grad.contiguous()
        need_x, _, need_weights = needs
        grad_x_rows = x.new_empty(layout.rows + 1, dim) if need_x else None
        grad_row_weight = weight.new_zeros(layout.rows + 1)
        grad_weights = [torch.empty_like(w) if need_weights else None for w in (*first, last)]
        if need_weights:
            _zero_unused(grad_weights, layout.chunks)
        for chunk in layout.chunks:
            experts = slice(chunk.start, chunk.stop)
            scale = layout.weight[chunk.rows].to(x.dtype).view(-1, chunk.width, 1)
            tokens = _gather(x, layout, chunk, buffers.get("x", chunk, dim))
            grads = _gather(grad, layout, chunk, buffers.get("grad", chunk, dim))
            pre = _first_products(call, tokens, first, chunk, kept, buffers, again=True)
            grad_hidden = _product(grads, last[experts].mT, buffers.get("grad_hidden", chunk, hidden_dim))
            hidden = buffers.get("hidden", chunk, hidden_dim)
            spare = buffers.get("spare", chunk, hidden_dim)
            grad_pre, products = _hidden_backward(call.activation, pre, hidden, grad_hidden, spare, buffers, chunk)
            grad_row_weight[:-1][chunk.rows] = products.to(weight.dtype).flatten()
            if need_weights:
                grads.mul_(scale)
                _product(hidden.mT, grads, grad_weights[-1][experts])
                tokens.mul_(scale)
                for which, part in enumerate(grad_pre):
                    _product(tokens.mT, part, grad_weights[which][experts])
            if need_x:
                out = grad_x_rows[chunk.rows].view(-1, chunk.width, dim)
                _product(grad_pre[0], first[0][experts].mT, out)
                for part, matrix in zip(grad_pre[1:], first[1:], strict=True):
                    out.baddbmm_(part, matrix[experts].mT)
        grad_x = x.new_empty(0)
        if need_x:
            grad_x_rows[-1] = 0
            grad_x = _collect(call, grad_x_rows, weight, layout)
        grad_weights = [x.new_empty(0) if g is None else g for g in grad_weights]
        return grad_x, grad_row_weight[layout.row], *grad_weights

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        ctx.call, ctx.needs, ctx.num_kept, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):  # noqa: ANN001, ANN205
        """Of the gradients' gradients the plain operators take care."""
        call = ctx.call
        tensors = ctx.saved_tensors
        grad, x, weight, *rest = tensors
        tables, weights = rest[:4], rest[4 : 4 + ctx.num_kept + 1]

        def gradients(grad, x, weight, *weights):  # noqa: ANN001, ANN202
            return _plain_backward(call, grad, x, weight, *tables, *weights)

        inputs = (x, weight, *weights)
        given = [g if g.shape == t.shape else torch.zeros_like(t) for g, t in zip(grads, inputs, strict=True)]
        _, back = torch.func.vjp(gradients, grad, x, weight, *weights)
        second = back(tuple(given))
        return None, None, None, *second[:3], None, None, None, None, *second[3:], *([None] * ctx.num_kept)

    @staticmethod
    def vmap(info, in_dims, call, needs, num_kept, *tensors):  # noqa: ANN001, ANN205
        number = 7 + num_kept + 1
        back = torch.vmap(lambda *t: _plain_backward(call, *t), in_dims[3 : 3 + number], randomness=info.randomness)
        return back(*tensors[:number]), (0,) * (num_kept + 3)


def _plain(call: Call, x, weight, row, assignment, token, counts, *weights):  # noqa: ANN001, ANN202
    """The same with the operators of `dispatch` and `grouped`."""
    *first, last = weights
    num_rows = assignment.shape[0]
    experts = (last.shape[0],)
    plan = Plan(row, assignment, weight, token, call.choices, counts, call.num_tokens, num_rows, experts)
    rows = dispatch(x, plan)
    hidden = call.activation.function(expert_matmul(rows, first[0], counts))
    for matrix in first[1:]:
        hidden = hidden * expert_matmul(rows, matrix, counts)
    return combine(expert_matmul(hidden, last, counts), plan)


def _plain_backward(call: Call, grad, x, weight, row, assignment, token, counts, *weights):  # noqa: ANN001, ANN202
    """Gradients of x, weight and weights, by the operators of `_plain`."""

    def function(x, weight, *weights):  # noqa: ANN001, ANN202
        return _plain(call, x, weight, row, assignment, token, counts, *weights)

    _, back = torch.func.vjp(function, x, weight, *weights)
    return back(grad)


def _first_products(
    call: Call,
    tokens: Tensor,
    first: list[Tensor],
    chunk: Chunk,
    kept: list[Tensor] | tuple[Tensor, ...],
    buffers: Buffers,
    again: bool = False,
) -> list[Tensor]:
    """Products with the first weights: kept ones are read (`again`) or written, others live in a buffer."""
    products = []
    for which, matrix in enumerate(first):
        if call.keep:
            out = kept[which][chunk.rows].view(*tokens.shape[:2], matrix.shape[-1])
        else:
            out = buffers.get(f"pre{which}", chunk, matrix.shape[-1])
        if not (again and call.keep):
            _product(tokens, matrix[chunk.start : chunk.stop], out)
        products.append(out)
    return products


def _hidden(activation: Activation, pre: list[Tensor], out: Tensor) -> Tensor:
    """`act(pre[0])`, times `pre[1]` if gated, written into `out`."""
    activation.write(pre[0], out)
    return out.mul_(pre[1]) if len(pre) == 2 else out


def _hidden_backward(
    activation: Activation,
    pre: list[Tensor],
    hidden: Tensor,
    grad: Tensor,
    spare: Tensor,
    buffers: Buffers,
    chunk: Chunk,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of `pre`, and `sum_h hidden * grad` of each row; fills `hidden`; `grad` and `spare` are used up."""
    activation.write(pre[0], hidden)
    if len(pre) == 1:
        products = torch.mul(hidden, grad, out=spare).sum(dim=-1)
        activation.write_grad(grad, pre[0], grad)
        return [grad], products
    grad_up = torch.mul(hidden, grad, out=buffers.get("grad_up", chunk, grad.shape[-1]))
    products = torch.mul(grad_up, pre[1], out=spare).sum(dim=-1)
    hidden.mul_(pre[1])
    grad.mul_(pre[1])
    activation.write_grad(grad, pre[0], grad)
    return [grad, grad_up], products


def _collect(call: Call, rows: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Each token's weighted sum of padded rows `(rows + 1, d)`, the last of which is zeros."""
    if call.choices is None:
        token = torch.where(layout.empty, call.num_tokens, layout.token)
        return sum_rows(rows[:-1], layout.weight, token, layout.row, None, call.num_tokens)
    if rows.dtype != weight.dtype:  # the sum is taken in float32
        return sum_rows(rows, weight, layout.token, layout.row, call.choices, call.num_tokens)
    table = layout.row.view(call.num_tokens, call.choices)
    weights = weight.view(call.num_tokens, call.choices)
    return F.embedding_bag(table, rows, per_sample_weights=weights, mode="sum")


def _zero_unused(gradients: list[Tensor], chunks: list[Chunk]) -> None:
    """Experts without rows have gradients of exactly 0."""
    stop = 0
    for chunk in [*chunks, Chunk(gradients[0].shape[0], 0, 0, 0)]:
        if stop < chunk.start:
            for gradient in gradients:
                gradient[stop : chunk.start].zero_()
        stop = chunk.stop
