"""Computes the sum of a token's router weights, which determines how the weights of upcycled experts are scaled."""

from __future__ import annotations

from typing import Any

import torch

from mixture_of_experts.gating import get_side_inputs
from mixture_of_experts.huggingface.replacement.dense_ffn import eval_mode
from mixture_of_experts.moe import MoE


@torch.no_grad()
def get_constant_weight_sum(moe: MoE, g: int) -> float:
    """Return the sum of a token's router weights in eval mode. The sum must be the same for all tokens, and each of the
    g slices must contribute an equal share.

    Raises:
        ValueError: the sum varies between tokens, or the gate drops tokens in eval mode.
    """
    gate: Any = moe.gate
    dense = "the outputs of the upcycled model would differ from the dense model's"
    others = "or start with new experts by calling replace_ffn"
    factor = getattr(gate, "capacity_factor_eval", None)
    if factor is not None and factor * (gate.k if gate.capacity_per_choice else 1) < gate.num_experts:
        raise ValueError(
            f"{type(gate).__name__} with capacity_factor_eval={factor} drops choices in eval mode, so {dense}; set "
            f"capacity_factor_eval=None, {others}"
        )
    weight = next(gate.parameters(), torch.empty(0))
    if weight.is_meta:
        return 1.0
    tokens = torch.randn(1024, 1, moe.dim, generator=torch.Generator().manual_seed(0)).to(weight)
    ids = torch.arange(1024, device=weight.device).unsqueeze(-1) % getattr(gate, "num_ids", 1)
    with eval_mode(gate):
        routing = gate(tokens, **({"token_ids": ids} if "token_ids" in get_side_inputs(gate) else {}))
    if routing.k is None:
        raise ValueError(
            f"{type(gate).__name__} uses expert choice, so a token may have no expert; use a token-choice gate, "
            f"{others}"
        )
    cells = routing.combine_tensor().sum(dim=-1).double().view(1024, -1, g)  # dimensions: tokens, copies, slices
    totals = cells.sum(dim=1) * g
    total = totals.mean().item()
    if not total > 0 or (totals / total - 1).abs().max() > 1e-3:
        raise ValueError(
            f"the weights that {type(gate).__name__} assigns to a token's experts do not have a constant sum (sums "
            f"range from {totals.min().item():.3g} to {totals.max().item():.3g}), so {dense}. Use a gate that "
            "normalizes weights and does not drop choices at random in eval mode (TopKGating with normalize=True, "
            f"Top2Gating with second_policy_eval='all'), and make k a multiple of the granularity, {others}"
        )
    return total
