"""Adapters, which locate the parts of a feed-forward network, and `read_dense_ffn`, which reads a network with one.

Axes: d model dim, h hidden dim, e experts.
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
    """The parts of a feed-forward network, as paths relative to its module.

    Args:
        up: the first linear layer; in a gated network, the one whose output is not passed through the activation.
        down: the last linear layer.
        gate: the linear layer of a gated network whose output is passed through the activation. Equal to `up` if one
            layer computes both.
        activation: the path of the activation (a module or a function), or the module itself.
        hidden_dropout: dropout between activation and `down`: the path of a module or rate, or the rate itself.
        output_dropout: dropout after `down`, in the same format.
        slot: whether the module also does other things and calls the parts individually. If so, the MoE replaces
            `down`, and identities replace `hidden_dropout` and the parts listed in `bypass`. Otherwise the MoE replaces
            the whole module.
        bypass: with `slot`, paths of parts that become identities.
        ones: with `slot`, the path of a part that returns 1 instead, because the model multiplies by its result.
        halves: the order of the outputs for `gate` and `up` if one layer computes both.
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
        """Return the paths of the linear layers, keyed by their number in the names of expert weights: "1", "2",
        "3"."""
        paths = {"1": self.gate or self.up, "2": self.down}
        return paths if self.gate is None else {**paths, "3": self.up}


class NetworkLocation(NamedTuple):
    """A feed-forward network in a model."""

    name: str  # path of the module that the adapter describes
    module: nn.Module
    adapter: Adapter

    @property
    def moe_path(self) -> str:
        """The path of the future MoE."""
        return f"{self.name}.{self.adapter.down}".removeprefix(".") if self.adapter.slot else self.name


@dataclass(frozen=True)
class DenseFFN:
    """A dense feed-forward network: `act(x w1 + b1) w2 + b2` or, if gated, `(act(x w1 + b1) * (x w3 + b3)) w2 + b2`.

    Args:
        weights: views of the network's weights, keyed by their names in experts: w1, w3 `(d, h)`, w2 `(h, d)`, b1, b3
            `(h,)`, b2 `(d,)`. They require gradients if the network's weights do.
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
        """Return the output `(..., d)` of the network for tokens `(..., d)`."""
        hidden = self.activation(self._linear(x, "1"))
        if self.is_gated:
            hidden = hidden * self._linear(x, "3")
        return self._linear(hidden, "2")

    def _linear(self, x: Tensor, number: str) -> Tensor:
        return F.linear(x, self.weights[f"w{number}"].T, self.weights.get(f"b{number}"))


@torch.enable_grad()  # enabled so that views show which weights are frozen
def read_dense_ffn(module: nn.Module, adapter: Adapter) -> DenseFFN:
    """Read a network with its adapter.

    Raises:
        TypeError: a part is not a plain linear layer; for example, it is quantized or has a LoRA adapter.
        ValueError: weights are not in memory.
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
        activation = nn.Sequential(activation, dropout)  # also correct with a gate, because dropout is a factor
    return DenseFFN(weights, activation, read_dropout(module, adapter.output_dropout))


def check_not_offloaded(module: nn.Module, name: str) -> None:
    """Raise if a `device_map` left weights on disk or in another memory, because the modules do not hold them."""
    if any(map(is_offloaded, module.modules())):
        raise ValueError(
            f"the weights of {name} are not in memory because of the model's device_map; load the model without a "
            "device_map, or convert its folder with python -m mixture_of_experts.huggingface"
        )


def check_not_on_meta(module: nn.Module, name: str) -> None:
    """Raise if weights are not in memory."""
    check_not_offloaded(module, name)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"{name} has weights on the meta device; load them first, or convert its folder with python -m "
            "mixture_of_experts.huggingface"
        )


def check_not_wrapped(model: nn.Module) -> None:
    """Raise for a wrapper of a model, because the model inside is what loads, saves and returns a loss."""
    if get_wrapped_module(model) is not None or is_peft_wrapper(model):
        raise ValueError(
            f"{type(model).__name__} is a wrapper; modify the wrapped model (get_base_model() for PEFT, _orig_mod for "
            "torch.compile, module for DDP), or modify the model before wrapping it"
        )


def check_not_packed(model: nn.Module) -> None:
    """Raise if the weights of a model are packed as in a GGUF file."""
    if any(map(is_packed_gguf, model.modules())):
        raise ValueError(
            f"the weights of {type(model).__name__} are still packed in GGUF format; load the model with "
            "quantization_config=GgufConfig(dequantize=True)"
        )


def split_gate_up(tensor: Tensor, order: GateUpOrder) -> tuple[Tensor, Tensor]:
    """Split a weight or bias `(..., 2 h)` into gate and up, each `(..., h)`."""
    if order == "interleaved":
        return tensor[..., ::2], tensor[..., 1::2]
    first, second = tensor.chunk(2, dim=-1)
    return (first, second) if order == "gate_up" else (second, first)


def read_dropout(module: nn.Module, dropout: str | float | None) -> nn.Module | None:
    """Return the dropout as a module, given the path of a module or rate, or a rate. Return None if it drops
    nothing."""
    found = attrgetter(dropout)(module) if isinstance(dropout, str) else dropout
    if found is None or getattr(found, "p", found) == 0:
        return None
    return found if isinstance(found, nn.Module) else nn.Dropout(found)


def check_linear(layer: nn.Module, name: str, slot: bool) -> None:
    """Check that a layer is a plain linear layer, or GPT-2's `Conv1D`, which stores its weight as `(in, out)`. With
    `slot`, the module is not run to verify what the layer computes, so custom forwards are rejected too."""
    plain = isinstance(layer, Conv1D | nn.Linear) and all(
        type(p) in (nn.Parameter, Tensor) and p.is_floating_point() for p in layer.parameters()
    )
    if not plain or (slot and type(layer).forward not in (nn.Linear.forward, Conv1D.forward)):
        raise TypeError(
            f"expected {name} to be an nn.Linear, but it is a {type(layer).__name__}; replace feed-forward networks "
            "before quantizing the model, sharding it, or adding adapters"
        )


def call_or_none(compute: Callable[[], Any]) -> Tensor | None:
    """Return the tensor that unknown code returns, or None if it raises or returns something else."""
    try:
        out = compute()
    except Exception:
        return None
    return out if isinstance(out, Tensor) else None


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules and their submodules into evaluation mode while the context is active."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


#: names of `transformers` activation classes, mapped to torch modules for which experts have fast implementations
TORCH_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "GELUActivation": nn.GELU,
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "SiLUActivation": nn.SiLU,
}


def read_activation(activation: Any) -> nn.Module:
    """Return the torch module that computes an activation, or the activation itself if there is none."""
    make = TORCH_ACTIVATIONS.get(type(activation).__name__)
    return make_activation(activation) if make is None else make()
