"""Finds where a model chooses: its gates, the layers that call them, and the blocks of `transformers`.

Axes: b sequences, n tokens of a forward, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixture_of_experts import under_way
from mixture_of_experts.gating import ExpertChoiceGating
from mixture_of_experts.held import BlockSettings
from mixture_of_experts.model_tokens import TokensAround, TokensReader, model_around
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.private_torch import number_of_backward
from mixture_of_experts.stats.foreign import num_logits
from mixture_of_experts.stats.gates import GateSite, find_gates
from mixture_of_experts.under_way import CallUnderWay

Seen = Callable[[tuple[Any, ...], Mapping[str, Any]], "Tensor | int"]
LAYER, BARE = ("inputs", "mask"), ("x", "importance", "mask")


class ChoiceSite(NamedTuple):
    """A gate, and the module whose arguments tell of which tokens its choices are."""

    name: str
    gate: nn.Module
    called: nn.Module  # that module: the layer; a gate without a layer; a block of transformers, or its router
    k: int
    num_experts: int
    around: nn.Module  # the nearest model of transformers that reads a mask, else the model
    foreign: bool = False
    held: BlockSettings | None = None  # of a known block of transformers
    outer: str | None = None  # for level two: the gate of level one

    @property
    def choices(self) -> int:
        """The number of choices of a token; at level two for all its choices of level one."""
        layer: Any = self.called
        return self.k if self.outer is None else self.k * layer.gate_outer.k

    def sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], Tensor | None]:
        """The shape `(..., n)` and the mask of the tokens in a call of the layer or gate."""
        names = BARE if self.called is self.gate else LAYER
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(given[names[0]].shape[:-1]), given.get("mask")


def find_sites(model: nn.Module) -> list[ChoiceSite]:
    """All sites of a model, in its order. Blocks that choose by a table of token ids are left out."""
    gates = find_gates(model)
    if not gates:
        raise ValueError(f"{type(model).__name__} has no gate: give a model with MoE layers")
    layers: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, HeirarchicalMoE):
            layers |= {module.gate_outer: module, module.gate_inner: module}
        elif isinstance(module, MoE):
            layers[module.gate] = module
    paths = {module: path for path, module in model.named_modules()}
    sites = (site_of(found, layers, model_around(model, paths[found.gate])) for found in gates)
    return [site for site in sites if site is not None]


def site_of(found: GateSite, layers: Mapping[nn.Module, nn.Module], around: nn.Module) -> ChoiceSite | None:
    gate: Any = found.gate
    if found.reader is not None:
        held = found.reader.blocks.get(gate)
        if held is None:
            return ChoiceSite(found.name, gate, gate, gate.top_k, found.num_experts, around, True)
        if held.experts_of_id is not None:
            return None
        return ChoiceSite(found.name, gate, held.block, held.k, num_logits(held), around, True, held)
    k = getattr(gate, "k", None)
    if isinstance(gate, ExpertChoiceGating) or not isinstance(k, int):
        raise ValueError(
            f"{found.name!r} is a {type(gate).__name__}, in which tokens make no k choices, so there is nothing to "
            "record or to replay"
        )
    if gate not in layers and found.outer:
        raise ValueError(f"{found.name!r} has outer_expert_dims={found.outer} and no layer: put it into one")
    return ChoiceSite(found.name, gate, layers.get(gate, gate), k, found.num_experts, around, outer=found.outer_gate)


# Calls


class SequencesCall(CallUnderWay):
    """A forward, under way, of a model around gates.

    Args:
        tokens: the model's tokens.
        seen: number of real tokens of each sequence in its cache, `(b,)` or one number for all.
        cached: whether it has a cache.
    """

    def __init__(self, tokens: TokensAround, seen: Tensor | int, cached: bool) -> None:
        self.tokens = tokens
        self.seen = seen
        self.cached = cached
        self.sizes: dict[str, tuple[tuple[int, ...], Tensor | None]] = {}  # of calls of layers, by gate
        self.gates: set[str] = set()  # gates that ran
        self.checked: list[tuple[Tensor | None, list[int]]] = []  # masks that fit the numbers of recorded tokens
        self.outer: Any = None  # routing of the gate that ran last; before a gate of level two, level one's

    @property
    def continues(self) -> bool:
        return isinstance(self.seen, Tensor) or self.seen > 0

    def once(self, name: str) -> None:
        """Refuse a second run of a gate in this forward."""
        if name in self.gates:
            raise RuntimeError(f"{name!r} ran twice in one forward, but a record has room for one call: call it once")
        self.gates.add(name)


class Sequences:
    """Tells the sequences of the forward that is under way, for one model around gates."""

    read: TokensReader

    def __init__(self, owner: object, model: nn.Module, seen: Seen | None) -> None:
        self.owner = owner
        self.read = TokensReader(model)
        self.seen = seen

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if under_way.current(self.owner) is None:
            return  # in another thread, or in a backward
        tokens = self.read(args, kwargs)
        seen, cached = self.read.seen(args, kwargs) if self.seen is None else (self.seen(args, kwargs), True)
        under_way.begin(SequencesCall(tokens, seen, cached), self)

    def end(self, model: nn.Module, args: object, output: object) -> None:
        under_way.end(self)

    def call(self, site: ChoiceSite) -> SequencesCall | None:
        """The forward that is under way; None in another thread, and in a recomputation by a backward."""
        call = under_way.current(self)
        if call is None and under_way.current(self.owner) is not None:
            raise RuntimeError(
                f"{site.name!r} ran, but not within a forward of the module given: give the module that you call"
            )
        return call


def runs_again() -> bool:
    """Whether a backward runs a part of a forward again."""
    return number_of_backward() != -1


def follow(owner: object, sites: list[ChoiceSite], seen: Seen | None, hooks: ExitStack) -> dict[nn.Module, Sequences]:
    """Set hooks at the beginning of forwards of all models around gates; return their `Sequences`."""
    found = {around: Sequences(owner, around, seen) for around in {site.around: None for site in sites}}
    for around, sequences in found.items():
        hooks.callback(around.register_forward_pre_hook(sequences.begin, with_kwargs=True).remove)
    return found


def follow_to_the_end(found: Mapping[nn.Module, Sequences], hooks: ExitStack) -> None:
    """Set hooks at the end of these forwards. Call it last: a model may be a layer, whose own hooks run first."""
    for around, sequences in found.items():
        hooks.callback(around.register_forward_hook(sequences.end, always_call=True).remove)
