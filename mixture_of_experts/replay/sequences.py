"""Where a model chooses, in each layer, and of which sequences: the calls of the models around gates.

Axes: b sequences, n tokens of a forward, k choices of a token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixture_of_experts.gating import ExpertChoiceGating
from mixture_of_experts.gating.base import COUNTED
from mixture_of_experts.support.private_torch import number_of_backward
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch
from mixture_of_experts.whole_model.model_tokens import TokensAround, TokensReader
from mixture_of_experts.whole_model.sites import Gates, Site, Stand, find_sites, places, serve

Seen = Callable[[tuple[Any, ...], Mapping[str, Any]], "Tensor | int"]
LAYER, BARE = ("inputs", "mask"), ("x", "importance", "mask")


class ChoiceSite(NamedTuple):
    """A gate in one layer, and the module whose arguments tell of which tokens its choices are."""

    name: str
    site: Site
    called: nn.Module  # that module: the layer; a gate without a layer; a block of transformers, or its router
    k: int
    layer: str  # its path, which tells the places of a gate in several layers apart

    @property
    def num_experts(self) -> int:
        return self.site.num_experts

    @property
    def external(self) -> bool:
        return self.site.external

    @property
    def choices(self) -> int:
        """The number of choices of a token; at level two for all its choices of level one."""
        outer = self.site.level_one
        return self.k if outer is None or outer.k is None else self.k * outer.k

    def sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], Tensor | None]:
        """The shape `(..., n)` and the mask of the tokens in a call of the layer or gate."""
        names = BARE if self.called is self.site.called else LAYER
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("mask")
        return tuple(given[names[0]].shape[:-1]), given.get(COUNTED) if mask is None else mask


def choice_sites(model: nn.Module, ability: str, gates: Gates | None) -> list[ChoiceSite]:
    """A site for each layer in which a gate of the model stands, in the model's order. Blocks that choose by a table of
    token ids are left out, unless `gates` asks for them."""
    sites = find_sites(model, ability, gates)
    if gates is None:
        sites = [site for site in sites if not chosen_by_ids(site)]
    found = {
        (site, stand.layer): ChoiceSite(
            stand.name, site, called_of(site, stand), site.k or 0, stand.name.rpartition(".")[0]
        )
        for site in serve(sites, ability, why_no_choices)
        for stand in reversed(site.stands)  # a layer at two paths has the name of the first
    }
    order = {place.name: number for number, place in enumerate(places(model))}
    return sorted(found.values(), key=lambda one: order.get(one.name, 0))


def chosen_by_ids(site: Site) -> bool:
    return site.block is not None and site.block.experts_of_id is not None


def called_of(site: Site, stand: Stand) -> nn.Module:
    """The module whose arguments tell of the tokens of a gate."""
    whole = stand.layer is not None and (not site.external or site.block is not None)
    return site.called if stand.layer is None or not whole else stand.layer


def why_no_choices(site: Site) -> str | None:
    """Why the choices of a site can be neither recorded nor replayed; None if they can."""
    if chosen_by_ids(site):
        return "a table of token ids chooses there"
    if site.k is None or isinstance(site.gate, ExpertChoiceGating):
        return "tokens make no k choices there"
    if not site.external and site.outer and site.level_one is None:
        return f"it has outer_expert_dims={site.outer} and stands in no layer"
    return None


# Calls


class SequencesCall(ForwardCall):
    """A forward, under way, of a model around gates.

    Args:
        tokens: the model's tokens.
        seen: number of real tokens of each sequence in its cache, `(b,)` or one number for all.
        cached: whether it has a cache.
        around: the call of the same model within which it runs.
    """

    def __init__(self, tokens: TokensAround, seen: Tensor | int, cached: bool, around: SequencesCall | None) -> None:
        self.tokens = tokens
        self.seen = seen
        self.cached = cached
        self.around = around
        self.cache: Any = None  # that of transformers
        self.parts: list[Any] = []  # what was recorded of it
        self.within: list[Any] = []  # what was recorded of calls within it, which come after it
        self.sizes: dict[str, tuple[tuple[int, ...], Tensor | None]] = {}  # of calls of layers, by gate
        self.gates: set[str] = set()  # gates that ran
        self.checked: list[tuple[Tensor | None, list[int]]] = []  # masks that fit the numbers of recorded tokens
        self.outer: Any = None  # routing of the gate that ran last; before a gate of level two, level one's
        self.layer = ""  # path of the layer that runs

    @property
    def continues(self) -> bool:
        return isinstance(self.seen, Tensor) or self.seen > 0

    def once(self, name: str) -> None:
        """Refuse a second run of a gate in this forward."""
        if name in self.gates:
            raise RuntimeError(f"{name!r} ran twice in one forward, but a record has room for one call: call it once")
        self.gates.add(name)


class Sequences(Watch):
    """Tells the sequences of the forward that is under way, for one model around gates.

    Args:
        owner: whose forwards they are, in its thread.
        model: the model.
        seen: see `record_routing`.
        done: gets what was recorded of a forward that ended well.
    """

    read: TokensReader
    seen: Seen | None
    done: Callable[[list[Any]], None] | None

    def __init__(
        self, owner: object, model: nn.Module, seen: Seen | None, done: Callable[[list[Any]], None] | None
    ) -> None:
        super().__init__(owner)
        self.read = TokensReader(model)
        self.seen, self.done = seen, done
        self.left: tuple[Any, Any, Any] | None = None  # weak references to the last cache and keys in it; their shape

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SequencesCall:
        tokens, cache = self.read(args, kwargs), self.cache(args, kwargs)
        self.refuse_beams(cache)
        seen, cached = self.read.seen(args, kwargs) if self.seen is None else (self.seen(args, kwargs), True)
        call = SequencesCall(tokens, seen, cached, call_stack.current(self))
        call.cache = cache
        return call

    def ended(self, call: SequencesCall, output: object) -> None:
        missing = sorted(call.sizes.keys() - call.gates)
        if missing or not call.gates:
            what = f"a layer, but not its gate {missing[0]!r}" if missing else "no gate"
            raise RuntimeError(
                f"a forward ran {what}, as far as hooks tell. If a part of the model was compiled and called before, "
                "its graph has no hooks: call torch.compiler.reset() first, or enter the context before the first "
                "compiled call"
            )
        keys = keys_of(call.cache)
        self.left = None if keys is None else (weakref.ref(call.cache), weakref.ref(keys), keys.shape)
        parts = [*call.parts, *call.within]
        if call.around is not None:
            call.around.within.extend(parts)
        elif self.done is not None:
            self.done(parts)

    def cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The cache of transformers that a forward is given, if any."""
        return None if self.seen is not None else self.read.cache(args, kwargs)

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


def sequences_around(
    owner: object,
    sites: list[ChoiceSite],
    seen: Seen | None,
    done: Callable[[list[Any]], None] | None = None,
) -> dict[nn.Module, Sequences]:
    """The `Sequences` of every model around gates."""
    if seen is not None and not callable(seen):
        raise TypeError(
            f"seen must be a function (args, kwargs) that returns the number of tokens read before, got {seen!r}"
        )
    return {around: Sequences(owner, around, seen, done) for around in {one.site.around: None for one in sites}}
