"""The way of every gate to a `Routing`: it decides by torch's operators, in its method `decide`."""

from __future__ import annotations

from typing import Any

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.choices import Choices

TokenChoiceGate = Any  # of base.py, which imports this
Tokens = Any


def why_not(gate: TokenChoiceGate, tokens: Tokens) -> None:
    """None: this way takes every call."""


def routing(gate: TokenChoiceGate, tokens: Tokens) -> Routing:
    """Return the `Routing` of what `decide` returns; an error for anything else than `Choices`, or if it reads a side
    input that is left out."""
    name = type(gate).__name__
    try:
        choices = gate.decide(tokens)
    except KeyError as error:
        missing = error.args[0] if error.args else None
        if missing not in gate.reads or missing in tokens.side:
            raise
        raise TypeError(
            f"{name} reads the side input {missing!r}, which the call leaves out: call the layer as "
            f"moe(x, {missing}=...), an entry for each token"
        ) from None
    if not isinstance(choices, Choices):
        raise TypeError(
            f"{name}.decide must return Choices(expert, weight, probs, losses), got a {type(choices).__name__}: "
            "import Choices from mixture_of_experts"
        )
    return gate.route(tokens, choices)
