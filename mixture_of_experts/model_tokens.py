"""What the models of `transformers` around a module tell of its tokens. Nothing of that package is imported.

Axes: b sequences, n tokens of the forward, m tokens with those in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

READ = ("attention_mask", "input_ids", "inputs_embeds", "cache", "past_key_values")


class TokensAround(NamedTuple):
    """What a model was told of the tokens of a forward."""

    mask: Tensor | None = None  # (b, n) bool, True where a token is real; None if all are
    shape: tuple[int, int] | None = None  # (b, n), where it can be told
    unknown: str | None = None  # why the mask cannot be told
    ids: Tensor | None = None  # (b, n) integers, the tokens' ids; None where it was given embeddings


def model_around(model: nn.Module, name: str) -> nn.Module:
    """The nearest model of `transformers` around a module that reads a mask of its tokens; else the nearest, else
    `model`."""
    nearest: nn.Module | None = None
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        reads = getattr(module, "main_input_name", None)  # what every model of the package says of itself
        if reads is None:
            continue
        nearest = module if nearest is None else nearest
        if "attention_mask" in inspect.signature(module.forward).parameters:
            return module
        if reads != "input_ids":  # pictures or sound: a mask further out is of something else
            break
    return model if nearest is None else nearest


class TokensReader:
    """Reads what a model is given.

    Args:
        model: whose `forward` names its arguments.
    """

    positions: dict[str, int]

    def __init__(self, model: nn.Module) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self.positions = {name: parameters.index(name) for name in READ if name in parameters}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokensAround:
        return read_tokens(self.given(args, kwargs))

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arguments that are read."""
        given = {name: args[place] for name, place in self.positions.items() if place < len(args)}
        given.update({name: kwargs[name] for name in READ if name in kwargs})
        return given

    def seen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | int, bool]:
        """How many real tokens of each sequence, `(b,)` or one number for all, a cache holds; whether there is one."""
        given = self.given(args, kwargs)
        cache = given.get("cache", given.get("past_key_values"))
        return (0, False) if cache is None else (seen_tokens(given, int(cache.get_seq_length())), True)


def read_tokens(given: Mapping[str, Any]) -> TokensAround:
    """What these arguments tell."""
    tokens, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    shape = tokens.shape if tokens is not None else embeds.shape[:-1] if embeds is not None else None
    if shape is None or len(shape) != 2:
        return TokensAround()
    b, n = shape
    around = TokensAround(shape=(b, n), ids=tokens)
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values())) if len(mask) == 1 else None)
    if mask is None:
        return around
    if mask.ndim == 2 and mask.shape[0] == b and mask.shape[1] >= n:
        return around._replace(mask=mask[:, -n:].bool())
    if mask.ndim in (3, 4) and mask.shape[0] == b and mask.shape[-2] == n:
        return around._replace(mask=attends_to_itself(mask, given))
    return around._replace(unknown=f"the attention mask has shape {tuple(mask.shape)}, for ({b}, {n}) tokens")


def seen_tokens(given: Mapping[str, Any], cached: int) -> Tensor | int:
    """Those of `cached` tokens of each sequence that are no padding."""
    mask = given.get("attention_mask")
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if mask is None or not cached:
        return cached
    if mask.ndim == 2:
        return mask[:, :cached].bool().sum(dim=-1)
    attended = mask[..., 0, :cached] if mask.ndim == 3 else mask[:, 0, 0, :cached]  # by the first new token
    attended = (
        attended if attended.dtype == torch.bool else attended >= 0 if attended.is_floating_point() else attended > 0
    )
    return attended.sum(dim=-1)


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
