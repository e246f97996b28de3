"""What a gate tells once of decoding: choices that depend on the call differ from those of the whole sequence."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def warn_of_decoding(gate: Any, num_tokens: int) -> None:
    """Warn if a gate in eval is given groups of one token, and chooses by what else is in the call, or at random.

    Python shows a warning of one text once. A graph that is traced, and a second level, are not concerned.

    Args:
        gate: a gate of token choice.
        num_tokens: n, tokens of a group.
    """
    if gate.training or num_tokens != 1 or gate.outer_expert_dims or torch.compiler.is_compiling():
        return
    found = {}  # what it has, and what to set instead
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
