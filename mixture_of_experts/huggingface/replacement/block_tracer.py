"""Traces a module's `forward` by running it once with random numbers in place of the outputs of its linear layers.

The operations between two linear layers run on these random numbers, which reveals how the input of each layer is
computed. All other values are unknown and represented by symbols (`torch.fx.Proxy`). A trace therefore requires neither
inputs nor weights, and the module may be on the meta device. The trace runs a copy of the module, and has no side
effects on the module, torch or the process.

Axes: d (model dimension), h (hidden dimension), w (output features of a linear layer).
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer, TraceError
from transformers.pytorch_utils import Conv1D


class TracedTensor(Tensor):
    """Random numbers `(2, 3, w)` that represent the output of a linear layer, or values computed from such numbers."""

    sources: frozenset[str | float]  # paths of the layers and locations of the dropouts that produced the tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = frozenset().union(*(numbers.sources for numbers in find_traced_tensors((args, kwargs))))
        if func is F.dropout:
            if (place := locate_dropout(kwargs)) is None:
                return args[0]
            # a factor of -2 marks where the dropout is applied
            func, args, kwargs, source = torch.mul, (args[0], -2), {}, source | {place}
        out = super().__torch_function__(func, types, args, kwargs)
        for numbers in find_traced_tensors(out):
            numbers.sources = source
        written = isinstance(out, Tensor) and any(type(value) is Tensor and value.is_set_to(out) for value in args)
        if written or out is None or isinstance(out, float):
            raise TypeError(f"{func} reads values or copies them into another tensor, so it cannot be traced")
        return out


class TracedSetting(float):
    """The value of a module's float attribute, along with the path of this attribute."""

    path: str


class LinearChain(NamedTuple):
    """Linear layers that may form a feed-forward network. The input of the last layer is computed from the outputs of
    the others."""

    ups: list[str]  # paths of the first layers, in call order
    down: str  # path of the last layer
    hidden: TracedTensor  # the input of the last layer
    output: Node  # its result


