"""Dispatch, experts and combine of a whole call in one autograd.Function, for the CPU.

Axes: t tokens, a assignments, r rows, e experts, d model dim, h hidden dim.

On a CPU fresh memory costs as much as arithmetic: a new page is about a microsecond. So tokens are gathered into
buffers that are used again for every chunk of experts, products and activations are written in place, and of all
that is in between only the products with the first weights are kept for the backward (the input is there anyway).
The backward gathers anew and computes the activation anew. The weight of an assignment is applied where a row is
d wide, not h wide, and its gradient is read off the hidden layer, so that no row of outputs is kept
(as SonicMoE, arXiv 2512.14080).

The result is that of `combine(experts(dispatch(x)))`, which is also what runs under vmap and in a double backward.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.activations import Activation, find_activation
from mixture_of_experts.batches import by_rows, by_weights, takes_steps
from mixture_of_experts.chunks import Buffers, Chunk, Layout, Setting, lay_out
from mixture_of_experts.dispatch import Plan, combine, dispatch, sum_rows
from mixture_of_experts.grouped import expert_matmul


def takes(x: Tensor, act: nn.Module) -> bool:
    """Whether `fused_experts` can run, given plain weights: plain tokens on the CPU, not while a graph is traced."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and find_activation(act) is not None


def fused_experts(x: Tensor, plan: Plan, act: nn.Module, first: list[Tensor], last: Tensor, training: bool) -> Tensor:
    """`combine(act(rows first[0]) [* rows first[1]] last)` of tokens `(t, d)`. (A few in inference: `few.py`.)

    Args:
        x: `(t, d)`.
        plan: rows without gaps (`plan.counts` is set).
        act: an activation known to `find_activation`.
        first: one weight `(e, d, h)`, or two of them for gated experts.
        last: `(e, h, d)`.
        training: the experts' mode.
    """
    assert plan.counts is not None
    activation = find_activation(act)
    assert activation is not None
    weights = [*first, last]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, plan.weight, *weights))
    hidden_bytes, dim_bytes = (size * last.element_size() for size in last.shape[-2:])
    setting = Setting(plan.num_tokens, dim_bytes, hidden_bytes, torch.get_num_threads(), takes_steps(last), training)
    call = Call(plan.choices, setting, activation, keep)
    tables = (plan.row, plan.assignment, plan.token, plan.counts)
    return _Fused.apply(call, x, plan.weight, *tables, *weights)[0]


class Call(NamedTuple):
    """What of a call is not a tensor."""

    choices: int | None
    setting: Setting
    activation: Activation
    keep: bool  # whether to keep what the backward reads (else it is computed anew)


def _gather(x: Tensor, layout: Layout, chunk: Chunk, out: Tensor) -> Tensor:
    """Tokens of the chunk's rows, zeros where a row is empty."""
    torch.index_select(x, 0, layout.token[chunk.rows], out=out)
    if layout.empty is not None:
        out.masked_fill_(layout.empty[chunk.rows].unsqueeze(-1), 0)
    return out


ASSIGNMENT, TOKEN = 3, 4  # where these stand among the tensors of a call


