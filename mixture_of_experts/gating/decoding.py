"""Warns if a gate used for decoding chooses different experts for a single token than for a whole sequence."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def warn_about_decoding(gate: Any) -> None:
    """Warn if a token-choice gate with a limited capacity or random choices receives single-token groups in eval mode.
    Level-two gates do not warn, and no warning is emitted in traced graphs."""
    if gate.outer_expert_dims or torch.compiler.is_compiling():
        return
    found = {}  # maps a name to (its value, the value to set instead)
    if gate.capacity_factor_eval is not None:
        found["capacity_factor_eval"] = (gate.capacity_factor_eval, None)
    if getattr(gate, "second_policy_eval", None) == "random":
        found["second_policy_eval"] = ("random", "all")
    if found:
        has = " and ".join(f"{name}={value!r}" for name, (value, _) in found.items())
        remedy = ", ".join(f"gate.{name} = {value!r}" for name, (_, value) in found.items())
        warnings.warn(
            f"{type(gate).__name__} received one token per sequence in eval mode, as during decoding. With {has}, its "
            f"choices differ from those for the whole sequence. For generation, set {remedy}",
            stacklevel=2,
        )
