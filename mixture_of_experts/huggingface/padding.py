"""The calls of a model, brought to its feed-forward networks: mask and token ids on the way in, losses on the way out.

Hooks on the model that was changed, and on the nearest models around its networks (an encoder and a decoder each), have
a `ModelCall` under way for the time of a forward. Activation checkpointing runs layers again when that time is over:
what it is given to run is wrapped, so that the call of that forward comes back with it.
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
from mixture_of_experts.model_tokens import TokensAround, TokensReader, model_around


class LastCall(threading.local):
    """The last outermost call that came to its end, of each thread its own. Copies of a model have had none."""

    box: list[ModelCall]

    def __init__(self) -> None:
        self.box = [ModelCall()]  # what is in a list torch.compile stores, an attribute it does not

    def __reduce__(self) -> tuple[type[LastCall], tuple[()]]:
        return LastCall, ()


def bring_mask(model: nn.Module, names: Sequence[str]) -> None:
    """Put the hooks on a model, and on those around the modules that are named."""
    last = last_calls(model)[0] if last_calls(model) else LastCall()
    readers = {model_around(model, name): True for name in names}
    for around, reads in {model: False, **readers}.items():
        hooks = [hook for hook in around._forward_pre_hooks.values() if isinstance(hook, BeginCall)]
        if hooks:
            hooks[0].reader = TokensReader(around) if reads else hooks[0].reader
            continue
        begin = BeginCall(TokensReader(around) if reads else None, last)
        begin.ids = TokensReader(around)
        around.register_forward_pre_hook(begin, with_kwargs=True)
        around.register_forward_hook(call_returned)
        around.register_forward_hook(EndCall(last), always_call=True)


def last_calls(model: nn.Module) -> list[LastCall]:
    """Where the last calls are found of the models that were changed, in a model that is one or contains some."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return list({id(hook.last): hook.last for hook in hooks if isinstance(hook, BeginCall)}.values())


def is_masked(model: nn.Module, name: str) -> bool:
    """Whether the mask of the model around a module is of its tokens: a model of sound hears all frames."""
    return getattr(model_around(model, name), "main_input_name", "input_ids") in ("input_ids", "inputs_embeds")


class BeginCall:
    """Forward pre-hook of a model: its feed-forward networks learn what it knows of its tokens."""

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
        under_way.begin(call, model, *members)
        if around is None and model.training and call.with_gradients and not torch.compiler.is_compiling():
            self.warn_of_loss(model)
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            keep_for_checkpointing(model)

    def ids_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, int] | None, around: ModelCall | None
    ) -> Tensor | None:
        """Token ids of a model that has none for itself: its own, or of a model around that embeds as many tokens."""
        if self.reader is None:
            return None if self.ids is None else self.ids.given(args, kwargs).get("input_ids")
        outer = None if around is None else around.tokens.ids
        return None if outer is None or outer.shape != shape else outer

    def warn_of_loss(self, model: nn.Module) -> None:
        """Once, if the gradient of the forward before went past its auxiliary losses."""
        last = self.last.box[0]
        if self.warned or not last.reached.output or last.reached.loss:
            return
        config = getattr(model, "config", None)
        if config is not None and getattr(config.get_text_config(), "router_aux_loss_coef", 1.0) == 0:
            return  # it was switched off
        self.warned = True
        warnings.warn(
            "a gradient reached the outputs of feed-forward networks, but not their auxiliary loss: "
            f"{type(model).__name__} returned no loss that holds it, or another was taken, and nobody asked for it, so "
            "that experts will not stay balanced. With label smoothing or a loss of your own add aux_loss(model) to it",
            stacklevel=2,
        )


def call_returned(model: nn.Module, args: object, output: object) -> None:
    """Forward hook of a model, to which one that raises never comes."""
    call = under_way.current(model)
    if call is not None:
        call.returned = True


class EndCall:
    """Forward hook of a model, called also where it raises: nothing of a forward outlives it but its losses."""

    def __init__(self, last: LastCall) -> None:
        self.last = last

    def __call__(self, model: nn.Module, args: object, output: object) -> None:
        call = under_way.end(model)
        if call is None or not call.returned:
            return
        around, call.around = call.around, None
        if around is None:
            if call.backward in (None, -1):  # one that a backward runs again was there before
                self.last.box[0] = call
        elif not call.added and call.with_gradients == around.with_gradients:
            around.losses.extend(call.losses)


@torch.compiler.disable
def keep_for_checkpointing(model: nn.Module) -> None:
    """See to it that what the model's own checkpointing runs again has its call again."""
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and not isinstance(run, CheckpointWithMask) and feed_forwards(module):
            module._gradient_checkpointing_func = CheckpointWithMask(run, module)  # pyright: ignore[reportArgumentType]


class CheckpointWithMask:
    """A model's checkpointing function, of one layer: what it runs becomes `Remembered`.

    A compiled model leaves its graph here, as what is remembered is no part of one.
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls = [(module, under_way.current(module) or ModelCall()) for module in feed_forwards(self.layer)]
        return self.checkpoint(Remembered(run, calls), *args, **kwargs)


class Remembered:
    """A function that is run once, and then any number of times again with the calls of the first time."""

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
                    for _, call in self.calls:  # a backward needs the tokens alone
                        call.again, call.around, call.losses = True, None, []
            return self.run(*args, **kwargs)