class _Fused(torch.autograd.Function):
    """Returns the tokens' outputs `(t, d)`, and what is kept for the backward."""

    @staticmethod
    def forward(call: Call, *tensors):  # a short signature: torch binds it anew for every call
        x, weight, row, assignment, token, counts, *first, last = tensors
        layout = lay_out(call.setting, weight, row, assignment, token, counts)
        buffers = Buffers(x, layout.chunks)
        hidden_dim, dim = last.shape[-2:]
        kept = [x.new_empty(layout.rows if call.keep else 0, hidden_dim) for _ in first]
        y = x.new_empty(layout.rows + 1, dim)
        y[-1] = 0
        for chunk in layout.chunks:
            tokens = _gather(x, layout, chunk, buffers.get("x", chunk, dim))
            pre = _first_products(call, tokens, first, chunk, kept, buffers)
            hidden = _hidden(call.activation, pre, buffers.get("hidden", chunk, hidden_dim) if call.keep else pre[0])
            by_weights(chunk.batches, hidden, last, y[chunk.rows])
        return _collect(call, y, weight, layout), *kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.call, *tensors = inputs
        if ctx.call.choices is not None:
            tensors[TOKEN] = None  # the backward reads it off the assignments
        kept = output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        ctx.num_kept = len(kept)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * (7 + ctx.num_kept + 1)
        wanted = ctx.needs_input_grad
        needs = (wanted[1], wanted[2], any(wanted[7:]))
        tensors = list(ctx.saved_tensors)
        if ctx.call.choices is not None:
            tensors[TOKEN] = tensors[ASSIGNMENT] // ctx.call.choices
        grads = _FusedBackward.apply(ctx.call, needs, ctx.num_kept, grad, *tensors)
        of = zip(grads, wanted[1:3] + wanted[7:], strict=True)
        grad_x, grad_weight, *grad_weights = (gradient if need else None for gradient, need in of)
        return None, grad_x, grad_weight, None, None, None, None, *grad_weights

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        out = torch.vmap(partial(_plain, call), in_dims[1:], randomness=info.randomness)(*tensors)
        number = len(tensors) - 7
        return (out, *(out.new_empty(0, 0) for _ in range(number))), (0, *([None] * number))


class _FusedBackward(torch.autograd.Function):
    """Gradients of x, the assignments' weights and the experts' weights. See `_Fused.backward`."""

    @staticmethod
    def forward(call: Call, needs, num_kept: int, *tensors):
        grad, x, weight, row, assignment, token, counts, *rest = tensors
        (*first, last), kept = rest[: num_kept + 1], rest[num_kept + 1 :]
        layout = lay_out(call.setting, weight, row, assignment, token, counts)
        buffers = Buffers(x, layout.chunks)
        hidden_dim, dim = last.shape[-2:]
        grad = grad.contiguous()
        need_x, _, need_weights = needs
        grad_x_rows = x.new_empty(layout.rows + 1 if need_x else 0, dim)
        grad_row_weight = weight.new_zeros(layout.rows + 1)
        grad_weights = [torch.empty_like(w) if need_weights else w.new_empty(0) for w in (*first, last)]
        if need_weights:
            _zero_unused(grad_weights, counts)
        for chunk in layout.chunks:
            scale = layout.weight[chunk.rows].to(x.dtype).unsqueeze(-1)
            tokens = _gather(x, layout, chunk, buffers.get("x", chunk, dim))
            grads = _gather(grad, layout, chunk, buffers.get("grad", chunk, dim))
            pre = _first_products(call, tokens, first, chunk, kept, buffers, again=True)
            grad_hidden = by_weights(chunk.batches, grads, last.mT, buffers.get("grad_hidden", chunk, hidden_dim))
            hidden, grad_up = _hidden_again(call.activation, pre, grad_hidden, buffers, chunk)
            if need_weights:
                by_rows(chunk.batches, hidden, grads.mul_(scale), grad_weights[-1])
            grad_row_weight[:-1][chunk.rows] = hidden.mul_(grad_hidden).sum(dim=-1).to(weight.dtype)
            grad_pre = _pre_backward(call.activation, pre, grad_hidden, grad_up)
            if need_weights:
                tokens.mul_(scale)
                for which, part in enumerate(grad_pre):
                    by_rows(chunk.batches, tokens, part, grad_weights[which])
            if need_x:
                out = by_weights(chunk.batches, grad_pre[0], first[0].mT, grad_x_rows[chunk.rows])
                for part, matrix in zip(grad_pre[1:], first[1:], strict=True):
                    by_weights(chunk.batches, part, matrix.mT, out, add=True)
        grad_x = x.new_empty(0)
        if need_x:
            grad_x_rows[-1] = 0
            grad_x = _collect(call, grad_x_rows, weight, layout)
        return grad_x, grad_row_weight.index_select(0, layout.row), *grad_weights

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.call, ctx.needs, ctx.num_kept, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        """Of the gradients' gradients the plain operators take care."""
        call = ctx.call
        tensors = ctx.saved_tensors
        grad, x, weight, *rest = tensors
        tables, weights = rest[:4], rest[4 : 4 + ctx.num_kept + 1]

        def gradients(grad, x, weight, *weights):
            return _plain_backward(call, grad, x, weight, *tables, *weights)

        inputs = (x, weight, *weights)
        given = [g if g.shape == t.shape else torch.zeros_like(t) for g, t in zip(grads, inputs, strict=True)]
        second = torch.func.vjp(gradients, grad, x, weight, *weights)[1](tuple(given))
        return None, None, None, *second[:3], None, None, None, None, *second[3:], *([None] * ctx.num_kept)

    @staticmethod
    def vmap(info, in_dims, call, needs, num_kept, *tensors):
        number = 7 + num_kept + 1
        back = torch.vmap(partial(_plain_backward, call), in_dims[3 : 3 + number], randomness=info.randomness)
        return back(*tensors[:number]), (0,) * (num_kept + 3)


