"""Defines `Adapter`, which locates the parts of a dense feed-forward network, and `read_dense_ffn`, which reads its
weights.

Axes: d (model dimension), h (hidden dimension), e (experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.huggingface.private_peft import is_peft_wrapper
from mixture_of_experts.huggingface.private_transformers import is_offloaded, is_packed_gguf
from mixture_of_experts.ops.activations import make_activation
from mixture_of_experts.support.private_torch import get_wrapped_module

GateUpOrder = Literal["gate_up", "up_gate", "interleaved"]


@dataclass(frozen=True)
class Adapter:
    """Describes where the parts of a feed-forward network are located. Paths are relative to the network's module.

    Args:
        up: path of the first linear layer. In a gated network, this is the layer whose output does not pass through the
            activation.
        down: path of the last linear layer.
        gate: in a gated network, path of the linear layer whose output passes through the activation. If a single layer
            computes both outputs, this is the same path as `up`.
        activation: path of the activation module or function, or the activation module itself.
        hidden_dropout: the dropout between the activation and `down`, specified as the path of a module, the path of a
            rate, or a rate.
        output_dropout: the dropout after `down`, specified in the same way.
        slot: whether the module has other functions besides the network and calls the network's parts individually. If
            True, the `MoE` replaces only `down`, and identities replace `hidden_dropout` and the parts listed in
            `bypass`. If False, the `MoE` replaces the whole module.
        bypass: paths of the modules that are replaced with identity modules. Used only with `slot=True`.
        ones: path of a part that is replaced with a module that returns 1, because the model multiplies by the part's
            output. Used only with `slot=True`.
        halves: the order of the gate and up outputs if a single layer computes both.
    """

    up: str
    down: str
    gate: str | None = None
    activation: str | nn.Module = "act_fn"
    hidden_dropout: str | float | None = None
    output_dropout: str | float | None = None
    slot: bool = False
    bypass: tuple[str, ...] = ()
    ones: str | None = None
    halves: GateUpOrder = "gate_up"

    def linears(self) -> dict[str, str]:
        """Return the paths of the linear layers. The keys "1", "2" and "3" match the numbers in the names of the
        corresponding expert weights."""
        paths = {"1": self.gate or self.up, "2": self.down}
        return paths if self.gate is None else {**paths, "3": self.up}


class NetworkLocation(NamedTuple):
    """The location of a feed-forward network in a model."""

    name: str  # path of the module that the adapter describes
    module: nn.Module
    adapter: Adapter

    @property
    def moe_path(self) -> str:
        """The path at which the `MoE` layer will be inserted."""
        return f"{self.name}.{self.adapter.down}".removeprefix(".") if self.adapter.slot else self.name


@dataclass(frozen=True)
class DenseFFN:
    """A dense feed-forward network: `act(x w1 + b1) w2 + b2` or, if gated, `(act(x w1 + b1) * (x w3 + b3)) w2 + b2`.

    Args:
        weights: views of the network's weights, keyed by the names that experts use: w1 and w3 `(d, h)`, w2 `(h, d)`,
            b1 and b3 `(h,)`, b2 `(d,)`. A view requires gradients if the network's weight does.
    """

    weights: dict[str, Tensor]
    activation: nn.Module
    output_dropout: nn.Module | None

    @property
    def reference_weight(self) -> Tensor:
        """A weight with the network's dtype and device."""
        return self.weights["w1"]

    @property
    def is_gated(self) -> bool:
        return "w3" in self.weights

    @property
    def dim(self) -> int:
        return self.weights["w2"].shape[1]

    @property
    def hidden_dim(self) -> int:
        return self.weights["w2"].shape[0]

    def compute(self, x: Tensor) -> Tensor:
        """Return the network's output `(..., d)` for tokens `(..., d)`."""
        hidden = self.activation(self._linear(x, "1"))
        if self.is_gated:
            hidden = hidden * self._linear(x, "3")
        return self._linear(hidden, "2")

    def _linear(self, x: Tensor, number: str) -> Tensor:
        return F.linear(x, self.weights[f"w{number}"].T, self.weights.get(f"b{number}"))


