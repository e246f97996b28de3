"""The attention mask of a model, brought to the routers of its feed-forward networks.

A hook on the nearest model around them (`PreTrainedModel`; an encoder and a decoder each) leaves the mask on them for
the time of a forward. Activation checkpointing runs layers again when that time is over: what it is given to run is
wrapped, so that the mask of that forward comes back with it. Everything is kept on modules and in objects that are
copied and pickled with them.

Axes: b sequences, n tokens of the forward, m tokens with those in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixture_of_experts.huggingface.feed_forward import Call, MoEFeedForward, feed_forwards

READ = ("attention_mask", "input_ids", "inputs_embeds", "cache", "past_key_values")


def bring_mask(model: nn.Module, names: Sequence[str]) -> None:
    """Put the hooks on the models around the modules that are named."""
    for around in {find_around(model, name): None for name in names}:
        if not any(isinstance(hook, BeginCall) for hook in around._forward_pre_hooks.values()):
            around.register_forward_pre_hook(BeginCall(around), with_kwargs=True)
            around.register_forward_hook(end_call, always_call=True)


def find_around(model: nn.Module, name: str) -> nn.Module:
    """The nearest `PreTrainedModel` around a module that reads a mask of its tokens; else the nearest, else `model`."""
    found: list[nn.Module] = []
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        if not isinstance(module, PreTrainedModel):
            continue
        found.append(module)
        if "attention_mask" in inspect.signature(module.forward).parameters:
            return module
        if module.main_input_name != "input_ids":  # pictures or sound: a mask further out is of something else
            break
    return found[0] if found else model


def is_masked(model: nn.Module, name: str) -> bool:
    """Whether the mask of the model around a module is of its tokens: a model of sound hears all frames."""
    return getattr(find_around(model, name), "main_input_name", "input_ids") in ("input_ids", "inputs_embeds")


class BeginCall:
    """Forward pre-hook of a model: its feed-forward networks learn what it knows of its tokens."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self.positions = {name: parameters.index(name) for name in READ if name in parameters}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {name: args[place] for name, place in self.positions.items() if place < len(args)}
        given.update({name: kwargs[name] for name in READ if name in kwargs})
        call = read_call(given)
        for feed_forward in feed_forwards(model):
            feed_forward.begin(call)
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            keep_for_checkpointing(model)


def end_call(model: nn.Module, args: object, output: object) -> None:
    """Forward hook of a model: no mask outlives its forward."""
    for feed_forward in feed_forwards(model):
        feed_forward.call = None


def read_call(given: Mapping[str, Any]) -> Call:
    """The call of a forward that was given these arguments."""
    tokens, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    shape = tokens.shape if tokens is not None else embeds.shape[:-1] if embeds is not None else None
    if shape is None or len(shape) != 2:
        return Call()
    b, n = shape
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values())) if len(mask) == 1 else None)
    if mask is None:
        return Call(shape=(b, n))
    if mask.ndim == 2 and mask.shape[0] == b and mask.shape[1] >= n:
        return Call(mask[:, -n:].bool(), (b, n))
    if mask.ndim in (3, 4) and mask.shape[0] == b and mask.shape[-2] == n:
        return Call(attends_to_itself(mask, given), (b, n))
    return Call(None, (b, n), f"the attention mask has shape {tuple(mask.shape)}, for ({b}, {n}) tokens")


def attends_to_itself(mask: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """`(b, n)` bool from a mask `(b, n, m)` or `(b, heads, n, m)`: a real token attends to itself, padding to nothing
    that is padding. Of a single token there is nothing to know: nobody decodes padding."""
    n = mask.shape[-2]
    if n == 1:
        return None
    cache = given.get("cache", given.get("past_key_values"))
    seen = 0 if cache is None else int(cache.get_seq_length())
    own = mask[..., seen : seen + n] if mask.ndim == 3 else mask[:, 0, :, seen : seen + n]
    own = own.diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own >= 0 if own.is_floating_point() else own > 0


@torch.compiler.disable
def keep_for_checkpointing(model: nn.Module) -> None:
    """See to it that what the model's own checkpointing runs again has its mask again."""
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and not isinstance(run, Checkpoint) and feed_forwards(module):
            module._gradient_checkpointing_func = Checkpoint(run, module)  # pyright: ignore[reportArgumentType]


class Checkpoint:
    """A model's checkpointing function, of one layer: what it runs becomes `Remembered`.

    A compiled model leaves its graph here, as what is remembered is no part of one.
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = Remembered(run, [(module, module.call) for module in feed_forwards(self.layer)])
        return self.checkpoint(run, *args, **kwargs)


class Remembered:
    """A function that is run once, and then any number of times again with the calls of the first time."""

    def __init__(self, run: Callable[..., Any], calls: list[tuple[MoEFeedForward, Call | None]]) -> None:
        self.run = run
        self.calls = [(module, (call or Call())._replace(again=True)) for module, call in calls]
        self.first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self.first = False
            return self.run(*args, **kwargs)
        before = [(module, module.call) for module, _ in self.calls]
        try:
            for module, call in self.calls:
                module.call = call
            return self.run(*args, **kwargs)
        finally:
            for module, call in before:
                module.call = call
