"""Finds feed-forward networks by their structure, in models of unknown classes.

A network is two linear layers with an activation between them, or three layers, two of which are multiplied. Both ends
are as wide as the residual stream, the middle is no narrower, and all lie inside a numbered block. `symbolic.py`
records what the block's forward calls. The activation is found by trial: the hidden layer is computed on random
numbers, and an activation with equal results is accepted.

Axes: d model dim, h hidden dim.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.huggingface.replacement.adapters import Adapter, Halves, NetworkSite
from mixture_of_experts.huggingface.replacement.symbolic import (
    Bench,
    BlockCalls,
    Setting,
    Within,
    is_leaf,
    is_linear,
    record,
)
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
    narrow: bool = False  # whether it is a bottleneck, which is no feed-forward network of a block as a rule


def search(model: nn.Module, given: Mapping[str, Adapter | Miss]) -> tuple[list[NetworkSite], list[Miss]]:
    """The networks of a model that can be replaced, and those that cannot.

    Args:
        given: what is known already of the networks of some modules, by their paths.
    """
    known = ((name, each) for name, each in given.items() if isinstance(each, Adapter))
    found = [NetworkSite(name, model.get_submodule(name), adapter) for name, adapter in known]
    misses = [each for each in given.values() if isinstance(each, Miss)]
    names = {module: name for name, module in model.named_modules()}
    apart = [*given, *(name for module, name in names.items() if name and is_routed(module))]
    skipped, seen = tuple(f"{name}." for name in apart), set[nn.Module]()
    for module, name in reversed(names.items()):  # each after the modules inside it
        if not is_place(name, module) or f"{name}.".startswith(skipped) or not own_linears(module) - seen:
            continue
        for parts, adapter in networks(module):
            last = names[parts[-1]]
            elsewhere = APART.search(last) or f"{last}.".startswith(skipped)
            if elsewhere or not seen.isdisjoint(parts) or not is_of_stream(model, last, parts):
                continue
            if isinstance(adapter, Adapter):
                found.append(NetworkSite(name, module, adapter))
            else:
                misses.append(Miss(last, type(module).__name__, str(adapter), isinstance(adapter, NarrowError)))
            if not isinstance(adapter, NarrowError):
                seen.update(parts)
    order = list(names.values())
    return sorted(found, key=lambda site: order.index(site.name)), misses


def is_place(name: str, module: nn.Module) -> bool:
    """Whether a module is a numbered block or lies inside one, and may hold the block's network."""
    if not NUMBER.search(name) or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    if APART.search(name) or APART.search(type(module).__name__):
        return False
    return sum(is_linear(child) for child in module.modules()) >= 2


def is_of_stream(model: nn.Module, name: str, parts: tuple[nn.Module, ...]) -> bool:
    """Whether a network is as wide as a norm or another linear layer of its block."""
    around = inside = model
    for part in name.split("."):
        outside, inside = inside, inside.get_submodule(part)
        around = inside if isinstance(outside, nn.ModuleList) else around
    widths: set[int] = set()
    for module in around.modules():
        if is_linear(module) and module not in parts:
            widths.update(sizes(module))
        elif not is_linear(module):
            widths.update(len(p) for p in module.parameters(recurse=False) if p.ndim == 1)
    return not widths or sizes(parts[-1])[1] in widths


def is_routed(module: nn.Module) -> bool:
    """Whether a module has children that are experts, with or without a router."""
    return any(LEADS_TO_EXPERTS.search(name) for name, _ in module.named_children())


def own_linears(module: nn.Module) -> set[nn.Module]:
    """The linear layers of a module that lie in no list of blocks inside it, as no network spans blocks."""
    own = {module} if is_linear(module) else set()
    within = [child for child in module.children() if not isinstance(child, nn.ModuleList | nn.ModuleDict)]
    return own.union(*(own_linears(child) for child in within))


class UnfitError(Exception):
    """Says why a network cannot be replaced."""


class NarrowError(UnfitError):
    """Its hidden layer is narrower than its inputs."""


def networks(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, ...], Adapter | UnfitError]]:
    """The networks whose last linear layer a module calls: their linear layers, and the adapter that tells where the
    parts are, or why they cannot be replaced."""
    calls = record(module)
    if calls is None:
        return
    for node in calls.graph.nodes:
        if is_linear(calls.called(node)) and (chain := Chain.before(calls, node)) is not None:
            try:
                yield chain.linears, chain.adapter()
            except UnfitError as unfit:
                yield chain.linears, unfit


