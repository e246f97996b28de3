"""The module of mixture-of-experts 0.2.3, so that imports from it work. New code imports from the package itself."""

from mixture_of_experts.experts import Experts
from mixture_of_experts.gating import Top2Gating
from mixture_of_experts.moe import HeirarchicalMoE, MoE

__all__ = ["Experts", "HeirarchicalMoE", "MoE", "Top2Gating"]
