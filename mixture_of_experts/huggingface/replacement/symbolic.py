"""Records what a module's forward calls, as a graph of layers and functions, without computing anything.

The forward runs once on symbols (`torch.fx.Proxy`). So it needs neither inputs nor weights, and a module may be on the
meta device. It runs on a copy of the module that shares everything with it, except that stubs which record their calls
take the places of children. The module, torch and the process are not changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer, TraceError
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.huggingface.feed_forward import tensors_of
from mixture_of_experts.huggingface.replacement.adapters import tried


class Within(NamedTuple):
    """The calls inside a child of a module."""

    path: str
    given: tuple[Any, ...]  # arguments of the child
    output: Any
    nodes: frozenset[Node]


class BlockCalls(NamedTuple):
    """The calls of a module, from its arguments to its output."""

    module: nn.Module
    graph: Graph
    arguments: tuple[Node, ...]  # arguments of its forward; the first is the tokens
    lone: bool  # whether the forward takes no other argument
    output: Any  # a node, or something that holds nodes
    children: tuple[Within, ...]  # children whose own calls are in the graph

    def called(self, node: Any) -> nn.Module | None:
        """The layer that a node calls; None if it calls none."""
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))


class Setting(float):
    """A number that is an attribute of a module, with the path of the attribute."""

    path: str


class Recorder(GraphAppendingTracer):
    """Writes the calls of symbols into a graph."""

    asked: int = 0

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__(Graph())
        self.like = like
        self.children: list[Within] = []

    def proxy(self, node: Node) -> Proxy:
        symbol: Any = Proxy(node, self)
        symbol.dtype, symbol.device = self.like.dtype, self.like.device  # all that is known of a tensor
        return symbol

    def to_bool(self, obj: Proxy) -> bool:
        """A condition on values, such as a check for infinities, is False."""
        self.asked += 1
        if self.asked > 1000:
            raise TraceError("a loop that ends by a value")
        return False

    def create_arg(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return a  # any other object


class Stub:
    """Stands in the place of a child: records its call, or the calls inside it; has the child's attributes."""

    def __init__(self, recorder: Recorder, module: nn.Module, path: str) -> None:
        self.__dict__.update(_recorder=recorder, _child=module, _path=path)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._child)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder, child, path = self._recorder, self._child, self._path
        if is_leaf(child):
            return recorder.create_proxy("call_module", path, args, kwargs)
        nodes, children = len(recorder.graph.nodes), len(recorder.children)
        try:
            out = type(child).forward(skeleton(recorder, child, path), *args, **kwargs)
        except Exception:  # a child that cannot be read becomes one node
            for node in reversed(list(recorder.graph.nodes)[nodes:]):
                recorder.graph.erase_node(node)
            del recorder.children[children:]
            return recorder.create_proxy("call_module", path, args, kwargs)
        given = recorder.create_arg((*args, *kwargs.values()))
        within = frozenset(list(recorder.graph.nodes)[nodes:])
        recorder.children.append(Within(path, given, recorder.create_arg(out), within))
        return out


def record(module: nn.Module) -> BlockCalls | None:
    """The calls of a module's forward, in training; None if it cannot be read."""
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    recorder = Recorder(torch.empty(0) if like is None else like)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    symbols = {p.name: recorder.create_proxy("placeholder", p.name, (), {}) for p in parameters if is_needed(p)}
    if not symbols:
        return None
    try:
        out = type(module).forward(skeleton(recorder, module, ""), **symbols)
        given = tuple(symbol.node for symbol in symbols.values())
        return BlockCalls(
            module, recorder.graph, given, len(parameters) == 1, recorder.create_arg(out), tuple(recorder.children)
        )
    except Exception:  # unknown code, run on symbols
        return None


def is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def skeleton(recorder: Recorder, module: nn.Module, path: str) -> Any:
    """A copy of a module in training mode, with stubs in the places of its children."""
    shell = object.__new__(type(module))
    prefix = f"{path}." if path else ""
    for name, value in module.__dict__.items():
        if isinstance(value, float):
            setting = Setting(value)
            setting.path = prefix + name
            value = setting
        shell.__dict__[name] = value
    shell.__dict__["training"] = True
    shell.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    shell.__dict__["_modules"] = {
        name: child
        if child is None
        else skeleton(recorder, child, prefix + name)
        if isinstance(child, nn.ModuleList | nn.ModuleDict)
        else Stub(recorder, child, prefix + name)
        for name, child in module._modules.items()
    }
    return shell


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer of any kind, also quantised or with adapters."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is recorded as one call, without a look inside."""
    return is_linear(module) or not any(is_linear(child) for child in module.modules())


class Bench(Interpreter):
    """Computes parts of a graph with copies of its layers, in evaluation, on the CPU and in float32."""

    def __init__(self, calls: BlockCalls) -> None:
        super().__init__(calls.module, garbage_collect_values=False, graph=calls.graph)
        self.copies: dict[nn.Module, nn.Module] = {}

    def copy(self, module: nn.Module) -> nn.Module:
        """The copy of a module, made once; of arbitrary numbers if the module is on the meta device."""
        if module not in self.copies:
            own = copy.deepcopy(module)
            if any(tensor.is_meta for tensor in tensors_of(own).values()):
                own.to_empty(device="cpu")
                for tensor in own.state_dict().values():
                    tensor.fill_(0.5)
            self.copies[module] = own.cpu().float().eval()
        return self.copies[module]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.copy(self.module.get_submodule(target))(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0] if target is F.dropout else target(*args, **kwargs)

    def compute(self, nodes: list[Node], given: Mapping[Node, Tensor]) -> Tensor | None:
        """The value of the last of some nodes, in the order of their calls, from the given values of others; None if it
        cannot be computed."""

        def run() -> Any:
            self.env = dict(given)
            for node in nodes:
                self.env[node] = self.run_node(node)
            return self.env[nodes[-1]]

        return tried(run)

    def apply(self, activation: nn.Module, x: Tensor) -> Tensor | None:
        """The result of an activation; None if the module is none."""
        out = tried(lambda: self.copy(activation)(x))
        return out if out is not None and out.shape == x.shape else None
