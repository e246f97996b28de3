"""Finds feed-forward networks by their structure, in models of unknown classes.

A network is two linear layers with an activation between them, or three layers, two of which are multiplied. Both ends
are as wide as the residual stream, the middle is no narrower, and all lie inside a numbered block. A trial of the block
(`trial.py`) shows what its last layer is given when the first ones return random numbers. Which activation makes that
of the numbers, and of those of which layer, is found by trying.

Axes: d model dim, h hidden dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.huggingface.replacement.adapters import Adapter, Halves, NetworkSite, halves_of, tried
from mixture_of_experts.huggingface.replacement.trial import BlockTrial, Chain, is_linear, place_of, sizes
from mixture_of_experts.ops.activations import SquaredReLU

#: parts of the paths or class names of modules that are not the feed-forward network of a block, or are experts
APART = re.compile(
    r"adapter|adaptor|lora_|router|expert|(^|_|\.)moe|sparsemoe|moeblock|pooler|projector|resampler|connector", re.I
)
NUMBER = re.compile(r"(^|(?<=\.))\d+(?=\.|$)")  # in a path
LEADS_TO_EXPERTS = re.compile(r"router|expert", re.I)


class Miss(NamedTuple):
    """A network that was found, but cannot be replaced."""

    name: str  # path of its last linear layer
    kind: str  # class of the module that calls this layer
    reason: str


def search(model: nn.Module, given: Mapping[str, Adapter | Miss]) -> tuple[list[NetworkSite], list[Miss]]:
    """The networks of a model that can be replaced, and those that cannot.

    Args:
        given: what is known already of the networks of some modules, by their paths.
    """
    names = {module: name for name, module in model.named_modules()}
    apart = [
        name for module, name in names.items() if APART.search(f"{name}.{type(module).__name__}") or is_routed(module)
    ]
    apart = tuple(f"{name}." for name in (*apart, *given))
    found: list[NetworkSite] = []
    misses: list[Miss] = []
    seen = set[nn.Module]()
    for module, name in reversed(names.items()):  # each after the modules inside it
        known = given.get(name)
        if isinstance(known, Adapter):
            found.append(NetworkSite(name, module, known))
        elif known is not None:
            misses.append(known)
        numbers = [*NUMBER.finditer(name)]
        if not numbers or sum(map(is_linear, module.modules())) < 2 or f"{name}.".startswith(apart):
            continue
        trial, block = BlockTrial(module), model.get_submodule(name[: numbers[-1].end()])
        for chain in reversed(trial.chains):
            parts = [module.get_submodule(path) for path in (*chain.ups, chain.down)]
            last = names[parts[-1]]
            if f"{last}.".startswith(apart) or not seen.isdisjoint(parts) or not is_of_stream(block, parts):
                continue
            seen.update(parts)
            try:
                found.append(NetworkSite(name, module, adapter_of(trial, chain)))
            except UnfitError as unfit:
                misses.append(Miss(last, type(module).__name__, str(unfit)))
    return found[::-1], misses


def is_of_stream(block: nn.Module, parts: list[nn.Module]) -> bool:
    """Whether a network is as wide as a norm, or a result of another layer, of its block."""
    others = set(block.modules()).difference(parts)
    widths = {len(p) for other in others for p in other.parameters(recurse=False) if 0 < p.ndim < 3}
    return not widths or sizes(parts[-1])[1] in widths


def is_routed(module: nn.Module) -> bool:
    """Whether a module has children that are experts, with or without a router."""
    return any(LEADS_TO_EXPERTS.search(name) for name, _ in module.named_children())


class UnfitError(Exception):
    """Says why a network cannot be replaced."""


def adapter_of(trial: BlockTrial, chain: Chain) -> Adapter:
    """The adapter that tells where a network's parts are.

    Raises:
        UnfitError: the network cannot be replaced.
    """
    ups, out = chain.ups, trial.out
    if any(trial.uses.count(up) > 1 for up in ups):
        raise UnfitError("what is between its linear layers is used elsewhere too")
    found = hidden_of(trial, chain)
    if getattr(out, "target", None) is F.dropout:
        found, out = replace(found, output_dropout=place_of(out.kwargs)), out.args[0]
    # the module does nothing else, if its output is this network's, its tokens are the only argument, and it has no
    # other linear layers, which it may call in evaluation
    alone = sum(map(is_linear, trial.module.modules())) == len(ups) + 1
    if alone and out is chain.out and trial.has_one_argument and trial.given(ups) == {*map(id, trial.symbols)}:
        return found
    return in_slot(trial, chain, found)


def hidden_of(trial: BlockTrial, chain: Chain) -> Adapter:
    """The first adapter that makes of the first layers' results what the last layer was given.

    Raises:
        UnfitError: there is none.
    """
    hidden = chain.hidden
    known = (nn.SiLU(), nn.GELU("tanh"), nn.GELU(), nn.ReLU(), SquaredReLU(), nn.Tanh())
    own: dict[nn.Module, Any] = {part: path for path, part in trial.parts.items() if path in hidden.source}
    dropout = next(iter(hidden.source.difference(trial.calls)), None)  # of two, the numbers are not equal
    for activation in (*known, *(own or (nn.Sigmoid(), nn.Identity()))):
        for adapter, b, a in forms(trial, chain):
            if makes(activation, b, a, hidden if dropout is None else hidden / -2):
                return replace(adapter, activation=own.get(activation, activation), hidden_dropout=dropout)
    raise UnfitError("no activation is known that computes its hidden layer")


def forms(trial: BlockTrial, chain: Chain) -> list[tuple[Adapter, Tensor, Any]]:
    """The forms in which a may multiply the activation of b: adapter, b and a."""
    first, last, down = chain.ups[0], chain.ups[-1], chain.down
    one, two = trial.results[first], trial.results[last]
    if first != last:
        return [(Adapter(last, down, first), one, two), (Adapter(first, down, last), two, one)]
    if one.shape == chain.hidden.shape:
        return [(Adapter(first, down), one, 1)]
    return [(Adapter(first, down, first, halves=order), *halves_of(one, order)) for order in get_args(Halves)]


def makes(activation: nn.Module, b: Tensor, a: Any, wanted: Tensor) -> bool:
    """Whether the activation of b, of each number by itself, times a is what is wanted."""
    made = tried(lambda: type(activation).forward(activation, b.reshape(-1, 1)).view(b.shape) * a)
    return made is not None and made.shape == wanted.shape and torch.allclose(made, wanted, atol=2e-6, rtol=2e-5)


def in_slot(trial: BlockTrial, chain: Chain, found: Adapter) -> Adapter:
    """The adapter of a network in a module that does other things too: its parts are bypassed.

    Raises:
        UnfitError: tokens do not reach its last layer then, or something else would change.
    """
    ups, down, dropout = chain.ups, chain.down, found.hidden_dropout
    inner = [path for path in trial.calls if path in chain.hidden.source]
    # layers between the linear ones, and what is given the tokens alone: the first linear layers, and what holds them
    inner = [path for path in inner if path in trial.parts or len(trial.given([path, *ups])) == 1]
    bypass = [path for path in inner if not path.startswith(tuple(f"{outer}." for outer in inner))]
    twice = [path for path in (*bypass, down) if len(trial.calls[path]) > 1]
    if twice:
        raise UnfitError(f"{twice[0]} is called for something else too")
    ones = found.up if len(ups) == 2 and found.up in bypass else None
    again = BlockTrial(trial.module, {path: 1.0 if path == ones else None for path in bypass})
    passed = [hidden_of(again, each) for each in again.chains if each.down == down]
    if not passed or passed[0].gate or not isinstance(passed[0].activation, nn.Identity):
        raise UnfitError(f"what is between its linear layers is part of the code of {type(trial.module).__name__}")
    output_dropout = None  # the same one, if it serves after the last layer too: then the mixture must have it
    if passed[0].hidden_dropout is not None:
        after = [place_of(node.kwargs) for node in chain.out.users if node.target is F.dropout].count(dropout)
        if not isinstance(dropout, str) or trial.uses.count(dropout) > 1 + after:
            raise UnfitError(f"its dropout ({dropout}) cannot be turned off alone")
        output_dropout = dropout if after else None
    return replace(found, output_dropout=output_dropout, slot=True, bypass=tuple(bypass), ones=ones)
