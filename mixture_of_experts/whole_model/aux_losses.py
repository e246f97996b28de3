"""Collects the auxiliary losses of layers inside a model that does not return them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.tracing import is_in_activation_checkpoint
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, ForwardWatch
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle, check_supported, find_routers

REENTRANT_ERROR = (
    "a {} runs under reentrant activation checkpointing, where its auxiliary loss would get no gradient; pass "
    "use_reentrant=False"
)


@contextmanager
def collect_aux(model: nn.Module, *, gates: GateSelection | None = None) -> Iterator[AuxLosses]:
    """Context manager that collects the auxiliary losses of all `MoE` and `HeirarchicalMoE` layers in `model`.

    Use this context manager for models whose blocks return only a layer's output and discard its loss. The context may
    enclose a single forward pass or the whole training run. `take()` returns the sum of the losses over all training
    forward passes since the last `take()`. Evaluation passes and passes that raised an error are not counted.

    Losses are collected only from forward passes in the thread that entered the context. Other threads may enter their
    own contexts, or run the model while the context is being entered. With `torch.compile`, enter the context before
    the first compiled call and keep it active for the whole run, so that a single graph serves all steps.

    Args:
        model: the module that you call.
        gates: the gates whose layers' losses are collected, as gate names, gate modules, or layers that contain gates.
            Default: all.

    Raises:
        ValueError: `model` has no gate.
        TypeError: a gate does not belong to an `MoE` or `HeirarchicalMoE` layer, because it is a standalone gate or a
            router from another library.
        RuntimeError: a forward pass would yield wrong losses, because a layer is called outside of `model` or runs
            under reentrant checkpointing. For checkpointing implementations other than torch's, the error is raised in
            the backward pass.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixture_of_experts import MoE, OutputOnly, collect_aux
        >>> model = nn.Sequential(*(OutputOnly(MoE(dim=8, num_experts=4)) for _ in range(2)))
        >>> with collect_aux(model) as aux:
        ...     out = model(torch.randn(2, 16, 8))
        >>> loss = out.square().mean() + aux.take()
    """
    routers = check_supported(find_routers(model, "collect_aux", gates), "collect_aux", aux_loss_unsupported_reason)
    layers = dict.fromkeys(one.layer for router in routers for one in router.locations if one.layer is not None)
    aux = AuxLosses()
    collecting = AuxLossCollector(aux)
    with Attachments() as hooks:
        for layer in layers:
            hooks.add_forward_hook(layer, collecting.collect_layer_loss)
        collecting.attach_to(model, hooks)
        with call_stack.activate_calls([(aux, ForwardCall())]):
            yield aux


def aux_loss_unsupported_reason(router: RouterHandle) -> str | None:
    """Return why a router's auxiliary loss cannot be collected, or None if it can."""
    if router.external is not None:
        return f"its block returns no auxiliary loss; {router.external.aux_loss_remedy}"
    alone = all(location.layer is None for location in router.locations)
    return "it is not part of an MoE layer, so its caller gets its losses" if alone else None


@dataclass(eq=False)
class AuxCall(ForwardCall):
    """An ongoing forward pass of the model that was passed to `collect_aux`."""

    training: bool
    enclosing_call: AuxCall | None  # the enclosing forward pass of the same model
    losses: list[Tensor] = field(default_factory=list)


def sum_losses(losses: list[Tensor]) -> Tensor:
    """Return the sum of the losses on the device of the first loss."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


class AuxLosses:
    """The losses that `collect_aux` has collected."""

    def __init__(self) -> None:
        self._training: list[Tensor] = []
        self._evaluation: list[Tensor] = []  # losses of the last forward pass

    def take(self) -> Tensor:
        """Return the sum of all layers' auxiliary losses over all training passes since the last call, as a 0-dim
        tensor.

        A training pass is a forward pass in training mode with gradients enabled. If there was no training pass, the
        sum for the last evaluation pass is returned. If there was no forward pass at all, a RuntimeError is raised.
        """
        losses = self._training or self._evaluation
        if not losses:
            raise RuntimeError(
                "no auxiliary loss was collected. Call the model that was passed to collect_aux inside the context and "
                "in its thread, and then call take() once. If the model was compiled and called before, its graph has "
                "no hooks; enter collect_aux before the first compiled call"
            )
        total = sum_losses(losses)
        self._training.clear()
        self._evaluation = []
        return total


class AuxLossCollector(ForwardWatch):
    """Collects the losses of layers into `aux` during forward passes of the model."""

    def __init__(self, aux: AuxLosses) -> None:
        super().__init__(owner=aux)
        self.aux = aux
        self.layers_without_grad: set[nn.Module] = set()  # set in the last training forward pass

    def make_call(self, module: nn.Module, args: object, kwargs: object) -> AuxCall:
        return AuxCall(module.training and torch.is_grad_enabled(), call_stack.current_call(self))

    def on_success(self, call: AuxCall, output: object) -> None:
        if call.enclosing_call is not None and call.enclosing_call.training == call.training:
            call.enclosing_call.losses.extend(call.losses)
        elif call.training:
            self.aux._training.extend(call.losses)
        else:
            self.aux._evaluation = call.losses

    def collect_layer_loss(self, layer: nn.Module, args: object, output: Any) -> None:
        """Forward hook that collects a layer's loss."""
        call = call_stack.current_call(self)
        if call is None:
            if torch.compiler.is_compiling():
                return  # a recomputation
            if call_stack.current_call(self.aux) is None:  # called in another thread or in a recomputation
                if layer in self.layers_without_grad and torch.is_grad_enabled():
                    raise RuntimeError(REENTRANT_ERROR.format(type(layer).__name__))
                return
            if not layer.training or not torch.is_grad_enabled():
                return  # this is not a training pass
            raise RuntimeError(
                f"a {type(layer).__name__} ran outside a forward pass of the module passed to collect_aux; pass the "
                "module that you actually call"
            )
        if not (isinstance(output, tuple) and len(output) > 1):
            raise TypeError(
                f"expected {type(layer).__name__} to return (output, auxiliary loss), but got {type(output).__name__}; "
                "drop the loss in a module that wraps the layer, not in a subclass"
            )
        check_not_reentrant(layer)
        if not torch.compiler.is_compiling():
            runs_without_grad = call.training and not torch.is_grad_enabled()
            (self.layers_without_grad.add if runs_without_grad else self.layers_without_grad.discard)(layer)
        call.losses.append(output[1])


def check_not_reentrant(layer: nn.Module, is_checkpointed: bool = False) -> None:
    """Raise a RuntimeError under reentrant checkpointing, because its first run disables gradients and the loss would
    have no gradient.

    Args:
        is_checkpointed: whether the layer is known to run under any implementation of activation checkpointing.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not layer.training:
        return
    if is_checkpointed or is_in_activation_checkpoint():
        raise RuntimeError(REENTRANT_ERROR.format(type(layer).__name__))
