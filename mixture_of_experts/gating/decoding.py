"""A warning for decoding with a gate whose choices for one token differ from those for the whole sequence."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def warn_of_decoding(gate: Any) -> None:
    """Warn of a gate of token choice that in eval gets groups of one token, if its choices depend on other tokens
    (capacity) or on chance. There is no warning in a traced graph or at a second level."""
    if gate.outer_expert_dims or torch.compiler.is_compiling():
        return
    found = {}  # name: (its value, the value to set instead)
    if gate.capacity_factor_eval is not None:
        found["capacity_factor_eval"] = (gate.capacity_factor_eval, None)
    if getattr(gate, "second_policy_eval", None) == "random":
        found["second_policy_eval"] = ("random", "all")
    if found:
        has = " and ".join(f"{name}={value!r}" for name, (value, _) in found.items())
        remedy = ", ".join(f"gate.{name} = {value!r}" for name, (_, value) in found.items())
        warnings.warn(
            f"a {type(gate).__name__} in eval is given one token a sequence, as in decoding, and has {has}: its "
            f"choices then differ from those for the whole sequence at once. To generate, set {remedy}",
            stacklevel=2,
        )
