"""Adapters tell where the parts of a feed-forward network are; `read_dense` reads a network by one.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.huggingface.private_transformers import is_elsewhere
from mixture_of_experts.ops.activations import make_activation
from mixture_of_experts.support.private_peft import from_peft
from mixture_of_experts.support.private_torch import wrapped_module

Halves = Literal["gate_up", "up_gate", "interleaved"]


@dataclass(frozen=True)
class Adapter:
    """The parts of a feed-forward network, as paths below its module.

    Args:
        up: the first linear layer; in a gated network the one whose result does not go through the activation.
        down: the last linear layer.
        gate: the linear layer of a gated network whose result goes through the activation. It is the same path as `up`
            if one layer computes both.
        activation: the path of the activation, a module or a function; or the module itself.
        hidden_dropout: dropout between activation and `down`: the path of a module or of a number, or the number.
        output_dropout: dropout after `down`, in the same form.
        slot: whether the module does other things too, and calls the parts one by one. Then the MoE replaces `down`,
            and identities replace `hidden_dropout` and the parts that `bypass` names. Otherwise the MoE replaces the
            whole module.
        bypass: with `slot`: paths of parts that become identities.
        ones: with `slot`: the path of a part that returns 1 instead, because the model multiplies by its result.
        halves: how the results of one layer for `gate` and `up` are ordered.
    """

    up: str
    down: str
    gate: str | None = None
    activation: str | nn.Module = "act_fn"
    hidden_dropout: str | float | None = None
    output_dropout: str | float | None = None
    slot: bool = False
    bypass: tuple[str, ...] = field(default=())
    ones: str | None = None
    halves: Halves = "gate_up"

    def linears(self) -> dict[str, str]:
        """The paths of the linear layers, by their number in experts: "1", "2", "3"."""
        paths = {"1": self.gate or self.up, "2": self.down}
        return paths if self.gate is None else {**paths, "3": self.up}


class NetworkSite(NamedTuple):
    """A feed-forward network in a model."""

    name: str  # path of the module that the adapter describes
    module: nn.Module
    adapter: Adapter

    @property
    def target(self) -> str:
        """The path at which the MoE will stand."""
        return f"{self.name}.{self.adapter.down}".removeprefix(".") if self.adapter.slot else self.name


@dataclass(frozen=True)
class Dense:
    """A dense feed-forward network: `act(x w1 + b1) w2 + b2`, gated `(act(x w1 + b1) * (x w3 + b3)) w2 + b2`.

    Weights are views of the network's own: w1, w3 `(d, h)`, w2 `(h, d)`, b1, b3 `(h,)`, b2 `(d,)`.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    b3: Tensor | None
    activation: nn.Module
    output_dropout: nn.Module | None

    @property
    def dim(self) -> int:
        return self.w1.shape[0]

    @property
    def hidden_dim(self) -> int:
        return self.w1.shape[1]

    def compute(self, x: Tensor) -> Tensor:
        """The output `(..., d)` of the network for tokens `(..., d)`."""
        hidden = self.activation(linear(x, self.w1, self.b1))
        if self.w3 is not None:
            hidden = hidden * linear(x, self.w3, self.b3)
        return linear(hidden, self.w2, self.b2)

    def weights(self) -> dict[str, Tensor]:
        """The weights and biases that are not None, by the names that they have in experts."""
        found = {name: getattr(self, name) for name in ("w1", "w2", "w3", "b1", "b2", "b3")}
        return {name: weight for name, weight in found.items() if weight is not None}


def read_dense(module: nn.Module, adapter: Adapter) -> Dense:
    """Read a network by its adapter.

    Raises:
        TypeError: a part is no plain linear layer, for example quantised or under a LoRA adapter.
        ValueError: weights are not in memory.
    """
    for path in adapter.linears().values():
        refuse_offloaded(part(module, path), f"{path} of {type(module).__name__}")
    w2, b2 = read_linear(module, adapter.down)
    w3 = b3 = None
    w1, b1 = read_linear(module, adapter.up)
    if adapter.gate == adapter.up:
        w1, w3 = halves_of(w1, adapter.halves)
        b1, b3 = (None, None) if b1 is None else halves_of(b1, adapter.halves)
    elif adapter.gate is not None:
        (w3, b3), (w1, b1) = (w1, b1), read_linear(module, adapter.gate)
    own = adapter.activation
    activation = read_activation(part(module, own) if isinstance(own, str) else own)
    dropout = read_dropout(module, adapter.hidden_dropout)
    if dropout is not None:
        activation = nn.Sequential(activation, dropout)  # also in a gated network: dropout multiplies
    return Dense(w1, w2, w3, b1, b2, b3, activation, read_dropout(module, adapter.output_dropout))


