"""Describes a model's layers with experts, so that they can be built before weights are loaded.

The description is a list of entries: the names of some layers, and the settings that they share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mixture_of_experts import gating
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, SparseFeedForward

GateFactory = Callable[[int, int], nn.Module]  # (dim, num_experts) -> gate

GATES: dict[str, Any] = {name: kind for name, kind in vars(gating).items() if name.endswith("Gating")}
CALLED = {"num_gates": "num_experts"}  # arguments that a gate stores under another name
PARTS = {"bias": "b_gating", "expert_bias": "expert_bias"}  # arguments that are True if a gate has this part
LEFT_OUT = ("self", "device", "dtype", "settings")  # arguments that a gate does not store under their name
FIXED = {"ReLUGating": ("score", "normalize")}  # arguments that a gate gives to the class it derives from
PLAIN = (bool, int, float, str, type(None))


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The description of all layers with experts in a model; layers with equal settings share an entry."""
    entries: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, MoEFeedForward):
            settings = describe_layer(module)
            same = next((entry for entry in entries if {**entry, "layers": None} == {**settings, "layers": None}), None)
            if same is None:
                entries.append({"layers": [name], **settings})
            else:
                same["layers"].append(name)
    return entries


def describe_layer(feed_forward: MoEFeedForward) -> dict[str, Any]:
    moe = feed_forward.moe
    coefs = {"loss_coef": moe.loss_coef, "z_loss_coef": moe.z_loss_coef, "loss_coefs": dict(moe.loss_coefs)}
    if isinstance(feed_forward, SparseFeedForward):  # the stock model of the configuration has the rest
        return {"block": feed_forward.block, "balance_over": getattr(moe.gate, "balance_over", "batch"), **coefs}
    experts: Any = moe.experts
    shared: Any = moe.shared_expert
    return {
        "num_experts": moe.num_experts,
        "hidden_dim": experts.hidden_dim,
        "shared_expert": None if shared is None else shared.hidden_dim,
        "gate": describe_gate(moe.gate),
        "gate_class": type(moe.gate).__name__,
        **coefs,
    }


def describe_gate(gate: nn.Module) -> dict[str, Any] | None:
    """The class and the arguments of a gate, in types that JSON knows; None for a gate outside this package."""
    if GATES.get(type(gate).__name__) is not type(gate):
        return None
    arguments = {}
    for name in arguments_of(type(gate)):
        kept_as = CALLED.get(name, name)
        if name in PARTS:
            arguments[name] = getattr(gate, PARTS[name]) is not None
        elif name not in (*LEFT_OUT, *FIXED.get(type(gate).__name__, ())):
            arguments[name] = getattr(gate, kept_as)
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    plain = all(isinstance(item, PLAIN) for v in arguments.values() for item in (v if isinstance(v, list) else [v]))
    return {"class": type(gate).__name__, "arguments": arguments} if plain else None


def arguments_of(kind: type) -> list[str]:
    """The names of a gate class's arguments, with those that it passes on as settings."""
    names: dict[str, None] = {}
    for cls in kind.__mro__:
        found = inspect.signature(cls.__init__).parameters
        names |= dict.fromkeys(found)
        if "settings" not in found:
            break
    return list(names)


def gate_factory(description: dict[str, Any]) -> GateFactory:
    """A function that builds a described gate."""

    def build(dim: int, num_experts: int) -> nn.Module:
        arguments = {n: tuple(v) if isinstance(v, list) else v for n, v in description["arguments"].items()}
        return GATES[description["class"]](**arguments)

    return build
