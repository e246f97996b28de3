"""Gates are modules that return a `Routing`. Custom gates should subclass `TokenChoiceGate` or `Gate`."""

from mixture_of_experts.gating.balance_losses import BALANCE_LOSSES
from mixture_of_experts.gating.base import Gate, TokenChoiceGate, Tokens, get_optional_losses, get_side_inputs
from mixture_of_experts.gating.bias_rules import BiasRule, ForwardChoices, QuantileRule, SignRule
from mixture_of_experts.gating.choices import Choices
from mixture_of_experts.gating.depth_averaged import DepthAveragedGating
from mixture_of_experts.gating.expert_choice import ExpertChoiceGating
from mixture_of_experts.gating.hashing import HashGating
from mixture_of_experts.gating.logits import RouterLogits
from mixture_of_experts.gating.noisy_topk import NoisyTopKGating
from mixture_of_experts.gating.relu import ReLUGating
from mixture_of_experts.gating.sparse_mixer import SparseMixerGating
from mixture_of_experts.gating.top2 import Top2Gating
from mixture_of_experts.gating.top_p import TopPGating
from mixture_of_experts.gating.topk import TopKGating

__all__ = [
    "BALANCE_LOSSES",
    "BiasRule",
    "Choices",
    "DepthAveragedGating",
    "ExpertChoiceGating",
    "ForwardChoices",
    "Gate",
    "HashGating",
    "NoisyTopKGating",
    "QuantileRule",
    "ReLUGating",
    "RouterLogits",
    "SignRule",
    "SparseMixerGating",
    "TokenChoiceGate",
    "Tokens",
    "Top2Gating",
    "TopKGating",
    "TopPGating",
    "get_optional_losses",
    "get_side_inputs",
]
