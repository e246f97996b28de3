"""The sum of the weights that a gate gives the experts of a token, by which upcycled experts are scaled."""

from __future__ import annotations

from typing import Any

import torch

from mixture_of_experts.gating import reads_of
from mixture_of_experts.huggingface.replacement.adapters import evaluating
from mixture_of_experts.moe import MoE


@torch.no_grad()
def sum_of_weights(moe: MoE, g: int) -> float:
    """The sum of the weights of a token's experts in eval; the same for all tokens, and for the g slices of a copy.

    Raises:
        ValueError: it is not the same for all, or the gate drops tokens in eval.
    """
    gate: Any = moe.gate
    refuse_drops(gate)
    if any(parameter.is_meta for parameter in gate.parameters()):
        return 1.0
    totals = totals_of_random_tokens(moe, g)
    total = totals.mean().item() * g
    if not total > 0 or (totals * g / total - 1).abs().max() > 1e-3:
        seen = f"from {totals.min().item() * g:.3g} to {totals.max().item() * g:.3g}"
        raise ValueError(
            f"the weights that {type(gate).__name__} gives the experts of a token do not add up to one number: {seen}. "
            "So the upcycled model would not compute what the dense one does. Take a gate that normalises them and, in "
            "eval, drops none at random (TopKGating with normalize=True, Top2Gating with second_policy_eval='all'); "
            "with granularity its number of choices must be a multiple of the granularity; or start with new experts "
            "by replace_ffn"
        )
    return total


def refuse_drops(gate: Any) -> None:
    """Refuse a gate that drops choices in eval."""
    factor = getattr(gate, "capacity_factor_eval", None)
    slots = 1.0 if factor is None else factor * (gate.k if gate.capacity_per_choice else 1) / gate.num_experts
    if slots < 1:  # of the tokens of a group
        raise ValueError(
            f"{type(gate).__name__} with capacity_factor_eval={factor} drops choices in eval, so the upcycled model "
            "would not compute what the dense one does: give it capacity_factor_eval=None, or start with new experts "
            "by replace_ffn"
        )


def totals_of_random_tokens(moe: MoE, g: int) -> torch.Tensor:
    """`(1024, g)`, the sums of the weights of 1024 tokens, for each slice of the copies."""
    gate: Any = moe.gate
    weight = next(gate.parameters(), torch.empty(0))
    tokens = torch.randn(1024, 1, moe.dim, generator=torch.Generator().manual_seed(0)).to(weight)
    ids = torch.arange(1024, device=weight.device).unsqueeze(-1) % getattr(gate, "num_ids", 1)
    with evaluating(gate):
        routing = gate(tokens, **({"token_ids": ids} if "token_ids" in reads_of(gate) else {}))
    if routing.k is None:
        raise ValueError(
            f"in {type(gate).__name__} experts choose, so a token may have none: take a gate in which tokens choose, "
            "or start with new experts by replace_ffn"
        )
    cells = routing.combine_tensor().sum(dim=-1).double().view(1024, -1, g)  # tokens, copies, slices
    return cells.sum(dim=1)
