"""What `config.json` says of the experts of a model, so that they can be built again before weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mixture_of_experts import gating
from mixture_of_experts.gating.base import TokenChoiceSettings

GateFactory = Callable[[int, int], nn.Module]  # (dim, num_experts) -> gate

KEY = "mixture_of_experts"  # attribute of a model's configuration: a list with what each `replace_ffn` did
GATES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (gating.Top2Gating, gating.TopKGating, gating.NoisyTopKGating, gating.ExpertChoiceGating)
}
CALLED = {"num_gates": "num_experts"}  # arguments that a gate keeps by another name
PARTS = {"bias": "b_gating", "expert_bias": "expert_bias"}  # arguments that decide whether there is a part
LEFT_OUT = ("self", "device", "dtype", "settings")  # those that a gate does not keep, or keeps one by one
PLAIN = (bool, int, float, str, type(None))


def describe_gate(gate: nn.Module) -> dict[str, Any] | None:
    """Class and arguments of one of this package's gates, in types that JSON knows; None for any other gate."""
    if GATES.get(type(gate).__name__) is not type(gate):
        return None
    arguments = {}
    names = list(inspect.signature(type(gate).__init__).parameters)
    for name in [*names, *TokenChoiceSettings.__annotations__] if "settings" in names else names:
        kept_as = CALLED.get(name, name)
        if name in PARTS:
            arguments[name] = getattr(gate, PARTS[name]) is not None
        elif name not in LEFT_OUT:
            arguments[name] = getattr(gate, kept_as)
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    plain = all(isinstance(item, PLAIN) for v in arguments.values() for item in (v if isinstance(v, list) else [v]))
    return {"class": type(gate).__name__, "arguments": arguments} if plain else None


def gate_factory(description: dict[str, Any]) -> GateFactory:
    """A function that builds the gate that was described."""

    def build(dim: int, num_experts: int) -> nn.Module:
        arguments = {n: tuple(v) if isinstance(v, list) else v for n, v in description["arguments"].items()}
        return GATES[description["class"]](**arguments)

    return build
