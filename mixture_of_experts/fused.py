"""Dispatch, experts and combine of a whole call in one autograd.Function, for the CPU.

Axes: t tokens, a assignments, r rows, e experts, d model dim, h hidden dim.

On a CPU fresh memory costs as much as arithmetic: a new page is about a microsecond. So tokens are gathered to where
the results will be, what is in between lies in buffers that are used again for every chunk of experts, activations are
written in place, and only the products with the first weights are kept for the backward (the input is there anyway).
The backward gathers anew and computes the activation anew. The weight of an assignment is applied where a row is
d wide, not h wide, and its gradient is read off the hidden layer, so that no row of outputs is kept
(as SonicMoE, arXiv 2512.14080).

The result is that of `combine(experts(dispatch(x)))`, which is also what runs under vmap and in a double backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.activations import Activation, find_activation
from mixture_of_experts.batches import Rows, by_rows, by_weights, takes_steps
from mixture_of_experts.chunks import Layout, Setting, Tables, lay_out
from mixture_of_experts.dispatch import Plan, combine, dispatch, sum_rows
from mixture_of_experts.grouped import expert_matmul

T = TypeVar("T")


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


ASSIGNMENT, TOKEN = 3, 4  # where these stand among the tensors of a call


class _Fused(torch.autograd.Function):
    """Returns the tokens' outputs `(t, d)`, and what is kept for the backward."""

    @staticmethod
    def forward(call: Call, *tensors):  # a short signature: torch binds it anew for every call
        x, weight, row, assignment, token, counts, *first, last = tensors
        layout = lay_out(call.setting, weight, row, assignment, token, counts)
        hidden_dim, dim = last.shape[-2:]
        kept = [x.new_empty(layout.rows if call.keep else 0, hidden_dim) for _ in first]
        y = x.new_empty(layout.rows + 1, dim)
        y[-1] = 0
        rows = layout.parts(y[:-1])  # tokens first, and then in their place the results
        pre = _first_rows(call, layout, kept, x, hidden_dim)
        hidden = layout.buffer(x, hidden_dim) if call.keep else [part[0] for part in pre]
        matrices, second = _by_chunk(map(layout.matrices, first)), layout.matrices(last)
        for i, tables in enumerate(layout.tables()):
            _gather(x, tables, rows[i])
            _first_products(rows[i], matrices[i], pre[i])
            _hidden(call.activation, pre[i], hidden[i])
            by_weights(hidden[i], second[i], rows[i])
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
        hidden_dim, dim = last.shape[-2:]
        grad = grad.contiguous()
        need_x, _, need_weights = needs
        grad_x_rows = x.new_empty(layout.rows + 1 if need_x else 0, dim)
        grad_row_weight = weight.new_zeros(layout.rows + 1)
        grad_weights = [torch.empty_like(w) if need_weights else w.new_empty(0) for w in (*first, last)]
        if need_weights:
            _zero_unused(grad_weights, counts)
        tokens, hidden = (layout.buffer(x, width) for width in (dim, hidden_dim))
        pre = _first_rows(call, layout, kept, x, hidden_dim)
        grad_pre = _by_chunk(layout.buffer(x, hidden_dim) for _ in first)
        matrices = _by_chunk([] if call.keep else map(layout.matrices, first))
        transposed, second = _by_chunk(layout.matrices(w.mT) for w in first), layout.matrices(last.mT)
        *grad_first, grad_last = map(layout.matrices, grad_weights) if need_weights else [[]]
        grad_first = _by_chunk(grad_first)
        # no product may read a chunk's gradients of rows once those of its tokens are written over them
        grads = grad_tokens = layout.parts(grad_x_rows[:-1]) if need_x else layout.buffer(x, dim)
        sums = layout.split(grad_row_weight[:-1])
        scale = layout.split(layout.weight.to(x.dtype).unsqueeze(-1)) if need_weights else []
        for i, tables in enumerate(layout.tables()):
            _gather(x, tables, tokens[i])
            _gather(grad, tables, grads[i])
            if not call.keep:
                _first_products(tokens[i], matrices[i], pre[i])
            by_weights(grads[i], second[i], grad_pre[i][0])
            _hidden_again(call.activation, pre[i], grad_pre[i], hidden[i])
            if need_weights:
                grads[i].all.mul_(scale[i])
                by_rows(hidden[i], grads[i], grad_last[i])
            sums[i].copy_(hidden[i].all.mul_(grad_pre[i][0].all).sum(dim=-1))
            _pre_backward(call.activation, pre[i], grad_pre[i])
            if need_weights:
                tokens[i].all.mul_(scale[i])
                for part, result in zip(grad_pre[i], grad_first[i], strict=True):
                    by_rows(tokens[i], part, result)
            if need_x:
                for which, (part, weights) in enumerate(zip(grad_pre[i], transposed[i], strict=True)):
                    by_weights(part, weights, grad_tokens[i], add=which > 0)
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