@torch.enable_grad()  # with gradients enabled, the views show which weights are frozen
def read_dense_ffn(module: nn.Module, adapter: Adapter) -> DenseFFN:
    """Read the dense network that an adapter describes.

    Raises:
        TypeError: a part is not a plain linear layer, for example because it is quantized or has a LoRA adapter.
        ValueError: the weights are not in memory.
    """
    weights: dict[str, Tensor] = {}
    for number, path in adapter.linears().items():
        layer, name = attrgetter(path)(module), f"{path} of {type(module).__name__}"
        check_not_offloaded(layer, name)
        check_linear(layer, name, adapter.slot)
        weights[f"w{number}"] = layer.weight if isinstance(layer, Conv1D) else layer.weight.T
        if layer.bias is not None:
            weights[f"b{number}"] = layer.bias
    if adapter.gate == adapter.up:
        for one, three in (("w1", "w3"), ("b1", "b3")):
            if one in weights:
                weights[one], weights[three] = split_gate_up(weights[one], adapter.halves)
    activation_path = adapter.activation
    activation = read_activation(
        attrgetter(activation_path)(module) if isinstance(activation_path, str) else activation_path
    )
    dropout = read_dropout(module, adapter.hidden_dropout)
    if dropout is not None:
        # this order is also correct for gated networks, because dropout multiplies elementwise
        activation = nn.Sequential(activation, dropout)
    return DenseFFN(weights, activation, read_dropout(module, adapter.output_dropout))


def check_not_offloaded(module: nn.Module, name: str) -> None:
    """Raise ValueError if a `device_map` offloaded weights to disk or to another device's memory, because the modules
    then do not contain them."""
    if any(map(is_offloaded, module.modules())):
        raise ValueError(
            f"the weights of {name} are not in memory because of the model's device_map; load the model without a "
            "device_map, or convert its folder with python -m mixture_of_experts.huggingface"
        )


def check_not_on_meta(module: nn.Module, name: str) -> None:
    """Raise ValueError if the weights of a module are not in memory."""
    check_not_offloaded(module, name)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"{name} has weights on the meta device; load the weights first, or convert the saved model with "
            "python -m mixture_of_experts.huggingface"
        )


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if a model is a wrapper, because the wrapped model must be used for loading, saving and
    computing the loss."""
    if get_wrapped_module(model) is not None or is_peft_wrapper(model):
        raise ValueError(
            f"{type(model).__name__} is a wrapper; modify the wrapped model (get_base_model() for PEFT, _orig_mod for "
            "torch.compile, module for DDP), or modify the model before wrapping it"
        )


def check_not_packed(model: nn.Module) -> None:
    """Raise ValueError if any of a model's weights are packed in GGUF format."""
    if any(map(is_packed_gguf, model.modules())):
        raise ValueError(
            f"the weights of {type(model).__name__} are still packed in GGUF format; load the model with "
            "quantization_config=GgufConfig(dequantize=True)"
        )


def split_gate_up(tensor: Tensor, order: GateUpOrder) -> tuple[Tensor, Tensor]:
    """Split a weight or bias `(..., 2 h)` into its gate and up parts, each `(..., h)`."""
    if order == "interleaved":
        return tensor[..., ::2], tensor[..., 1::2]
    first, second = tensor.chunk(2, dim=-1)
    return (first, second) if order == "gate_up" else (second, first)


def read_dropout(module: nn.Module, dropout: str | float | None) -> nn.Module | None:
    """Return a dropout as a module, given a module's path, a rate's path, or a rate. Return None if the dropout is
    inactive."""
    found = attrgetter(dropout)(module) if isinstance(dropout, str) else dropout
    if found is None or getattr(found, "p", found) == 0:
        return None
    return found if isinstance(found, nn.Module) else nn.Dropout(found)


def check_linear(layer: nn.Module, name: str, slot: bool) -> None:
    """Raise TypeError if a layer is neither a plain linear layer nor GPT-2's `Conv1D`, which stores its weight as
    `(in, out)`.

    If `slot` is True, layers with a custom `forward` are also rejected, because their outputs cannot be verified
    without running the module.
    """
    plain = isinstance(layer, Conv1D | nn.Linear) and all(
        type(p) in (nn.Parameter, Tensor) and p.is_floating_point() for p in layer.parameters()
    )
    if not plain or (slot and type(layer).forward not in (nn.Linear.forward, Conv1D.forward)):
        raise TypeError(
            f"expected {name} to be an nn.Linear, but it is a {type(layer).__name__}; replace feed-forward networks "
            "before quantizing the model, sharding it, or adding adapters"
        )


def call_or_none(compute: Callable[[], Any]) -> Tensor | None:
    """Call `compute` and return the resulting tensor. Return None if it raises an exception or does not return a
    tensor."""
    try:
        out = compute()
    except Exception:
        return None
    return out if isinstance(out, Tensor) else None


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Context manager that puts modules and their submodules into evaluation mode."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


#: activation modules that the experts compute with fast implementations, keyed by `transformers` activation class
TORCH_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "GELUActivation": nn.GELU,
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "SiLUActivation": nn.SiLU,
}


def read_activation(activation: Any) -> nn.Module:
    """Convert an activation to the equivalent torch module. Return the activation itself if there is no such module."""
    make = TORCH_ACTIVATIONS.get(type(activation).__name__)
    return make_activation(activation) if make is None else make()
