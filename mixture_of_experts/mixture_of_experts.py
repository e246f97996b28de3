"""Supports imports written for mixture-of-experts 0.2.3. New code should import from the top-level package."""

from mixture_of_experts.experts import Experts
from mixture_of_experts.gating import Top2Gating
from mixture_of_experts.moe import HeirarchicalMoE, MoE

__all__ = ["Experts", "HeirarchicalMoE", "MoE", "Top2Gating"]