def _plain(call: Call, x, weight, row, assignment, token, counts, *weights):
    """The same with the operators of `dispatch` and `grouped`."""
    *first, last = weights
    num_rows = assignment.shape[0]
    experts = (last.shape[0],)
    plan = Plan(row, assignment, weight, token, call.choices, counts, call.setting.num_tokens, num_rows, experts)
    rows = dispatch(x, plan)
    hidden = call.activation.function(expert_matmul(rows, first[0], counts))
    for matrix in first[1:]:
        hidden = hidden * expert_matmul(rows, matrix, counts)
    return combine(expert_matmul(hidden, last, counts), plan)


def _plain_backward(call: Call, grad, x, weight, row, assignment, token, counts, *weights):
    """Gradients of x, weight and weights, by the operators of `_plain`."""

    def function(x, weight, *weights):
        return _plain(call, x, weight, row, assignment, token, counts, *weights)

    return torch.func.vjp(function, x, weight, *weights)[1](grad)


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
        out = kept[which][chunk.rows] if call.keep else buffers.get(f"pre{which}", chunk, matrix.shape[-1])
        if not (again and call.keep):
            by_weights(chunk.batches, tokens, matrix, out)
        products.append(out)
    return products


def _hidden(activation: Activation, pre: list[Tensor], out: Tensor) -> Tensor:
    """`act(pre[0])`, times `pre[1]` if gated, written into `out`."""
    activation.write(pre[0], out)
    return out.mul_(pre[1]) if len(pre) == 2 else out


def _hidden_again(
    activation: Activation, pre: list[Tensor], grad: Tensor, buffers: Buffers, chunk: Chunk
) -> tuple[Tensor, Tensor | None]:
    """The hidden layer anew, and for gated experts the gradient of `pre[1]`, which needs its factor."""
    hidden = buffers.get("hidden", chunk, grad.shape[-1])
    activation.write(pre[0], hidden)
    if len(pre) == 1:
        return hidden, None
    grad_up = torch.mul(hidden, grad, out=buffers.get("grad_up", chunk, grad.shape[-1]))
    return hidden.mul_(pre[1]), grad_up


def _pre_backward(activation: Activation, pre: list[Tensor], grad: Tensor, grad_up: Tensor | None) -> list[Tensor]:
    """Gradients of `pre` from that of the hidden layer, written over it."""
    if grad_up is None:
        activation.write_grad(grad, pre[0], grad)
        return [grad]
    activation.write_grad(grad.mul_(pre[1]), pre[0], grad)
    return [grad, grad_up]


def _collect(call: Call, rows: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Each token's weighted sum of padded rows `(rows + 1, d)`, the last of which is zeros."""
    if call.choices is None:
        token = torch.where(layout.weight == 0, call.setting.num_tokens, layout.token)
        return sum_rows(rows[:-1], layout.weight, token, layout.row, None, call.setting.num_tokens)
    if rows.dtype != weight.dtype:  # the sum is taken in float32
        return sum_rows(rows, weight, None, layout.row, call.choices, call.setting.num_tokens)
    table = layout.row.view(call.setting.num_tokens, call.choices)
    weights = weight.view(call.setting.num_tokens, call.choices)
    return F.embedding_bag(table, rows, per_sample_weights=weights, mode="sum")


def _zero_unused(gradients: list[Tensor], counts: Tensor) -> None:
    """Experts without rows have gradients of exactly 0."""
    unused = (counts == 0).nonzero().flatten()
    if unused.numel():
        for gradient in gradients:
            gradient.index_fill_(0, unused, 0)
