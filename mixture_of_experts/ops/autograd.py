"""Wraps a whole call in a single `torch.autograd.Function`, for implementations that compute their own gradients.

Axes: t (tokens), a (assignments), d (model dimension), o (output dimension).

Tensors are saved with `save_for_backward`, so that saved-tensor hooks apply. Autocast is disabled in the forward and
backward passes. The reference implementation, `plain.py`, computes second derivatives and batched gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.ops import plain
from mixture_of_experts.ops.network import Network
from mixture_of_experts.support.private_torch import is_functorch_wrapped
from mixture_of_experts.support.tracing import disable_autocast

SavedTensors = Sequence[Tensor | None]


class FFNGradients(NamedTuple):
    """The gradients of a call.

    Attributes:
        x: gradient of the tokens, `(t, d)`, or None if it is not requested.
        weight: gradient of the assignment weights, `(a,)`.
        network: the requested gradients of the expert weights, with the same names as in `Network.tensors`.
    """

    x: Tensor | None
    weight: Tensor | None
    network: dict[str, Tensor]


# Functions that an implementation uses to compute outputs and gradients. `forward(x, permutation, network, save)`
# returns the outputs `(t, o)` for tokens x `(t, d)`, and the tensors that the backward pass needs (none unless `save`
# is set). `backward(x, permutation, network, saved, grad, wanted)` receives these tensors and the gradient of the
# outputs, `grad` `(t, o)`. `wanted` may contain "x" and names from `Network.tensors`. The gradient of the assignment
# weights is always computed.
ForwardFunction = Callable[[Tensor, Permutation, Network, bool], tuple[Tensor, SavedTensors]]
BackwardFunction = Callable[[Tensor, Permutation, Network, SavedTensors, Tensor, Collection[str]], FFNGradients]


def run_differentiable(
    forward: ForwardFunction, backward: BackwardFunction, x: Tensor, permutation: Permutation, network: Network
) -> Tensor:
    """Compute the outputs `(t, o)` for tokens x `(t, d)` with an implementation's `forward` and `backward` functions.

    The outputs are differentiable with respect to `x`, `permutation.weight` and all tensors of the network.
    """
    weights = network.tensors().values()
    with disable_autocast(x.device):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, permutation.weight, *weights)):
            return _RoutedFFN.apply(forward, backward, permutation, network, x, permutation.weight, *weights)
        return forward(x, permutation, network, False)[0]


def select_tables_to_save(permutation: Permutation) -> dict[str, Tensor]:
    """Return the tensors of a permutation that must be saved, keyed by name. On a CPU, all tensors are saved, because
    packing them would take too long."""
    return permutation.tensors() if permutation.row.device.type == "cpu" else permutation.tensors_to_save()


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        compute_forward: ForwardFunction,
        compute_backward: BackwardFunction,
        permutation: Permutation,
        network: Network,
        x: Tensor,
        weight: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        names = list(network.tensors())
        permutation = permutation._replace(weight=weight)
        network = network.with_tensors(dict(zip(names, weights, strict=True)))
        out, saved = compute_forward(x, permutation, network, True)
        tables = select_tables_to_save(permutation)
        ctx.compute_backward = compute_backward
        ctx.permutation, ctx.network = permutation.without_tensors(), network.with_tensors({})
        ctx.tables, ctx.names = list(tables), names
        ctx.save_for_backward(x, *tables.values(), *weights, *saved)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors = iter(ctx.saved_tensors)
        x = next(tensors)
        permutation: Permutation = ctx.permutation.from_saved({name: next(tensors) for name in ctx.tables})
        network: Network = ctx.network.with_tensors({name: next(tensors) for name in ctx.names})
        if torch.is_grad_enabled() or is_functorch_wrapped(grad):  # needed for second derivatives or batched gradients
            return *4 * [None], *plain.compute_gradients(x, permutation, network, grad)
        need_x, need_weight, *needs = ctx.needs_input_grad[4:]
        wanted = {name for name, needed in zip(["x", *ctx.names], [need_x, *needs], strict=True) if needed}
        with disable_autocast(x.device):
            grads = ctx.compute_backward(x, permutation, network, list(tensors), grad, wanted)
        of_weights = [grads.network[name] if name in wanted else None for name in ctx.names]
        return *4 * [None], grads.x if need_x else None, grads.weight if need_weight else None, *of_weights
