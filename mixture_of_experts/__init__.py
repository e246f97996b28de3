"""Sparsely gated mixture of experts for PyTorch."""

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.experts import ExpertList, Experts, GatedExperts, RoutedExperts
from mixture_of_experts.gating import (
    Choices,
    ExpertChoiceGating,
    HashGating,
    NoisyTopKGating,
    ReLUGating,
    TokenChoiceGate,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.moe import HeirarchicalMoE, HierarchicalMoE, MoE, OutputOnly
from mixture_of_experts.whole_model.aux_losses import collect_aux
from mixture_of_experts.whole_model.balancing import balance_experts
from mixture_of_experts.whole_model.forcing import force_routing
from mixture_of_experts.whole_model.sparsity import control_sparsity

__version__ = "1.0.0"

__all__ = [
    "Choices",
    "ExpertChoiceGating",
    "ExpertList",
    "Experts",
    "GatedExperts",
    "HashGating",
    "HeirarchicalMoE",
    "HierarchicalMoE",
    "MoE",
    "NoisyTopKGating",
    "OutputOnly",
    "ReLUGating",
    "RoutedExperts",
    "Routing",
    "TokenChoiceGate",
    "Top2Gating",
    "TopKGating",
    "TopPGating",
    "balance_experts",
    "collect_aux",
    "control_sparsity",
    "force_routing",
]
