"""Finds feed-forward networks in models of unknown classes by analyzing the networks' structure.

A network consists of two linear layers with an activation between them, or of three linear layers where the outputs of
two layers are multiplied. The network's input and output have the dimension of the residual stream, its hidden
dimension is at least as large, and all of its layers are in a numbered block. A trace of the block (see
`block_tracer.py`) shows the input of the last layer when the first layers return random numbers. The search then tries
different activations, and different layers to which they may be applied, until the result matches this input.

Axes: d (model dimension), h (hidden dimension).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.huggingface.replacement.block_tracer import (
    BlockTracer,
    LinearChain,
    get_linear_sizes,
    is_linear_layer,
    locate_dropout,
)
from mixture_of_experts.huggingface.replacement.dense_ffn import (
    Adapter,
    GateUpOrder,
    NetworkLocation,
    call_or_none,
    split_gate_up,
)
from mixture_of_experts.ops.activations import SquaredReLU

#: matches paths or class names of modules, such as experts, that are not a block's feed-forward network
EXCLUDED_NAMES = re.compile(
    r"adapter|adaptor|lora_|router|expert|(^|_|\.)moe|sparsemoe|moeblock|pooler|projector|resampler|connector", re.I
)
PATH_NUMBER = re.compile(r"(^|(?<=\.))\d+(?=\.|$)")  # a number in a path
EXPERT_NAMES = re.compile(r"router|expert", re.I)


class UnsupportedNetwork(NamedTuple):
    """A network that was found but cannot be replaced."""

    name: str  # path of the network's last linear layer
    class_name: str  # class name of the module that calls this layer
    reason: str


def search_networks(
    model: nn.Module, known_networks: Mapping[str, Adapter | UnsupportedNetwork]
) -> tuple[list[NetworkLocation], list[UnsupportedNetwork]]:
    """Search a model for feed-forward networks. Return the networks that can be replaced, and the unsupported networks.

    Args:
        known_networks: networks that are already known, keyed by the paths of their modules.
    """
    names = {module: name for name, module in model.named_modules()}
    excluded = [
        name
        for module, name in names.items()
        if EXCLUDED_NAMES.search(f"{name}.{type(module).__name__}") or has_experts(module)
    ]
    excluded = tuple(f"{name}." for name in (*excluded, *known_networks))
    found: list[NetworkLocation] = []
    unsupported: list[UnsupportedNetwork] = []
    seen = set[nn.Module]()
    for module, name in reversed(names.items()):  # visit submodules before their parents
        known = known_networks.get(name)
        if isinstance(known, Adapter):
            found.append(NetworkLocation(name, module, known))
        elif known is not None:
            unsupported.append(known)
        numbers = [*PATH_NUMBER.finditer(name)]
        if not numbers or sum(map(is_linear_layer, module.modules())) < 2 or f"{name}.".startswith(excluded):
            continue
        trial, block = BlockTracer(module), model.get_submodule(name[: numbers[-1].end()])
        for chain in reversed(trial.chains):
            parts = [module.get_submodule(path) for path in (*chain.ups, chain.down)]
            last = names[parts[-1]]
            if (
                f"{last}.".startswith(excluded)
                or not seen.isdisjoint(parts)
                or not matches_residual_width(block, parts)
            ):
                continue
            seen.update(parts)
            try:
                found.append(NetworkLocation(name, module, derive_adapter(trial, chain)))
            except UnsupportedNetworkError as unfit:
                unsupported.append(UnsupportedNetwork(last, type(module).__name__, str(unfit)))
    return found[::-1], unsupported


def matches_residual_width(block: nn.Module, parts: list[nn.Module]) -> bool:
    """Return whether a network's output dimension matches a norm or the output of another layer in the same block."""
    others = set(block.modules()).difference(parts)
    widths = {len(p) for other in others for p in other.parameters(recurse=False) if 0 < p.ndim < 3}
    return not widths or get_linear_sizes(parts[-1])[1] in widths


def has_experts(module: nn.Module) -> bool:
    """Return whether a module has experts or a router among its children."""
    return any(EXPERT_NAMES.search(name) for name, _ in module.named_children())


class UnsupportedNetworkError(Exception):
    """Raised if a network cannot be replaced. The message states the reason."""


def derive_adapter(trial: BlockTracer, chain: LinearChain) -> Adapter:
    """Return an adapter that describes where a network's parts are located.

    Raises:
        UnsupportedNetworkError: the network cannot be replaced.
    """
    ups, out = chain.ups, trial.output
    if any(trial.source_uses.count(up) > 1 for up in ups):
        raise UnsupportedNetworkError("values between the linear layers are also used elsewhere")
    found = match_adapter(trial, chain)
    if getattr(out, "target", None) is F.dropout:
        found, out = replace(found, output_dropout=locate_dropout(out.kwargs)), out.args[0]
    # the module does nothing else if it returns the network's output, takes only the tokens, and has no other linear
    # layers (which it might call in eval mode)
    alone = sum(map(is_linear_layer, trial.module.modules())) == len(ups) + 1
    if (
        alone
        and out is chain.output
        and trial.has_one_argument
        and trial.get_argument_ids(ups) == {*map(id, trial.symbols)}
    ):
        return found
    return derive_embedded_adapter(trial, chain, found)


