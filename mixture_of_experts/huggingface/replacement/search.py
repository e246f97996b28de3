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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.huggingface.replacement.adapters import Adapter, Halves, NetworkSite
from mixture_of_experts.huggingface.replacement.symbolic import Bench, BlockCalls, Setting, Within, is_linear, record
from mixture_of_experts.ops.activations import SquaredReLU

#: parts of the paths or class names of modules that are not the feed-forward network of a block, or are experts
APART = re.compile(
    r"adapter|adaptor|lora_|router|expert|(^|_|\.)moe|sparsemoe|moeblock|pooler|projector|resampler|connector", re.I
)
LEADS_TO_EXPERTS = re.compile(r"router|expert", re.I)


class Miss(NamedTuple):
    """A network that was found, but cannot be replaced."""

    name: str  # path of its last linear layer
    kind: str  # class of the module that calls this layer
    reason: str
    narrow: bool = False  # whether it is a bottleneck, which is no feed-forward network of a block as a rule


def search(model: nn.Module, given: Iterable[str] = ()) -> tuple[list[NetworkSite], list[Miss]]:
    """The networks of a model that can be replaced, and those that cannot.

    Args:
        given: paths of modules whose networks are known already.
    """
    found: list[NetworkSite] = []
    misses: list[Miss] = []
    names = {module: name for name, module in model.named_modules()}
    skipped = tuple(f"{name}." for name in given)
    skipped += tuple(f"{name}." for name, module in model.named_modules() if name and is_routed(module))
    seen: set[nn.Module] = set()
    for name, module in reversed(list(model.named_modules())):  # each after the modules inside it
        if not is_place(name, module) or f"{name}.".startswith(skipped) or not own_linears(module) - seen:
            continue
        calls = record(module)
        for parts, adapter in [] if calls is None else networks(calls):
            last = names[parts[-1]]
            if any(part in seen for part in parts) or APART.search(last) or f"{last}.".startswith(skipped):
                continue
            if not is_of_stream(model, last, parts):
                continue
            if isinstance(adapter, Adapter):
                found.append(NetworkSite(name, module, adapter))
            else:
                narrow = isinstance(adapter, NarrowError)
                misses.append(Miss(last, type(module).__name__, str(adapter), narrow))
                if narrow:
                    continue
            seen.update(parts)
    return found, misses


NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


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


def networks(calls: BlockCalls) -> Iterator[tuple[tuple[nn.Module, ...], Adapter | UnfitError]]:
    """The networks whose last linear layer a module calls: their linear layers, and the adapter that tells where the
    parts are, or why they cannot be replaced."""
    for node in calls.graph.nodes:
        if is_linear(calls.called(node)) and (chain := Chain.before(calls, node)) is not None:
            try:
                yield chain.linears, chain.adapter()
            except UnfitError as unfit:
                yield chain.linears, unfit


