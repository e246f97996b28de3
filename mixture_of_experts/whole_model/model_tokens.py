"""Reads which tokens are real, and their ids, from the arguments of a model of `transformers` (not imported here).

Axes: b sequences, n tokens of the forward, m tokens with those in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.support.tracing import can_read
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch


class TokensAround(NamedTuple):
    """The tokens of a forward, as far as the model's arguments tell them."""

    mask: Tensor | None = None  # (b, n) bool, True where a token is real; None if all are
    shape: tuple[int, int] | None = None  # (b, n), where it can be told
    unknown: str | None = None  # why the mask cannot be told
    ids: Tensor | None = None  # (b, n) integers, ids of the tokens; None if the model was given embeddings


def nearest_reader(modules: Sequence[nn.Module]) -> nn.Module:
    """Of modules within each other, outermost first, the nearest model of `transformers` that reads its tokens' mask;
    if none does, the nearest one; if there is none, the outermost module."""
    models = [module for module in reversed(modules) if hasattr(module, "main_input_name")]  # all of transformers
    for model in models:
        if "attention_mask" in inspect.signature(model.forward).parameters:
            return model
        if model.main_input_name != "input_ids":  # it reads pictures or sound: masks further out are of other tokens
            break
    return models[0] if models else modules[0]


class TokensReader:
    """Reads the tokens of a forward from the arguments of `model`, by their names in its `forward`."""

    names: ClassVar[tuple[str, ...]] = (
        "attention_mask", "input_ids", "inputs_embeds", "cache", "past_key_values",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        self.positions: dict[str, int] = {name: parameters.index(name) for name in self.names if name in parameters}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokensAround:
        return read_tokens(self.given(args, kwargs))

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments named in `names`, by name."""
        given = {name: args[place] for name, place in self.positions.items() if place < len(args)}
        return given | {name: kwargs[name] for name in self.names if name in kwargs}


@dataclass(eq=False)
class TokensCall(ForwardCall):
    """A forward, under way, of a model around routers or experts."""

    tokens: TokensAround


class TokensOfCall(Watch):
    """Tells the tokens of the forward of `model` that is under way."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.read: TokensReader = TokensReader(model)

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokensCall:
        return TokensCall(self.read(args, kwargs))

    def tokens(self) -> TokensAround:
        """The tokens of the forward; nothing is known of them where none is under way."""
        call = call_stack.current(self)
        return TokensAround() if call is None else call.tokens


def read_tokens(given: Mapping[str, Any]) -> TokensAround:
    """What these arguments of a model tell of its tokens."""
    tokens, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), mask_of(given)
    shape = () if embeds is None else embeds.shape[:-1]
    shape = shape if tokens is None else tokens.shape
    if len(shape) != 2:
        return TokensAround()
    b, n = shape
    around = TokensAround(shape=(b, n), ids=tokens)
    if mask is None:
        return around
    if mask.ndim == 2 and mask.shape[0] == b and mask.shape[1] >= n:
        own = mask[:, -n:].bool()
        decoded = n == 1 and can_read(own) and bool(own.all())  # a step of `generate`, whose tokens are all real
        return around if decoded else around._replace(mask=own)
    if mask.ndim in (3, 4) and mask.shape[0] == b and mask.shape[-2] == n:
        return around._replace(mask=attends_to_itself(mask, given))
    return around._replace(unknown=f"the attention mask has shape {tuple(mask.shape)}, for ({b}, {n}) tokens")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among a model's arguments; None if there is none."""
    return given.get("cache", given.get("past_key_values"))


def cached_tokens(given: Mapping[str, Any]) -> int:
    """The number of tokens in the cache, padding among them."""
    cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())


def seen_tokens(given: Mapping[str, Any]) -> Tensor | int:
    """The number of real tokens in the cache, `(b,)` or one number for all sequences."""
    mask, cached = mask_of(given), cached_tokens(given)
    if mask is None or not cached:
        return cached
    if mask.ndim == 2:
        return mask[:, :cached].bool().sum(dim=-1)
    return attends(of_first_head(mask)[:, 0, :cached]).sum(dim=-1)  # of the first new token


def mask_of(given: Mapping[str, Any]) -> Tensor | None:
    """The attention mask among a model's arguments; of one for each kind of layer, that of full attention, or the only
    one."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Mapping):
        return mask
    return mask.get("full_attention", next(iter(mask.values())) if len(mask) == 1 else None)


def of_first_head(mask: Tensor) -> Tensor:
    """A mask `(b, n, m)` from one `(b, n, m)` or `(b, heads, n, m)`."""
    return mask[:, 0] if mask.ndim == 4 else mask


def attends(mask: Tensor) -> Tensor:
    """An attention mask as bool, True where a token attends."""
    return mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() else mask > 0


def attends_to_itself(mask: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """`(b, n)` bool, True where a token is real, from a mask `(b, n, m)` or `(b, heads, n, m)`: a real token attends to
    itself, padding does not. None for a single token: a decoded token is no padding."""
    n = mask.shape[-2]
    if n == 1:
        return None
    seen = cached_tokens(given)
    own = of_first_head(mask)[..., seen : seen + n]
    return attends(own.diagonal(dim1=-2, dim2=-1))
