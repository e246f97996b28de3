"""A whole call as one `torch.autograd.Function`, for the implementations that compute their own gradients.

Axes: t tokens, a assignments, d model dim, o dim of the outputs.

It saves tensors where saved-tensor hooks see them, and turns autocast off. Second derivatives and batched gradients are
computed by the definition, `plain.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.plan import Plan
from mixture_of_experts.ops import plain
from mixture_of_experts.ops.network import Network
from mixture_of_experts.support.private_torch import is_functorch_wrapped
from mixture_of_experts.support.tracing import disable_autocast

SavedTensors = Sequence[Tensor | None]


class FFNGradients(NamedTuple):
    """Gradients of a call.

    Attributes:
        x: `(t, d)`, gradient of the tokens; None if it is not wanted.
        weight: `(a,)`, gradient of the assignments' weights.
        network: the wanted gradients of the experts' weights, by the names of `Network.tensors`.
    """

    x: Tensor | None
    weight: Tensor | None
    network: dict[str, Tensor]


# An implementation's own computation of outputs and gradients. `forward(x, plan, network, save)` returns the outputs
# `(t, o)` of tokens x `(t, d)`, and the tensors that the backward needs (none unless `save`).
# `backward(x, plan, network, saved, grad, wanted)` receives these and `grad` `(t, o)`, the gradient of the outputs;
# `wanted` contains "x" and names of `Network.tensors`. The gradient of the assignments' weights is always computed.
ForwardFunction = Callable[[Tensor, Plan, Network, bool], tuple[Tensor, SavedTensors]]
BackwardFunction = Callable[[Tensor, Plan, Network, SavedTensors, Tensor, Collection[str]], FFNGradients]


def run_differentiable(
    forward: ForwardFunction, backward: BackwardFunction, x: Tensor, plan: Plan, network: Network
) -> Tensor:
    """Outputs `(t, o)` of tokens x `(t, d)` by an implementation's own `forward` and `backward`, differentiable with
    respect to `x`, `plan.weight` and all tensors of the network."""
    weights = network.tensors().values()
    with disable_autocast(x.device):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, plan.weight, *weights)):
            return _RoutedFFN.apply(forward, backward, plan, network, x, plan.weight, *weights)
        return forward(x, plan, network, False)[0]


def select_tables_to_save(plan: Plan) -> dict[str, Tensor]:
    """The tensors of a plan to save, by name; on a CPU all of them, as packing them takes too long there."""
    return plan.tensors() if plan.row.device.type == "cpu" else plan.tensors_to_save()


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        forward: ForwardFunction,
        backward: BackwardFunction,
        plan: Plan,
        network: Network,
        x: Tensor,
        weight: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        names = list(network.tensors())
        plan, network = plan._replace(weight=weight), network.with_tensors(dict(zip(names, weights, strict=True)))
        out, saved = forward(x, plan, network, True)
        tables = select_tables_to_save(plan)
        ctx.computed_backward, ctx.plan, ctx.network = backward, plan.without_tensors(), network.with_tensors({})
        ctx.tables, ctx.names = list(tables), names
        ctx.save_for_backward(x, *tables.values(), *weights, *saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = iter(ctx.saved_tensors)
        x = next(tensors)
        plan: Plan = ctx.plan.from_saved({name: next(tensors) for name in ctx.tables})
        network: Network = ctx.network.with_tensors({name: next(tensors) for name in ctx.names})
        if torch.is_grad_enabled() or is_functorch_wrapped(grad):  # second derivatives, or batched gradients
            return *4 * [None], *plain.compute_gradients(x, plan, network, grad)
        need_x, need_weight, *needs = ctx.needs_input_grad[4:]
        wanted = {name for name, needed in zip(["x", *ctx.names], [need_x, *needs], strict=True) if needed}
        with disable_autocast(x.device):
            grads = ctx.computed_backward(x, plan, network, list(tensors), grad, wanted)
        of_weights = [grads.network[name] if name in wanted else None for name in ctx.names]
        return *4 * [None], grads.x if need_x else None, grads.weight if need_weight else None, *of_weights