class Chain(NamedTuple):
    """The calls from the first linear layers of a network to its last."""

    calls: BlockCalls
    ups: tuple[Node, ...]
    middle: tuple[Node, ...]
    down: Node
    bench: Bench

    @classmethod
    def before(cls, calls: BlockCalls, down: Node) -> Chain | None:
        """The network that ends in the call `down` of a linear layer; None if there is none."""
        if len(down.args) != 1 or down.kwargs or not isinstance(down.args[0], Node):
            return None
        ups: list[Node] = []
        middle: list[Node] = []
        todo = [down.args[0]]
        while todo:
            node = todo.pop()
            if node in ups or node in middle:
                continue
            layer = calls.called(node)
            if is_linear(layer):
                ups.append(node)
                continue
            holds_linear = layer is not None and any(is_linear(child) for child in layer.modules())
            if node.op == "placeholder" or holds_linear or len(middle) > 60:
                return None
            middle.append(node)
            todo += node.all_input_nodes
        order = {node: i for i, node in enumerate(calls.graph.nodes)}
        chain = cls(calls, tuple(sorted(ups, key=lambda up: order[up])), tuple(middle), down, Bench())
        return chain if chain._is_network() else None

    def _is_network(self) -> bool:
        if not 1 <= len(self.ups) <= 2 or not self.middle or len(set(self.linears)) <= len(self.ups):
            return False
        if any(len(up.args) != 1 or up.args != self.ups[0].args or up.kwargs for up in self.ups):
            return False
        layers = [self.calls.called(node) for node in self.middle]
        if any(p.ndim > 1 for layer in layers if layer is not None for p in layer.parameters()):
            return False  # for example a convolution, which mixes tokens
        (d, width), (h, out) = sizes(self.linears[0]), sizes(self.linears[-1])
        widths = {sizes(up) for up in self.linears[:-1]}
        fits = widths == {(d, h)} or (len(self.ups) == 1 and width == 2 * h)
        return fits and out == d

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The linear layers, in the order of their calls."""
        found = [self.calls.called(node) for node in (*self.ups, self.down)]
        return tuple(layer for layer in found if layer is not None)

    @property
    def dropouts(self) -> list[Node]:
        return [node for node in self.middle if is_dropout(self.calls, node)]

    @property
    def activations(self) -> list[Node]:
        """The calls of layers between the linear ones, without dropouts."""
        return [node for node in self.middle if node.op == "call_module" and node not in self.dropouts]

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
        bypass = self._bypass()
        output_dropout = None if inner is None else self._other_use(inner)
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
        generator = torch.Generator("cpu").manual_seed(0)
        a, b = (2 * torch.randn(5, h, generator=generator, device="cpu") for _ in range(2))
        with torch.no_grad():
            for activation in self._candidates():
                for gate, up, halves, given in self._forms(a, b):
                    wanted = self._compute(given)
                    found = self.bench.apply(activation, a if gate is None else b)
                    if found is None or wanted is None:
                        continue
                    if equal(found if gate is None else found * a, wanted):
                        return self._as_part(activation, a), gate, up, halves
        names = [str(getattr(node.target, "__name__", node.target)) for node in reversed(self.middle)]
        raise UnfitError(f"no activation is known that computes its hidden layer ({', '.join(names)})")

    def _forms(self, a: Tensor, b: Tensor) -> Iterator[tuple[Node | None, Node, Halves, dict[Node, Tensor]]]:
        """The forms in which a may multiply the activation of b: gate, up, halves, and the linear layers' results."""
        first, last = self.ups[0], self.ups[-1]
        if first is not last:
            yield first, last, "gate_up", {first: b, last: a}
            yield last, first, "gate_up", {first: a, last: b}
        elif sizes(self.linears[0])[1] == a.shape[-1]:
            yield None, first, "gate_up", {first: a}
        else:
            yield first, first, "gate_up", {first: torch.cat([b, a], dim=-1)}
            yield first, first, "up_gate", {first: torch.cat([a, b], dim=-1)}
            yield first, first, "interleaved", {first: torch.stack([b, a], dim=-1).flatten(-2)}

    def _candidates(self) -> Iterator[nn.Module]:
        yield from (nn.SiLU(), nn.GELU("tanh"), nn.GELU(), nn.ReLU(), SquaredReLU(), nn.Tanh())
        for node in self.activations:
            layer = self.calls.called(node)
            if layer is not None:
                yield layer
        yield from (nn.Sigmoid(), nn.Identity()) if len(self.activations) == 0 else ()

    def _as_part(self, activation: nn.Module, a: Tensor) -> str | nn.Module:
        """The path of the activation if it is a layer of the network, which must compute each hidden unit alone."""
        for node in self.activations:
            if self.calls.called(node) is activation:
                some, all_units = a[:, : a.shape[-1] // 2], self.bench.apply(activation, a)
                alone = self.bench.apply(activation, some)
                if alone is None or all_units is None or not equal(alone, all_units[:, : some.shape[-1]]):
                    raise UnfitError(f"{node.target} computes the units of its hidden layer together")
                return target(node)
        return activation

    def _compute(self, given: dict[Node, Tensor]) -> Tensor | None:
        (result,) = self.down.args
        return self.bench.compute(self.calls, result, given, lambda node: node in self.dropouts)  # pyright: ignore[reportArgumentType]

    def _after(self) -> tuple[bool, str | float | None]:
        """Whether the module does nothing but this network, and the dropout at its end."""
        node, dropout = self.calls.output, None
        if isinstance(node, Node) and is_dropout(self.calls, node):
            dropout, node = place_of(self.calls, node), node.args[0]
        alone = node is self.down and self.calls.lone and self.ups[0].args == self.calls.arguments
        others = [child for child in self.calls.module.modules() if is_linear(child) and child not in self.linears]
        return alone and not others, dropout

    def _inner_dropout(self) -> Node | None:
        """The active dropout between the linear layers; None if there is none."""
        active = [node for node in self.dropouts if rate(self.calls, node)]
        for node in active:
            later = {user for user in after(node) if user in self.middle and user not in self.dropouts}
            if not all(user.target in PRODUCTS or user.target in HARMLESS for user in later):
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
        if any(inner in child.nodes for child in self._children()):
            return None  # its module becomes an identity
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

    def _bypass(self) -> tuple[str, ...]:
        """The paths of parts that must become identities, so that tokens reach the last layer."""
        children = self._children()
        gone = set().union(*(child.nodes for child in children))
        for node in self.middle:
            product = len(self.ups) > 1 and node.target in PRODUCTS
            if node in gone or node in self.dropouts or node.target in HARMLESS or product:
                continue
            if node.op != "call_module":
                name = getattr(node.target, "__name__", node.target)
                raise UnfitError(f"{name} between its linear layers is part of the code of {self._kind}")
            if self._times_called(node) > 1:
                raise UnfitError(f"{node.target} is the activation of something else too")
        if sizes(self.linears[0])[1] != sizes(self.linears[-1])[0] and next(iter(self.ups)) not in gone:
            raise UnfitError(f"its halves are taken apart in the code of {self._kind}")
        rest = [target(node) for node in (*self.ups, *self.activations) if node not in gone]
        return (*(child.path for child in children), *rest)

    @property
    def _kind(self) -> str:
        return type(self.calls.module).__name__


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


def rate(calls: BlockCalls, node: Node) -> float:
    """The probability of a dropout; UnfitError if it is not known."""
    layer: Any = calls.called(node)
    if layer is not None:
        return layer.p
    if node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is not True:
        raise UnfitError("its dropout does not tell when it is active")
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    if not isinstance(p, float | int):
        raise UnfitError("its dropout has no fixed probability")
    return p


def place_of(calls: BlockCalls, node: Node) -> str | float | None:
    """The place of a dropout: the path of a module or of a number, or else the number itself."""
    if node.op == "call_module":
        return target(node)
    p = rate(calls, node)
    return p.path if isinstance(p, Setting) else (float(p) or None)


def uses(calls: BlockCalls, node: Node, place: str) -> bool:
    """Whether a call is one of the layer at `place`, or gets the number that is there."""
    given = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, Setting)]
    return (node.op == "call_module" and node.target == place) or any(value.path == place for value in given)


def after(node: Node) -> set[Node]:
    """All nodes that depend on a node."""
    found: set[Node] = set()
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user not in found:
            found.add(user)
            todo += user.users
    return found


def equal(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted.to(found.dtype), atol=2e-6, rtol=2e-5)