def match_adapter(trial: BlockTracer, chain: LinearChain) -> Adapter:
    """Return the first adapter that reproduces the last layer's input from the outputs of the first layers.

    Raises:
        UnsupportedNetworkError: no adapter reproduces the input.
    """
    hidden = chain.hidden
    known = (nn.SiLU(), nn.GELU("tanh"), nn.GELU(), nn.ReLU(), SquaredReLU(), nn.Tanh())
    own: dict[nn.Module, Any] = {part: path for path, part in trial.other_parts.items() if path in hidden.sources}
    dropout = next(iter(hidden.sources.difference(trial.calls)), None)  # networks with two dropouts match no candidate
    for activation in (*known, *(own or (nn.Sigmoid(), nn.Identity()))):
        for adapter, b, a in list_candidates(trial, chain):
            if reproduces_hidden(activation, b, a, hidden if dropout is None else hidden / -2):
                return replace(adapter, activation=own.get(activation, activation), hidden_dropout=dropout)
    raise UnsupportedNetworkError("no known activation reproduces the network's hidden layer")


def list_candidates(trial: BlockTracer, chain: LinearChain) -> list[tuple[Adapter, Tensor, Any]]:
    """List the products `a * activation(b)` that the network may compute. Each candidate is a tuple (adapter, b, a)."""
    first, last, down = chain.ups[0], chain.ups[-1], chain.down
    one, two = trial.results[first], trial.results[last]
    if first != last:
        return [(Adapter(last, down, first), one, two), (Adapter(first, down, last), two, one)]
    if one.shape == chain.hidden.shape:
        return [(Adapter(first, down), one, 1)]
    return [(Adapter(first, down, first, halves=order), *split_gate_up(one, order)) for order in get_args(GateUpOrder)]


def reproduces_hidden(activation: nn.Module, b: Tensor, a: Any, wanted: Tensor) -> bool:
    """Return whether `a * activation(b)` is equal to `wanted`, for an elementwise activation."""
    made = call_or_none(lambda: type(activation).forward(activation, b.reshape(-1, 1)).view(b.shape) * a)
    return made is not None and made.shape == wanted.shape and torch.allclose(made, wanted, atol=2e-6, rtol=2e-5)


def derive_embedded_adapter(trial: BlockTracer, chain: LinearChain, found: Adapter) -> Adapter:
    """Return an adapter with `slot=True` for a network in a module that also has other functions. The adapter lists the
    parts to bypass.

    Raises:
        UnsupportedNetworkError: bypassing these parts would not pass the tokens unchanged to the network's last layer,
            or would change other computations of the module.
    """
    ups, down, dropout = chain.ups, chain.down, found.hidden_dropout
    inner = [path for path in trial.calls if path in chain.hidden.sources]
    # layers between the linear layers, and modules that receive only the tokens: the first linear layers and their
    # parents
    inner = [path for path in inner if path in trial.other_parts or len(trial.get_argument_ids([path, *ups])) == 1]
    bypass = [path for path in inner if not path.startswith(tuple(f"{outer}." for outer in inner))]
    reused = [path for path in (*bypass, down) if len(trial.calls[path]) > 1]
    if reused:
        raise UnsupportedNetworkError(f"{reused[0]} is called more than once")
    ones = found.up if len(ups) == 2 and found.up in bypass else None
    second_trace = BlockTracer(trial.module, {path: 1.0 if path == ones else None for path in bypass})
    bypassed = [match_adapter(second_trace, each) for each in second_trace.chains if each.down == down]
    if not bypassed or bypassed[0].gate or not isinstance(bypassed[0].activation, nn.Identity):
        raise UnsupportedNetworkError(
            f"{type(trial.module).__name__} implements the computation between the linear layers in its own code"
        )
    output_dropout = None  # if the dropout is also applied after the last layer, the MoE must include it
    if bypassed[0].hidden_dropout is not None:
        after = [locate_dropout(node.kwargs) for node in chain.output.users if node.target is F.dropout].count(dropout)
        if not isinstance(dropout, str) or trial.source_uses.count(dropout) > 1 + after:
            raise UnsupportedNetworkError(f"the network's dropout ({dropout}) cannot be disabled separately")
        output_dropout = dropout if after else None
    return replace(found, output_dropout=output_dropout, slot=True, bypass=tuple(bypass), ones=ones)
