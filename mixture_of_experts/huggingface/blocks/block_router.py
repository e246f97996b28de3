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


def make_gate(block: BlockSettings, balance_over: Any) -> Any:
    """The gate of a block. Weights that are copied one by one are still on the meta device."""
    e, settings = block.num_experts, block.gate()
    with torch.device("meta"):  # draws no numbers for weights that are copied
        if block.recipe.logits is not None:
            settings["logits"] = RouterLogits(block.dim, e, **block.logits())
        if block.network:
            settings["logits"] = nn.Identity()
        if block.recipe.scales is not None:
            settings["weigh"] = LearnedScale(e if block.recipe.scales == "expert" else 1)
        if block.recipe.router is TopKGating:
            settings["balance_over"] = balance_over
        kind: Any = block.recipe.router
        if block.experts_of_id is not None:
            kind, settings["num_ids"] = HashGating, len(block.experts_of_id)
        gate = kind(block.dim, e, **settings)
    if block.network:
        gate.logits = nn.Sequential(*(copied(getattr(block.router, name)) for name in block.network))
    return gate


def router_views(block: BlockSettings, of: Callable[[Tensor], Tensor]) -> dict[str, Pieces]:
    """The router's weights, by the names and in the layout of this package."""
    found: dict[str, Pieces] = {}
    for index, name in enumerate(block.network):
        found |= paths(f"gate.logits.{index}", getattr(block.router, name), of)
    if block.weight is not None:
        name = "gate.w_gating" if block.recipe.logits is None else "gate.logits.weight"
        found[name] = [(..., of(block.weight).T)]
    if block.recipe.logits is not None and "norm_eps" in block.recipe.logits:
        found["gate.logits.norm_weight"] = [(..., of(block.attribute("norm_weight")))]
    if block.bias is not None:
        found["gate.b_gating"] = [(..., of(block.bias))]
    if block.experts_of_id is not None:
        found["gate.experts_of_id"] = [(..., of(block.experts_of_id))]
    if block.recipe.scales is not None:
        found["gate.weigh.scale"] = [(..., of(block.attribute("scales")))]
    if block.expert_bias is not None:
        bias = of(block.expert_bias)
        bias = bias.flatten() if bias.ndim == 2 else bias
        found["gate.expert_bias"] = [(slice(len(bias)) if block.always else ..., bias)]
    return found
