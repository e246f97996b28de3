"""Where the feed-forward networks of known models are, and how to read and replace them: a table entry for each.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.ops.activations import make_activation

Halves = Literal["gate_up", "up_gate", "interleaved"]


@dataclass(frozen=True)
class Adapter:
    """The parts of a feed-forward network, as paths below the module whose class the table names.

    Args:
        up: the first linear layer; of a gated network the one that is not under the activation.
        down: the last one.
        gate: the linear layer under the activation of a gated network. The same path as `up`, if one layer holds both:
            `halves` tells which of its results are the gate's.
        activation: the path of the activation, a module or a function; or the module.
        hidden_dropout: dropout between activation and `down`: the path of a module or of a number, or the number.
        output_dropout: dropout after `down`, likewise.
        slot: the parts stand in a layer that does other things too and calls them one by one. Then the MoE takes the
            place of `down`, and those that `bypass` names and `hidden_dropout` become identities; otherwise it takes
            the whole module's.
        bypass: see `slot`.
        ones: see `slot`: a path that returns 1, where the model multiplies by it.
        halves: where `gate` and `up` are one layer, how its results are ordered.
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

    def linears(self) -> list[str]:
        """The paths of the linear layers."""
        return list(dict.fromkeys(path for path in (self.gate, self.up, self.down) if path is not None))


@dataclass(frozen=True)
class Dense:
    """A dense feed-forward network, read: `act(x w1 + b1) w2 + b2`, gated `(act(x w1 + b1) * (x w3 + b3)) w2 + b2`.

    Weights are views of its own: w1, w3 `(d, h)`, w2 `(h, d)`, b1, b3 `(h,)`, b2 `(d,)`.
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
        """What the network computes in evaluation, of tokens `(..., d)`."""
        activation = self.activation.eval()
        hidden = activation(linear(x, self.w1, self.b1))
        if self.w3 is not None:
            hidden = hidden * linear(x, self.w3, self.b3)
        return linear(hidden, self.w2, self.b2)

    def weights(self) -> dict[str, Tensor]:
        """Those that are there, by the names that experts give them."""
        found = {name: getattr(self, name) for name in ("w1", "w2", "w3", "b1", "b2", "b3")}
        return {name: weight for name, weight in found.items() if weight is not None}


def read_dense(module: nn.Module, adapter: Adapter) -> Dense:
    """Read a network by its adapter.

    Raises:
        TypeError: a part is no plain linear layer, as after quantisation or under a LoRA adapter.
    """
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
        activation = nn.Sequential(activation, dropout)  # of a gated network too: a factor is a factor
    return Dense(w1, w2, w3, b1, b2, b3, activation, read_dropout(module, adapter.output_dropout))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def halves_of(tensor: Tensor, order: Halves) -> tuple[Tensor, Tensor]:
    """Gate and up `(..., h)` of a weight or bias `(..., 2 h)`."""
    if order == "interleaved":
        return tensor[..., ::2], tensor[..., 1::2]
    first, second = tensor.chunk(2, dim=-1)
    return (first, second) if order == "gate_up" else (second, first)


def read_dropout(module: nn.Module, dropout: str | float | None) -> nn.Module | None:
    """A module, from a path of one or of a number, or a number; None if it drops nothing."""
    found = part(module, dropout) if isinstance(dropout, str) else dropout
    if found is None or getattr(found, "p", found) == 0:
        return None
    return found if isinstance(found, nn.Module) else nn.Dropout(found)


def read_linear(module: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight `(in, out)` and bias of a linear layer, or of GPT-2's `Conv1D`, which is one that keeps it so."""
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
    """Whether a layer of a class that inherits from a linear one returns the same, on random numbers."""
    if type(layer) in (nn.Linear, Conv1D) or layer.weight.is_meta:
        return True
    weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.T
    x = random_tokens(weight)
    try:
        found = layer(x)
    except Exception:  # anybody's code: it is no linear layer
        return False
    return isinstance(found, Tensor) and close(found, linear(x, weight, layer.bias))


def random_tokens(weight: Tensor) -> Tensor:
    """`(2, 3, d)` for a weight `(d, h)`, the same ones each time."""
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


#: activations of `transformers` that torch has too, for which the experts have fast ways
OF_TORCH: dict[str, Callable[[], nn.Module]] = {
    "GELUActivation": nn.GELU,
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "SiLUActivation": nn.SiLU,
}


def read_activation(activation: Any) -> nn.Module:
    """The module torch has for it, else itself."""
    make = OF_TORCH.get(type(activation).__name__)
    return make_activation(activation) if make is None else make()
