"""Keeps imports written for mixture-of-experts 0.2.3 working. New code should import from the package itself."""

from mixture_of_experts.experts import Experts
from mixture_of_experts.gating import Top2Gating
from mixture_of_experts.moe import HeirarchicalMoE, MoE

__all__ = ["Experts", "HeirarchicalMoE", "MoE", "Top2Gating"]