class Chain(NamedTuple):
    """The calls from the first linear layers of a network to its last."""

    calls: BlockCalls
    ups: list[Node]
    middle: list[Node]
    down: Node

    @classmethod
    def before(cls, calls: BlockCalls, down: Node) -> Chain | None:
        """The network that ends in the call `down` of a linear layer; None if there is none."""
        ups: set[Node] = set()
        middle: set[Node] = set()
        todo = down.all_input_nodes
        while todo:
            node = todo.pop()
            layer = calls.called(node)
            if is_linear(layer):
                ups.add(node)
            elif node.op == "placeholder" or not (layer is None or is_leaf(layer)) or len(middle) > 60:
                return None
            elif node not in middle:
                middle.add(node)
                todo += node.all_input_nodes
        nodes = calls.graph.nodes  # in the order of their calls
        chain = cls(calls, [node for node in nodes if node in ups], [node for node in nodes if node in middle], down)
        return chain if chain._is_network() else None

    def _is_network(self) -> bool:
        if not 1 <= len(self.ups) <= 2 or not self.middle or len(set(self.linears)) <= len(self.ups):
            return False
        if any(len(node.args) != 1 or node.kwargs for node in (*self.ups, self.down)):
            return False
        if any(up.args != self.ups[0].args for up in self.ups):
            return False
        if any(p.ndim > 1 for layer in self.layers.values() for p in layer.parameters()):
            return False  # for example a convolution, which mixes tokens
        (d, width), (h, out) = sizes(self.linears[0]), sizes(self.linears[-1])
        widths = {sizes(up) for up in self.linears[:-1]}
        fits = widths == {(d, h)} or (len(self.ups) == 1 and width == 2 * h)
        return fits and out == d

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The linear layers, in the order of their calls."""
        return tuple(self.calls.module.get_submodule(target(node)) for node in (*self.ups, self.down))

    @property
    def dropouts(self) -> list[Node]:
        return [node for node in self.middle if is_dropout(self.calls, node)]

    @property
    def layers(self) -> dict[Node, nn.Module]:
        """The layers between the linear ones, without dropouts, by their calls."""
        found = {node: self.calls.called(node) for node in self.middle if node not in self.dropouts}
        return {node: layer for node, layer in found.items() if layer is not None}

    def adapter(self) -> Adapter:
        """The adapter that tells where the parts are.

        Raises:
            UnfitError: the network cannot be replaced.
        """
        h, d = sizes(self.linears[-1])
        if h < d:
            raise NarrowError(f"its hidden layer of {h} units is narrower than its {d} inputs, as that of an adapter")
        self._check_alone()
        activation, gate, up, halves = self._hidden()
        whole, outer = self._after()
        inner = self._inner_dropout()
        place = None if inner is None else place_of(self.calls, inner)
        found = Adapter(target(up), target(self.down), gate and target(gate), activation, place, outer, halves=halves)
        if whole:
            return found
        children = self._children()
        gone = set().union(*(child.nodes for child in children))
        bypass = (*(child.path for child in children), *self._parts(gone))
        output_dropout = None if inner is None or inner in gone else self._other_use(inner)
        ones = target(up) if gate is not None and target(up) in bypass else None
        return replace(found, output_dropout=output_dropout, slot=True, bypass=bypass, ones=ones)

    def _check_alone(self) -> None:
        """Check that nothing else reads results inside the network, and that no layer is called twice."""
        nodes = {*self.ups, *self.middle, self.down}
        for node in (*self.ups, *self.middle):
            if any(user not in nodes for user in node.users):
                raise UnfitError("what is between its linear layers is used elsewhere too")
        for node in (*self.ups, self.down):
            if self._times_called(node) > 1:
                raise UnfitError(f"{node.target} is called twice")

    def _times_called(self, node: Node) -> int:
        return sum(n.op == "call_module" and n.target == node.target for n in self.calls.graph.nodes)

    def _hidden(self) -> tuple[str | nn.Module, Node | None, Node, Halves]:
        """The activation, the linear layers of gate and up, and the order of halves if both are one layer: the first
        candidates whose results equal what the calls compute."""
        h = sizes(self.linears[-1])[0]
        generator, bench = torch.Generator("cpu").manual_seed(0), Bench(self.calls)
        a, b = (2 * torch.randn(5, h, generator=generator, device="cpu") for _ in range(2))
        with torch.no_grad():
            for activation, path in self._candidates().items():
                result = bench.apply(activation, b)
                if result is None:
                    continue
                for gate, up, halves, given in self._forms(a, b):
                    if not equal(result if gate is None else result * a, bench.compute(self.middle, given)):
                        continue
                    half = h // 2
                    if path is not None and not equal(bench.apply(activation, b[:, :half]), result[:, :half]):
                        raise UnfitError(f"{path} computes the units of its hidden layer together")
                    return path or activation, gate, up, halves
        names = [str(getattr(node.target, "__name__", node.target)) for node in self.middle]
        raise UnfitError(f"no activation is known that computes its hidden layer ({', '.join(names)})")

    def _forms(self, a: Tensor, b: Tensor) -> Iterator[tuple[Node | None, Node, Halves, dict[Node, Tensor]]]:
        """The forms in which a may multiply the activation of b: gate, up, halves, and the linear layers' results."""
        first, last = self.ups[0], self.ups[-1]
        if first is not last:
            yield first, last, "gate_up", {first: b, last: a}
            yield last, first, "gate_up", {first: a, last: b}
        elif sizes(self.linears[0])[1] == a.shape[-1]:
            yield None, first, "gate_up", {first: b}
        else:
            yield first, first, "gate_up", {first: torch.cat([b, a], dim=-1)}
            yield first, first, "up_gate", {first: torch.cat([a, b], dim=-1)}
            yield first, first, "interleaved", {first: torch.stack([b, a], dim=-1).flatten(-2)}

    def _candidates(self) -> dict[nn.Module, str | None]:
        """Activations that the network may have; with its path, if it is a layer of the network."""
        known = (nn.SiLU(), nn.GELU("tanh"), nn.GELU(), nn.ReLU(), SquaredReLU(), nn.Tanh())
        own = {layer: target(node) for node, layer in self.layers.items()}
        return {**dict.fromkeys(known), **(own or dict.fromkeys((nn.Sigmoid(), nn.Identity())))}

    def _after(self) -> tuple[bool, str | float | None]:
        """Whether the module does nothing but this network, and the dropout at its end."""
        node, dropout = self.calls.output, None
        if isinstance(node, Node) and is_dropout(self.calls, node):
            dropout, node = place_of(self.calls, node), node.args[0]
        alone = node is self.down and self.calls.lone and self.ups[0].args == self.calls.arguments
        return alone and {*filter(is_linear, self.calls.module.modules())} == {*self.linears}, dropout

    def _inner_dropout(self) -> Node | None:
        """The active dropout between the linear layers; None if there is none."""
        active = [node for node in self.dropouts if place_of(self.calls, node)]
        later = {*active}
        for node in self.middle:
            if later.intersection(node.all_input_nodes):
                later.add(node)
        if any(node.target not in (*PRODUCTS, *HARMLESS) for node in later.difference(self.dropouts)):
            raise UnfitError("its dropout comes before its activation")
        if len(active) > 1:
            raise UnfitError("it has more than one dropout between its linear layers")
        return active[0] if active else None

    def _other_use(self, inner: Node) -> str | None:
        """The place of the inner dropout, if it serves after the last layer too: then the mixture must have it. Else
        None.

        Raises:
            UnfitError: the dropout cannot be turned off, or something else would be turned off with it.
        """
        place = place_of(self.calls, inner)
        if not isinstance(place, str):
            raise UnfitError("the dropout between its linear layers cannot be turned off")
        others = [n for n in self.calls.graph.nodes if n is not inner and uses(self.calls, n, place)]
        if any(not is_dropout(self.calls, other) or other.all_input_nodes != [self.down] for other in others):
            raise UnfitError(f"{place} is the dropout of something else too")
        return place if others else None

    def _children(self) -> list[Within]:
        """The calls of children that do nothing but a first part of this network."""
        own = {*self.ups, *self.middle}
        found: list[Within] = []
        for child in reversed(self.calls.children):  # outer before inner
            used = {node for node in child.nodes if node.users}
            first = child.given == self.ups[0].args and all(up in used for up in self.ups)
            if first and used <= own and child.output in own and not any(c.nodes >= child.nodes for c in found):
                found.append(child)
        return found

    def _parts(self, gone: Collection[Node]) -> list[str]:
        """The paths of parts that must become identities, so that tokens reach the last layer, beside those that are
        gone with a child."""
        kind = type(self.calls.module).__name__
        for node in self.middle:
            product = len(self.ups) > 1 and node.target in PRODUCTS
            if node in gone or node in self.dropouts or node.target in HARMLESS or product:
                continue
            if node.op != "call_module":
                name = getattr(node.target, "__name__", node.target)
                raise UnfitError(f"{name} between its linear layers is part of the code of {kind}")
            if self._times_called(node) > 1:
                raise UnfitError(f"{node.target} is the activation of something else too")
        if sizes(self.linears[0])[1] != sizes(self.linears[-1])[0] and self.ups[0] not in gone:
            raise UnfitError(f"its halves are taken apart in the code of {kind}")
        return [target(node) for node in (*self.ups, *self.layers) if node not in gone]


