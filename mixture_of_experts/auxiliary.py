"""Auxiliary losses of layers that lie deep in a model: collected, where the model does not hand them up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.tracing import in_checkpoint


@contextmanager
def collect_aux(model: nn.Module) -> Iterator[AuxLosses]:
    """Collect the auxiliary losses of all `MoE` and `HeirarchicalMoE` layers in `model`, while the context lasts.

    For models whose blocks return the output of a layer alone. Around one forward, or around the whole training:
    `take()` gives the losses of the forwards since it was called last. With `torch.compile`, around the whole training
    and entered before the first compiled call, so that one graph serves all steps.

    Args:
        model: the module that you call.

    Raises:
        ValueError: the model has no such layer.
        RuntimeError: in a forward, where its losses could not be right: a layer within reentrant checkpointing, whose
            first run has no graph; a `model` that itself runs inside `torch.utils.checkpoint`; a layer that is called,
            but not through `model`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixture_of_experts import MoE, collect_aux
        >>> class FeedForward(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.moe = MoE(dim=8, num_experts=4)
        ...
        ...     def forward(self, x):
        ...         return self.moe(x)[0]
        >>> model = nn.Sequential(FeedForward(), FeedForward())
        >>> with collect_aux(model) as aux:
        ...     out = model(torch.randn(2, 16, 8))
        >>> loss = out.square().mean() + aux.take()
    """
    layers = [module for module in model.modules() if isinstance(module, MoE | HeirarchicalMoE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer: give collect_aux a model that has some")
    aux = AuxLosses()
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(aux._collect).remove)
        hooks.callback(model.register_forward_pre_hook(aux._enter).remove)
        # last, so that it runs after the hook of a model that is itself a layer
        hooks.callback(model.register_forward_hook(aux._leave, always_call=True).remove)
        yield aux


class AuxLosses:
    """What `collect_aux` collected."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._under_way: bool | None = None  # a forward of the model; None: there was none yet

    def take(self) -> Tensor:
        """The sum, 0-dim, of the auxiliary losses of all layers, in all forwards since the last call."""
        if not self._losses:
            raise RuntimeError(
                "no auxiliary loss was collected: call the model that was given to collect_aux inside the context, "
                "then take() once. If it was compiled and called before, its graph has no hooks: enter collect_aux "
                "before the first compiled call"
            )
        total = self._losses[0]
        for loss in self._losses[1:]:
            total = total + loss.to(total.device)
        self._losses.clear()
        return total

    def _enter(self, model: nn.Module, args: object) -> None:
        if not torch.compiler.is_compiling() and model.training and in_checkpoint():
            raise RuntimeError(
                f"the {type(model).__name__} given to collect_aux itself runs inside torch.utils.checkpoint, where a "
                "recomputation looks like any other forward: give collect_aux the module that calls the checkpoint"
            )
        self._under_way = True

    def _leave(self, model: nn.Module, args: object, output: object) -> None:
        self._under_way = False

    def _collect(self, layer: nn.Module, args: object, output: Any) -> None:
        if self._under_way is None:
            raise RuntimeError(
                f"a {type(layer).__name__} ran, but not within a forward of the module given to collect_aux: give it "
                "the module that you call"
            )
        if not self._under_way:
            return  # a recomputation in backward
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                f"{type(layer).__name__} must return (output, auxiliary loss) to be collected, got "
                f"{type(output).__name__}: let a module around the layer, not a subclass, drop the loss"
            )
        refuse_reentrant(layer)
        self._losses.append(output[1])


def refuse_reentrant(layer: nn.Module) -> None:
    """The first run under reentrant checkpointing has no graph, and the second comes when the loss is long known."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not layer.training:
        return
    if in_checkpoint():
        raise RuntimeError(
            f"a {type(layer).__name__} runs under reentrant activation checkpointing, where its auxiliary loss would "
            "get no gradient: pass use_reentrant=False"
        )