class BlockTracer(GraphAppendingTracer):
    """A trace of a module's `forward` in training mode.

    Args:
        bypass: maps the path of each submodule that is not run to the number that it returns. If the number is None,
            the submodule returns its input or, if it contains linear layers, random numbers.
    """

    module: nn.Module
    bypass: dict[str, float | None]
    symbols: list[Proxy]  # required arguments of the forward method
    has_one_argument: bool
    output: Any  # the module's return value, in which a `Node` replaces each symbol

    def __init__(self, module: nn.Module, bypass: dict[str, float | None] | None = None) -> None:
        super().__init__(Graph())
        self.module, self.bypass = module, bypass or {}
        self.calls: dict[str, list[Any]] = defaultdict(list)  # arguments of all calls, keyed by submodule
        self.results: dict[str, TracedTensor] = {}  # results of linear layers
        self.other_parts: dict[str, nn.Module] = {}  # other layers that received traced tensors as input
        # sources of traced values, repeated for each linear layer or symbol that reads them
        self.source_uses: list[str | float] = []
        self.chains: list[LinearChain] = []
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        self.symbols = [self.create_proxy("placeholder", name, (), {}) for name in needed]
        self.has_one_argument = len(parameters) == 1
        try:
            with torch.device("cpu"):
                self.output = self.create_arg(type(module).forward(self.copy_module(), *self.symbols))
        except Exception:  # arbitrary code may fail on symbols
            self.chains.clear()

    def copy_module(self) -> Any:
        """Return a copy of the module, in training mode, whose submodules are run by `call_part`. The copy shares all
        attributes except modules, weights and buffers. The copy's weights and buffers have arbitrary values."""
        memo: dict[int, Any] = {}
        for part in self.module.modules():
            for name, value in vars(part).items():
                if name not in ("_modules", "_parameters", "_buffers"):
                    memo[id(value)] = type(value)() if "hooks" in name else value
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            memo[id(tensor)] = torch.full((), 0.37, dtype=torch.float32).expand(tensor.shape)
        copied = copy.deepcopy(self.module, memo).train()
        for path, part in copied.named_modules():
            for name, value in vars(part).items():
                if isinstance(value, float):
                    vars(part)[name] = setting = TracedSetting(value)
                    setting.path = f"{path}.{name}".removeprefix(".")
            part.forward = partial(self.call_part, part, path)
        return copied

    def call_part(self, part: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        """Run a submodule and return its output. The output is either random numbers or the result of the submodule's
        `forward`. If the submodule is not needed or cannot be run, the output is a symbol."""
        self.calls[path].append(args)
        given, before = find_traced_tensors((args, kwargs)), len(self.chains)
        outer = any(map(is_linear_layer, part.modules()))
        runs = outer or isinstance(part, nn.Dropout)
        if path in self.bypass:
            (x,) = args
            return self.bypass[path] or (self.draw_result(path, 8) if outer else x)
        if is_linear_layer(part):
            return self.call_linear(part, path, *args, **kwargs)
        # modules with multi-dimensional parameters may mix tokens
        if not runs and given and all(p.ndim < 2 for p in part.parameters()):
            runs, self.other_parts[path] = True, part
        try:
            if runs:
                out = type(part).forward(part, *args, **kwargs)
                for numbers in find_traced_tensors(out):
                    numbers.sources |= {path}
                return out
        except Exception:  # arbitrary code may fail on symbols
            del self.chains[before:]
        return self.create_proxy("call_module", path, args, kwargs)

    def call_linear(self, layer: nn.Module, path: str, x: Any) -> Any:
        """Return a symbol if a linear layer can be the last layer of a network. Otherwise, return random numbers."""
        source = x.sources if isinstance(x, TracedTensor) else frozenset()
        self.source_uses += source
        ups = [up for up in self.results if up in source]
        (h, d), widths = get_linear_sizes(layer), [get_linear_sizes(self.module.get_submodule(up)) for up in ups]
        fits = d <= h and widths in ([(d, h)], [(d, 2 * h)], [(d, h)] * 2) and not x.equal(self.results[ups[0]])
        if ups and (self.bypass or (fits and len(self.get_argument_ids(ups)) == 1)):
            out = self.create_proxy("call_module", path, (), {})
            self.chains.append(LinearChain(ups, path, x, out.node))
            return out
        return self.draw_result(path, d)

    def get_argument_ids(self, paths: list[str]) -> set[int]:
        """Return the `id()` of each argument that was passed to the submodules at `paths` in their last calls."""
        return {id(x) for path in paths for x in self.calls[path][-1]}

    def draw_result(self, path: str, width: int) -> Tensor:
        """Draw random numbers that represent the output of a linear layer."""
        generator = torch.Generator().manual_seed(len(self.results))
        drawn = torch.randn(2, 3, width, generator=generator, dtype=torch.float32)
        self.results[path] = numbers = drawn.as_subclass(TracedTensor)
        numbers.sources = frozenset([path])
        return numbers.clone()  # a copy, because in-place activations may overwrite the original

    def proxy(self, node: Node) -> Proxy:
        symbol: Any = Proxy(node, self)
        symbol.dtype = torch.float32  # prevents the traced code from casting values
        return symbol

    def to_bool(self, obj: Proxy) -> bool:
        """Return False for conditions on unknown values, such as checks for infinities."""
        if len(self.graph.nodes) > 5000:
            raise TraceError("the network has a data-dependent loop")
        return False

    def create_arg(self, a: Any) -> Any:
        """Prepare an argument for use in the traced graph."""
        if isinstance(a, TracedTensor):
            self.source_uses += a.sources
        if isinstance(a, TracedSetting):
            self.source_uses.append(a.path)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return a  # keep any other object unchanged


def find_traced_tensors(values: Any) -> list[TracedTensor]:
    found: list[Any] = []
    map_aggregate(values, found.append)
    return [value for value in found if isinstance(value, TracedTensor)]


def locate_dropout(settings: Any) -> str | float | None:
    """Return the path of a dropout's rate, or the rate itself if it has no path. Return None if the dropout is
    inactive."""
    p = settings["p"]
    return getattr(p, "path", p) if p and settings["training"] else None


def is_linear_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, which may be quantized or have adapters."""
    return all(isinstance(size, int) for size in get_linear_sizes(module))


def get_linear_sizes(linear: Any) -> tuple[Any, Any]:
    """Return the numbers of input and output features of a linear layer."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return getattr(linear, "in_features", None), getattr(linear, "out_features", None)