PRODUCTS = (operator.mul, torch.mul, "mul")
HARMLESS = ("to", "contiguous", "type_as", getattr)


def target(node: Node) -> str:
    return str(node.target)


def sizes(linear: Any) -> tuple[int, int]:
    """The numbers of inputs and outputs of a linear layer."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def is_dropout(calls: BlockCalls, node: Node) -> bool:
    return isinstance(calls.called(node), nn.Dropout) or node.target is F.dropout


def place_of(calls: BlockCalls, node: Node) -> str | float | None:
    """The place of a dropout: the path of a module or of a number, or else the number itself; None if it drops nothing.

    Raises:
        UnfitError: it cannot be known how much it drops.
    """
    layer: Any = calls.called(node)
    if layer is not None:
        return target(node) if layer.p else None
    if node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is not True:
        raise UnfitError("its dropout does not tell when it is active")
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    if not isinstance(p, float | int):
        raise UnfitError("its dropout has no fixed probability")
    return (p.path if isinstance(p, Setting) else float(p)) if p else None


def uses(calls: BlockCalls, node: Node, place: str) -> bool:
    """Whether a call is one of the layer at `place`, or gets the number that is there."""
    given = (value.path for value in (*node.args, *node.kwargs.values()) if isinstance(value, Setting))
    return place in given or (node.op == "call_module" and node.target == place)


def equal(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None or found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted.to(found.dtype), atol=2e-6, rtol=2e-5)