def refuse_offloaded(module: nn.Module, name: str) -> None:
    """Refuse weights that a `device_map` left on disk or in another memory: the modules hold none of them."""
    for inner in module.modules():
        if is_elsewhere(inner):
            raise ValueError(
                f"the weights of {name} are not in memory, because of the model's device_map: load the model without "
                "it, or change its folder by python -m mixture_of_experts.huggingface"
            )


def refuse_meta(module: nn.Module, name: str) -> None:
    """Refuse weights that are not in memory."""
    refuse_offloaded(module, name)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"{name} has weights on the meta device: load them first, or change its folder by python -m "
            "mixture_of_experts.huggingface"
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a wrapper around a model, which is not what loads, saves and returns a loss."""
    if wrapped_module(model) is not None or from_peft(model):
        raise ValueError(
            f"{type(model).__name__} is a wrapper: change the model in it (PEFT's get_base_model(), _orig_mod of "
            "torch.compile, module of DDP), or change the model before you wrap it"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def halves_of(tensor: Tensor, order: Halves) -> tuple[Tensor, Tensor]:
    """Gate and up, each `(..., h)`, from a weight or bias `(..., 2 h)`."""
    if order == "interleaved":
        return tensor[..., ::2], tensor[..., 1::2]
    first, second = tensor.chunk(2, dim=-1)
    return (first, second) if order == "gate_up" else (second, first)


def read_dropout(module: nn.Module, dropout: str | float | None) -> nn.Module | None:
    """The dropout as a module, from the path of a module or of a number, or from a number; None if it drops nothing."""
    found = part(module, dropout) if isinstance(dropout, str) else dropout
    if found is None or getattr(found, "p", found) == 0:
        return None
    return found if isinstance(found, nn.Module) else nn.Dropout(found)


def read_linear(module: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """The weight `(in, out)` and the bias of a linear layer, or of GPT-2's `Conv1D`, which stores its weight so."""
    layer = part(module, path)
    plain = isinstance(layer, Conv1D | nn.Linear) and all(
        type(p) in (nn.Parameter, Tensor) and p.is_floating_point() for p in layer.parameters()
    )
    if not plain or not computes_as_linear(layer):
        raise TypeError(
            f"{path} of {type(module).__name__} is {type(layer).__name__}, not nn.Linear: replace feed-forward "
            "networks before a model is quantised, sharded or given adapters"
        )
    weight = layer.weight.detach()
    return weight if isinstance(layer, Conv1D) else weight.T, None if layer.bias is None else layer.bias.detach()


@torch.no_grad()
def computes_as_linear(layer: Any) -> bool:
    """Whether a layer of a subclass of a linear layer returns what a linear layer does, on random numbers."""
    if type(layer) in (nn.Linear, Conv1D) or layer.weight.is_meta:
        return True
    weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.T
    x = random_tokens(weight)
    try:
        found = layer(x)
    except Exception:  # unknown code raises: it is no linear layer
        return False
    return isinstance(found, Tensor) and close(found, linear(x, weight, layer.bias))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, of modules and what is in them, while the context lasts."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def random_tokens(weight: Tensor) -> Tensor:
    """Random tokens `(2, 3, d)` for a weight `(d, h)`, the same in every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(2, 3, weight.shape[0], generator=generator, device="cpu").to(weight)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in their dtype."""
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 3e-2
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


def part(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


#: torch's modules for activations of `transformers`: experts have fast ways for them
OF_TORCH: dict[str, Callable[[], nn.Module]] = {
    "GELUActivation": nn.GELU,
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "SiLUActivation": nn.SiLU,
}


def read_activation(activation: Any) -> nn.Module:
    """The module of torch that computes an activation; the activation itself if there is none."""
    make = OF_TORCH.get(type(activation).__name__)
    return make_activation(activation) if make is None else make()
