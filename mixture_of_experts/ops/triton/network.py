"""A routed feed-forward network by the kernels, with its gradient: keeps the tokens and the pre-activations only."""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Plan
from mixture_of_experts.ops import plain
from mixture_of_experts.ops.call import Call, Network
from mixture_of_experts.ops.triton.form import Form, form_of
from mixture_of_experts.ops.triton.operators import Operands, triton_ffn, triton_ffn_backward
from mixture_of_experts.ops.triton.plan import plan_of
from mixture_of_experts.tracing import is_wrapped


def run(call: Call) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`; capacity too is rows without gaps, so that empty slots cost nothing."""
    return compute(call.x, plan_of(call.decision), call.network)


def compute(x: Tensor, plan: Plan, network: Network) -> Tensor:
    form = form_of(network)
    assert form is not None
    weights = network.tensors()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, plan.weight, *weights)):
        return _Network.apply(plan, network, form, x, plan.weight, *weights)
    return triton_ffn(*operands(x, plan, network), *form, False)[0]


def operands(x: Tensor, plan: Plan, network: Network) -> Operands:
    assert plan.counts is not None
    tables = (plan.weight, *readable(plan), plan.row, plan.counts)
    b_in = [bias for bias in network.b_in if bias is not None]
    return Operands(x, *tables, plan.choices or 0, list(network.w_in), network.w_out, b_in, network.b_out)


def readable(plan: Plan) -> tuple[Tensor, Tensor]:
    """Token and assignment of each row, which kernels read for every row of an expert.

    With limited slots a choice of weight 0 holds a row and is not computed: of the tables of two levels and of expert
    choice the row is nobody's. It gets some token and, as its weight has to be 0, a choice whose weight that is.
    """
    number = plan.weight.shape[0]
    if number == 0 or (plan.choices is not None and len(plan.num_experts) == 1):
        return plan.token, plan.assignment
    assert plan.counts is not None
    of_experts = torch.arange(plan.num_rows, device=plan.row.device) < plan.counts.sum()
    nobodys = of_experts & (plan.assignment == number)
    unused = (plan.weight != 0).to(torch.int8).argmin()
    return plan.token.masked_fill(nobodys, 0), torch.where(nobodys, unused, plan.assignment)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, network: Network, form: Form, x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        plan, network = plan._replace(weight=weight), network.filled(weights)
        out, pre = triton_ffn(*operands(x, plan, network), *form, True)
        ctx.settings = plan[5:], network.map(id), form  # no tensors: those are saved
        ctx.save_for_backward(x, *plan[:5], *weights, pre)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        of_plan, network, form = ctx.settings
        x, *tensors, pre = ctx.saved_tensors
        plan, network = Plan(*tensors[:5], *of_plan), network.filled(tensors[5:])
        if torch.is_grad_enabled() or is_wrapped(grad):  # gradients of the gradients, or many gradients at once
            return None, None, None, *plain.gradients(plan, network, grad, x)
        need_x, need_weight, *needs = ctx.needs_input_grad[3:]
        number, biases = len(network.w_in), len([bias for bias in network.b_in if bias is not None])
        need_in = any(needs[:number]) or any(needs[number + 1 : number + 1 + biases])
        need_out = needs[number] or any(needs[number + 1 + biases :])
        grads = triton_ffn_backward(grad, pre, *operands(x, plan, network), *form, need_x, need_in, need_out)
        wanted = zip(grads, (need_x, need_weight, *needs), strict=True)
        return None, None, None, *(gradient if need else None for gradient, need in wanted)
