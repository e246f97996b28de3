"""Brings mask and token ids from a model's arguments to its feed-forward networks, and their losses back.

Hooks keep a `ModelCall` under way during a forward. They are set on the model that was changed, and on the nearest
models around its networks (for example an encoder and a decoder). Activation checkpointing runs layers again after the
forward: the function that it runs is wrapped, so that it has the call of that forward.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts import under_way
from mixture_of_experts.huggingface.feed_forward import ModelCall, feed_forwards
from mixture_of_experts.huggingface.torch_layers import KINDS, LayerReader
from mixture_of_experts.model_tokens import TokensAround, TokensReader, model_around


class LastCall(threading.local):
    """The last outermost call that ended, separately for each thread. A copy of a model starts without one."""

    box: list[ModelCall]

    def __init__(self) -> None:
        self.box = [ModelCall()]  # a list, as torch.compile cannot set an attribute here

    def __reduce__(self) -> tuple[type[LastCall], tuple[()]]:
        return LastCall, ()


def bring_mask(model: nn.Module, names: Sequence[str]) -> None:
    """Set the hooks on a model, and on the models around the named modules."""
    last = last_calls(model)[0] if last_calls(model) else LastCall()
    readers = {reader_around(model, name): True for name in names}
    for around, reads in {model: False, **readers}.items():
        hooks = [hook for hook in around._forward_pre_hooks.values() if isinstance(hook, BeginCall)]
        if hooks:
            hooks[0].reader = reader_of(around) if reads else hooks[0].reader
            continue
        begin = BeginCall(reader_of(around) if reads else None, last)
        begin.ids = TokensReader(around)
        around.register_forward_pre_hook(begin, with_kwargs=True)
        around.register_forward_hook(call_returned)
        around.register_forward_hook(EndCall(last), always_call=True)


def last_calls(model: nn.Module) -> list[LastCall]:
    """The `LastCall` of each changed model in `model`, which may be one itself."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return list({id(hook.last): hook.last for hook in hooks if isinstance(hook, BeginCall)}.values())


def is_masked(model: nn.Module, name: str) -> bool:
    """Whether the mask of the model around a module is one of the module's tokens. For a model of sound it is not."""
    return getattr(reader_around(model, name), "main_input_name", "input_ids") in ("input_ids", "inputs_embeds")


def reader_around(model: nn.Module, name: str) -> nn.Module:
    """The module around a network whose arguments tell its padding: a layer of torch, or a model."""
    above = model.get_submodule(name.rpartition(".")[0])
    return above if isinstance(above, KINDS) else model_around(model, name)


def reader_of(around: nn.Module) -> TokensReader:
    return LayerReader(around) if isinstance(around, KINDS) else TokensReader(around)


class BeginCall:
    """Forward pre-hook of a model: begins the call that tells its feed-forward networks of the tokens."""

    ids: TokensReader | None = None
    warned: bool

    def __init__(self, reader: TokensReader | None, last: LastCall) -> None:
        self.reader = reader
        self.last = last
        self.warned = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        members = feed_forwards(model)
        around = under_way.current(members[0]) if members else None
        if self.reader is not None:
            tokens = self.reader(args, kwargs)
        else:
            tokens = TokensAround() if around is None else around.tokens
        if tokens.ids is None:
            tokens = tokens._replace(ids=self.ids_of(args, kwargs, tokens.shape, around))
        call = ModelCall(tokens, around)
        # TRL calls so; it asks for router logits unless its `router_aux_loss_coef` is 0
        call.asked = bool(kwargs.get("output_router_logits"))
        call.declined = bool(kwargs.get("fused_lm_head")) and not call.asked
        under_way.begin(call, model, *members)
        if around is None and model.training and call.with_gradients and not torch.compiler.is_compiling():
            self.warn_of_loss(model)
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            keep_for_checkpointing(model)

    def ids_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, int] | None, around: ModelCall | None
    ) -> Tensor | None:
        """Token ids where the reader found none: the model's own, or those of a model around with as many tokens."""
        if self.reader is None:
            return None if self.ids is None else self.ids.given(args, kwargs).get("input_ids")
        outer = None if around is None else around.tokens.ids
        return None if outer is None or outer.shape != shape else outer

    def warn_of_loss(self, model: nn.Module) -> None:
        """Warn, once, if the last backward reached the outputs of networks, but not their auxiliary losses."""
        last = self.last.box[0]
        if self.warned or last.declined or not last.reached.output or last.reached.loss:
            return
        config = getattr(model, "config", None)
        if config is not None and getattr(config.get_text_config(), "router_aux_loss_coef", 1.0) == 0:
            return  # the user switched the loss off
        self.warned = True
        warnings.warn(
            "a gradient reached the outputs of feed-forward networks, but not their auxiliary loss: "
            f"{type(model).__name__} returned no loss that holds it, or another loss was used, so experts will not "
            "stay balanced. With label smoothing or a loss of your own add aux_loss(model) to it",
            stacklevel=2,
        )


def call_returned(model: nn.Module, args: object, output: object) -> None:
    """Forward hook of a model; it does not run if the forward raises."""
    call = under_way.current(model)
    if call is not None:
        call.returned = True


class EndCall:
    """Forward hook of a model that runs even if the forward raises: ends the call. Only its losses outlive it."""

    def __init__(self, last: LastCall) -> None:
        self.last = last

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        call = under_way.end(model)
        if call is None or not call.returned:
            return
        around, call.around = call.around, None
        if around is None:
            if call.backward in (None, -1):  # not a recomputation in a backward
                self.last.box[0] = call
        elif not call.added and call.with_gradients == around.with_gradients:
            around.losses.extend(call.losses)


@torch.compiler.disable
def keep_for_checkpointing(model: nn.Module) -> None:
    """Wrap the model's own checkpointing, so that layers that run again have their call."""
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and not isinstance(run, CheckpointWithMask) and feed_forwards(module):
            module._gradient_checkpointing_func = CheckpointWithMask(run, module)  # pyright: ignore[reportArgumentType]


class CheckpointWithMask:
    """Wraps the checkpointing function of one layer: the function that it runs becomes a `Remembered`.

    A compiled model has a graph break here, because a graph cannot hold the calls.
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls = [(module, under_way.current(module) or ModelCall()) for module in feed_forwards(self.layer)]
        return self.checkpoint(Remembered(run, calls), *args, **kwargs)


class Remembered:
    """A function that runs in the calls in which it was made, the first time and in every recomputation."""

    first: bool

    def __init__(self, run: Callable[..., Any], calls: Sequence[tuple[nn.Module, ModelCall]]) -> None:
        self.run = run
        self.calls: list[tuple[nn.Module, ModelCall]] = []
        for module, call in calls:
            call = copy(call)
            call.remembered = True
            self.calls.append((module, call))
        self.first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with under_way.within(self.calls):
            if self.first:
                self.first = False
                try:
                    return self.run(*args, **kwargs)
                finally:
                    for _, call in self.calls:  # recomputations need the tokens alone
                        call.again, call.around, call.losses = True, None, []
            return self.run(*args, **kwargs)
