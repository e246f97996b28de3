"""Collects the auxiliary losses of layers that lie deep in a model, where the model does not return them."""

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
    "a {} runs under reentrant activation checkpointing, where its auxiliary loss would get no gradient: pass "
    "use_reentrant=False"
)


@contextmanager
def collect_aux(model: nn.Module, *, gates: GateSelection | None = None) -> Iterator[AuxLosses]:
    """Collect the auxiliary losses of all `MoE` and `HeirarchicalMoE` layers in `model`, while the context lasts.

    It serves models whose blocks return the output of a layer and drop its loss. The context lies around one forward
    or around the whole training. `take()` returns the sum for all training forwards since its last call; evaluation
    forwards between them, and forwards that raised, do not count.

    Only forwards of the thread that entered the context are collected; another thread may enter one of its own. You may
    enter it while other threads run the model. With `torch.compile` enter it before the first
    compiled call and keep it for the whole training: one graph then serves all steps.

    Args:
        model: the module that you call.
        gates: gates of the layers to collect from, by their names or as modules (gates, or layers around them); by
            default all.

    Raises:
        ValueError: the model has no gate.
        TypeError: a gate is in no such layer: a router of `transformers`, or a gate that stands alone.
        RuntimeError: in a forward whose losses would be wrong: a layer is called, but not through `model`; a layer runs
            under reentrant checkpointing (of another implementation than torch's: in its backward).

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
    """Why no auxiliary loss of a site can be collected; None if it can."""
    if router.is_external:
        return (
            "its block returns no auxiliary loss. Call the model with output_router_logits=True and its own loss has "
            "one, or convert the block with from_transformers"
        )
    alone = all(location.layer is None for location in router.locations)
    return "it stands in no MoE layer, so its caller has its losses" if alone else None


@dataclass(eq=False)
class AuxCall(ForwardCall):
    """A forward, under way, of the model that was given to `collect_aux`."""

    training: bool
    enclosing_call: AuxCall | None  # the forward of the same model within which this one runs
    losses: list[Tensor] = field(default_factory=list)


def sum_losses(losses: list[Tensor]) -> Tensor:
    """The sum of losses, on the device of the first one."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


class AuxLosses:
    """The losses that `collect_aux` collected."""

    def __init__(self) -> None:
        self._training: list[Tensor] = []
        self._evaluation: list[Tensor] = []  # of the last forward

    def take(self) -> Tensor:
        """The sum, 0-dim, of the auxiliary losses of all layers, over all training forwards since the last call.

        A training forward runs in training mode with gradients enabled. Without one, the sum is that of the last
        evaluation forward; without any forward, RuntimeError is raised.
        """
        losses = self._training or self._evaluation
        if not losses:
            raise RuntimeError(
                "no auxiliary loss was collected: call the model that was given to collect_aux inside the context and "
                "in its thread, then take() once. If it was compiled and called before, its graph has no hooks: enter "
                "collect_aux before the first compiled call"
            )
        total = sum_losses(losses)
        self._training.clear()
        self._evaluation = []
        return total


class AuxLossCollector(ForwardWatch):
    """Collects losses of layers in forwards of the model, for `aux`."""

    def __init__(self, aux: AuxLosses) -> None:
        super().__init__(owner=aux)
        self.aux = aux
        self.layers_without_grad: set[nn.Module] = set()  # layers that last ran so, in a forward with gradients

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
        """Forward hook of a layer."""
        call = call_stack.current_call(self)
        if call is None:
            if torch.compiler.is_compiling():
                return  # a recomputation
            if call_stack.current_call(self.aux) is None:  # another thread, or a recomputation in a backward
                if layer in self.layers_without_grad and torch.is_grad_enabled():
                    raise RuntimeError(REENTRANT_ERROR.format(type(layer).__name__))
                return
            if not layer.training or not torch.is_grad_enabled():
                return  # a forward that does not train
            raise RuntimeError(
                f"a {type(layer).__name__} ran, but not within a forward of the module given to collect_aux: give "
                "collect_aux the module that you call"
            )
        if not (isinstance(output, tuple) and len(output) > 1):
            raise TypeError(
                f"{type(layer).__name__} must return (output, auxiliary loss) to be collected, got "
                f"{type(output).__name__}: let a module around the layer, not a subclass, drop the loss"
            )
        check_not_reentrant(layer)
        if not torch.compiler.is_compiling():
            runs_without_grad = call.training and not torch.is_grad_enabled()
            (self.layers_without_grad.add if runs_without_grad else self.layers_without_grad.discard)(layer)
        call.losses.append(output[1])


def check_not_reentrant(layer: nn.Module, is_checkpointed: bool = False) -> None:
    """Refuse reentrant checkpointing: gradients are off in its first run, so the loss would have none.

    Args:
        checkpointed: whether the layer is known to run under activation checkpointing, of whatever implementation.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not layer.training:
        return
    if is_checkpointed or is_in_activation_checkpoint():
        raise RuntimeError(REENTRANT_ERROR.format(type(layer).__name__))
