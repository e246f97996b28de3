"""Reads the router of a sparse block of `transformers`: as a gate, with its weights by this package's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.gating import HashGating, RouterLogits, TopKGating
from mixture_of_experts.gating.steps import LearnedScale
from mixture_of_experts.huggingface.blocks.block_experts import Pieces, copied, paths
from mixture_of_experts.whole_model.block_settings import BlockSettings


def make_gate(held: BlockSettings, balance_over: Any) -> Any:
    """The gate of a block. Weights that are copied one by one are still on the meta device."""
    e, settings = held.num_experts, held.gate()
    with torch.device("meta"):  # draws no numbers for weights that are copied
        if held.model.logits is not None:
            settings["logits"] = RouterLogits(held.dim, e, **held.logits())
        if held.network:
            settings["logits"] = nn.Identity()
        if held.model.scales is not None:
            settings["weigh"] = LearnedScale(e if held.model.scales == "expert" else 1)
        if held.model.router is TopKGating:
            settings["balance_over"] = balance_over
        kind: Any = held.model.router
        if held.experts_of_id is not None:
            kind, settings["num_ids"] = HashGating, len(held.experts_of_id)
        gate = kind(held.dim, e, **settings)
    if held.network:
        gate.logits = nn.Sequential(*(copied(getattr(held.router, name)) for name in held.network))
    return gate


def router_views(held: BlockSettings, of: Callable[[Tensor], Tensor]) -> dict[str, Pieces]:
    """The router's weights, by the names and in the layout of this package."""
    found: dict[str, Pieces] = {}
    for index, name in enumerate(held.network):
        found |= paths(f"gate.logits.{index}", getattr(held.router, name), of)
    if held.weight is not None:
        name = "gate.w_gating" if held.model.logits is None else "gate.logits.weight"
        found[name] = [(..., of(held.weight).T)]
    if held.model.logits is not None and "norm_eps" in held.model.logits:
        found["gate.logits.norm_weight"] = [(..., of(held.held("norm_weight")))]
    if held.bias is not None:
        found["gate.b_gating"] = [(..., of(held.bias))]
    if held.experts_of_id is not None:
        found["gate.experts_of_id"] = [(..., of(held.experts_of_id))]
    if held.model.scales is not None:
        found["gate.weigh.scale"] = [(..., of(held.held("scales")))]
    if held.expert_bias is not None:
        bias = of(held.expert_bias)
        bias = bias.flatten() if bias.ndim == 2 else bias
        found["gate.expert_bias"] = [(slice(len(bias)) if held.always else ..., bias)]
    return found
