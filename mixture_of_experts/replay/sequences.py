"""Where a model chooses, in each layer, and of which sequences: the calls of the models around gates.

Axes: b sequences, n tokens of a forward, k choices of a token.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixture_of_experts.gating import ExpertChoiceGating, reads_of
from mixture_of_experts.gating.given import COUNTED, GIVEN_WEIGHTS
from mixture_of_experts.moe import HeirarchicalMoE
from mixture_of_experts.support.private_torch import number_of_backward
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch
from mixture_of_experts.whole_model.model_tokens import TokensAround, TokensReader, cache_of, read_tokens, seen_tokens
from mixture_of_experts.whole_model.sites import Gates, Site, find_sites, places, serve

LAYER, BARE = ("inputs", "mask"), ("x", "importance", "mask")


class ChoiceSite(NamedTuple):
    """A gate in one layer, and the module whose arguments tell of which tokens its choices are."""

    name: str
    site: Site
    called: nn.Module  # that module: the layer; a gate without a layer; a block of transformers, or its router
    k: int
    layer: str  # its path, which tells the places of a gate in several layers apart, in a graph too

    @property
    def num_experts(self) -> int:
        return self.site.num_experts

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """The inputs `(..., n, d)` of a layer or gate, the sizes `(b, n)` of their tokens, and their mask `(b, n)`."""
        names = BARE if self.called is self.site.called else LAYER
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, mask = given[names[0]], given.get("mask")
        sizes, mask = (math.prod(x.shape[:-2]), x.shape[-2]), given.get(COUNTED) if mask is None else mask
        return x, sizes, None if mask is None else mask.reshape(sizes)


def choice_sites(model: nn.Module, ability: str, gates: Gates | None, weights: bool) -> list[ChoiceSite]:
    """A site for each layer in which a gate of the model stands, in the model's order. Blocks that choose by a table of
    token ids are left out, unless `gates` asks for them.

    Args:
        model, ability, gates: see `find_sites`.
        weights: whether the weights of choices have to be served too.
    """
    sites = find_sites(model, ability, gates)
    if gates is None:
        sites = [site for site in sites if not chosen_by_ids(site)]
    serve(sites, ability, why_no_choices)
    if weights:
        serve(sites, f"{ability} of weights", why_no_weights)
    found = {}
    for site in sites:
        for location in reversed(site.locations):  # a layer at two paths has the name of the first
            called = site.called if location.layer is None else location.layer
            path = location.name.rpartition(".")[0]
            found[site, location.layer] = ChoiceSite(location.name, site, called, site.k or 0, path)
    order = {place.name: number for number, place in enumerate(places(model))}
    return sorted(found.values(), key=lambda one: order.get(one.name, 0))


def chosen_by_ids(site: Site) -> bool:
    return site.block is not None and site.block.experts_of_id is not None


def why_no_choices(site: Site) -> str | None:
    """Why the choices of a site can be neither recorded nor replayed; None if they can."""
    if chosen_by_ids(site):
        return "a table of token ids chooses there"
    if site.k is None or isinstance(site.gate, ExpertChoiceGating):
        return "tokens make no k choices there"
    return f"it has outer_expert_dims={site.outer}, as in layers of two levels" if site.outer else None


def why_no_weights(site: Site) -> str | None:
    """Why the weights of a site can be neither recorded nor replayed; None if they can."""
    if site.external:
        return "its own code computes the weights: convert the block by from_transformers"
    if any(isinstance(location.layer, HeirarchicalMoE) for location in site.locations):
        return "a layer of two levels is given choices alone"
    return None if GIVEN_WEIGHTS in reads_of(site.gate) else f"its forward takes no {GIVEN_WEIGHTS}"


# Calls


@dataclass(eq=False)
class SequencesCall(ForwardCall):
    """A forward, under way, of a model around gates."""

    tokens: TokensAround
    seen: Tensor | int  # number of real tokens of each sequence in its cache, `(b,)` or one number for all
    cache: Any  # that of transformers, if it has one
    entered: dict[str, Any] = field(default_factory=dict)  # sizes `(b, n)` and mask of tokens, by gate
    chosen: dict[str, Any] = field(default_factory=dict)  # what gates chose, or were given
    checked: list[Any] = field(default_factory=list)  # masks, with numbers of recorded tokens that they fit
    layer: str = ""  # path of the layer that runs

    def enter(self, site: ChoiceSite, sizes: tuple[int, int], mask: Tensor | None) -> None:
        """A gate is called for tokens of such sizes `(b, n)` and mask."""
        if site.name in self.entered:
            raise RuntimeError(
                f"{site.name!r} ran twice in one forward, but a record has room for one call: call it once"
            )
        self.layer, self.entered[site.name] = site.layer, (sizes, mask)


class Sequences(Watch):
    """Tells the sequences of the forward that is under way, for one model around gates.

    Args:
        owner: the recording or replay, in its thread.
        model: the model.
    """

    owner: Any

    def __init__(self, owner: Any, model: nn.Module) -> None:
        super().__init__(owner)
        self.read: TokensReader = TokensReader(model)
        self.left: tuple[Any, Any, Any] | None = None  # weak references to the last cache and keys in it; their shape

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SequencesCall:
        given = self.read.given(args, kwargs)
        cache = cache_of(given)
        self.refuse_beams(cache)
        return SequencesCall(read_tokens(given), seen_tokens(given), cache)

    def ended(self, call: SequencesCall, output: object) -> None:
        missing = sorted(call.entered.keys() - call.chosen.keys())
        if missing or not call.chosen:
            what = f"a layer, but not its gate {missing[0]!r}" if missing else "no gate"
            raise RuntimeError(
                f"a forward ran {what}, as far as hooks tell. If a part of the model was compiled and called before, "
                "its graph has no hooks: call torch.compiler.reset() first, or enter the context before the first "
                "compiled call"
            )
        keys = keys_of(call.cache)
        self.left = None if keys is None else (weakref.ref(call.cache), weakref.ref(keys), keys.shape)
        if self.owner.unread is not None:
            self.owner.unread.append(call.chosen)

    def refuse_beams(self, cache: Any) -> None:
        """Refuse a cache whose sequences were exchanged since the last forward: others would go on with their records.

        Whoever does so gives the cache other tensors of the same shape.
        """
        keys = keys_of(cache)
        if keys is None or self.left is None or self.left[0]() is not cache:
            return
        if self.left[1]() is not keys and self.left[2] == keys.shape:
            raise RuntimeError(
                "the sequences of the cache were exchanged between two forwards, as beam search does (num_beams > 1): "
                "choices of such a generation can be neither recorded nor replayed. Generate without beams, or run the "
                "finished sequences once more"
            )

    def call(self, site: ChoiceSite) -> SequencesCall | None:
        """The forward that is under way; None in another thread, and in a recomputation by a backward."""
        call = call_stack.current(self)
        if call is None and call_stack.current(self.owner) is not None:
            raise RuntimeError(
                f"{site.name!r} ran, but not within a forward of the module given: give the module that you call"
            )
        return call


def keys_of(cache: Any) -> Tensor | None:
    """The keys in the first layer of a cache that has some; None if none has."""
    cache = getattr(cache, "self_attention_cache", cache)
    found = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
    return next((keys for keys in found if isinstance(keys, Tensor)), None)


def runs_again() -> bool:
    """Whether a backward runs a part of a forward again."""
    return number_of_backward() != -1