def _by_chunk(columns: Iterable[Sequence[T]]) -> list[tuple[T, ...]]:
    """Of what every one of the first weights has for each chunk: what each chunk has for every one of them."""
    return list(zip(*columns, strict=True))


def _first_rows(
    call: Call, layout: Layout, kept: Sequence[Tensor], x: Tensor, hidden_dim: int
) -> list[tuple[Rows, ...]]:
    """Rows of each chunk for the products with the first weights: kept ones, or buffers."""
    return _by_chunk(layout.parts(rows) if call.keep else layout.buffer(x, hidden_dim) for rows in kept)


def _gather(x: Tensor, tables: Tables, out: Rows) -> None:
    """Tokens of a chunk's rows, zeros where a row is empty."""
    torch.index_select(x, 0, tables.token, out=out.all)
    if tables.empty is not None:
        out.all.masked_fill_(tables.empty, 0)


def _first_products(tokens: Rows, first: Sequence[list[Tensor]], out: Sequence[Rows]) -> None:
    """Products with each of the first weights."""
    for weights, rows in zip(first, out, strict=True):
        by_weights(tokens, weights, rows)


def _hidden(activation: Activation, pre: Sequence[Rows], out: Rows) -> None:
    """`act(pre[0])`, times `pre[1]` if gated."""
    activation.write(pre[0].all, out.all)
    if len(pre) == 2:
        out.all.mul_(pre[1].all)


def _hidden_again(activation: Activation, pre: Sequence[Rows], grads: Sequence[Rows], out: Rows) -> None:
    """The hidden layer anew, and for gated experts the gradient of `pre[1]`, which needs its factor.

    `grads[0]` is the gradient of the hidden layer.
    """
    activation.write(pre[0].all, out.all)
    if len(pre) == 2:
        torch.mul(out.all, grads[0].all, out=grads[1].all)
        out.all.mul_(pre[1].all)


def _pre_backward(activation: Activation, pre: Sequence[Rows], grads: Sequence[Rows]) -> None:
    """The gradient of `pre[0]`, written over that of the hidden layer, `grads[0]`."""
    grad = grads[0].all.mul_(pre[1].all) if len(pre) == 2 else grads[0].all
    activation.write_grad(grad, pre[0].all, grad)


def _collect(call: Call, rows: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Each token's weighted sum of padded rows `(rows + 1, d)`, the last of which is zeros."""
    if call.choices is None:
        token = torch.where(layout.weight == 0, call.setting.num_tokens, layout.token)
        return sum_rows(rows[:-1], layout.weight, token, layout.row, None, call.setting.num_tokens)
    if rows.dtype != weight.dtype:  # the sum is taken in float32
        return sum_rows(rows, weight, None, layout.row, call.choices, call.setting.num_tokens)
    table = layout.row.view(call.setting.num_tokens, call.choices)
    weights = weight.detach().view(call.setting.num_tokens, call.choices)  # else torch prepares for a backward
    return F.embedding_bag(table, rows, per_sample_weights=weights, mode="sum")


def _zero_unused(gradients: list[Tensor], counts: Tensor) -> None:
    """Experts without rows have gradients of exactly 0."""
    unused = (counts == 0).nonzero().flatten()
    if unused.numel():
        for gradient in gradients:
            gradient.index_fill_(0, unused, 0)
