"""A whole call as one function of autograd, for the ways that compute their own gradients.

Axes: t tokens, a assignments, d model dim, o dim of the outputs.

A `Way` computes outputs and gradients. All of them need the same around that: tensors are saved where hooks on saved
tensors see them, second derivatives and many gradients at once are those of the definition, and autocast is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Plan
from mixture_of_experts.ops import plain
from mixture_of_experts.ops.call import Network
from mixture_of_experts.tracing import is_wrapped, without_autocast

Kept = Sequence[Any]  # tensors, and None
Gradients = tuple[Tensor | None, Tensor | None, Network]  # of x, of the assignments' weights and of the experts'


class Wanted(NamedTuple):
    """Which gradients are wanted, apart from that of the assignments' weights, which costs next to nothing.

    Attributes:
        x: whether that of the tokens is.
        network: the tensors whose gradients are, None where not.
    """

    x: bool
    network: Network


class Way(Protocol):
    """How outputs and gradients are computed; both are given the same x, plan and network."""

    def forward(self, x: Tensor, plan: Plan, network: Network, keep: bool) -> tuple[Tensor, Kept]:
        """Tokens `(t, d)` to `(t, o)`, and what `gradients` needs of that, if it is to `keep` it."""
        ...

    def gradients(self, x: Tensor, plan: Plan, network: Network, kept: Kept, grad: Tensor, wanted: Wanted) -> Gradients:
        """Gradients, given that of the outputs `(t, o)`; those that are not wanted may be anything."""
        ...


def run(way: Way, x: Tensor, plan: Plan, network: Network) -> Tensor:
    """Tokens `(t, d)` to `(t, o)`, differentiable in x, `plan.weight` and all tensors of the network."""
    weights = network.tensors()
    with without_autocast(x.device):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, plan.weight, *weights)):
            return _Call.apply(way, plan, network, x, plan.weight, *weights)
        return way.forward(x, plan, network, keep=False)[0]


def packed(plan: Plan) -> Plan:
    """What is kept of a plan: on a CPU all, where packing costs more time than its bytes are worth."""
    return plan if plan.row.device.type == "cpu" else plan.packed()


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way: Way, plan: Plan, network: Network, x: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        plan, network = plan._replace(weight=weight), network.filled(weights)
        out, kept = way.forward(x, plan, network, keep=True)
        # of plan and network no tensors: those are saved
        ctx.settings = way, plan[5:], network.map(lambda _: True), len(weights)
        ctx.save_for_backward(x, *packed(plan)[:5], *weights, *kept)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        way, of_plan, network, number = ctx.settings
        x, *tensors = ctx.saved_tensors
        plan, weights, kept = Plan(*tensors[:5], *of_plan).unpacked(), tensors[5 : 5 + number], tensors[5 + number :]
        network = network.filled(weights)
        if torch.is_grad_enabled() or is_wrapped(grad):  # gradients of the gradients, or many gradients at once
            return None, None, None, *plain.gradients(x, plan, network, grad)
        need_x, need_weight, *needs = ctx.needs_input_grad[3:]
        needed = iter(needs)
        wanted = Wanted(need_x, network.map(lambda tensor: tensor if next(needed) else None))
        with without_autocast(x.device):
            grad_x, grad_weight, grads = way.gradients(x, plan, network, kept, grad, wanted)
        there = zip(network.fields(), wanted.network.fields(), grads.fields(), strict=True)
        of_weights = [gradient if want is not None else None for tensor, want, gradient in there if tensor is not None]
        return None, None, None, grad_x if need_x else None, grad_weight if need_weight else None, *of_weights
