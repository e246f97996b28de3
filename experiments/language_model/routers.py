"""The routers that `train_lm.py --router NAME` offers: one short function for each paper or model.

Every one of them is causal, as a language model needs: a byte's experts depend on that byte and those before it. That
takes either `priority="token"`, where later bytes cannot take the slots of earlier ones, or no capacity at all
(dropless).

`width` is the number of hidden units that work on one byte, whatever the router: the experts chosen for it and the
shared expert, if there is one, divide it among them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import Experts, GatedExperts, MoE, NoisyTopKGating, TopKGating
from mixture_of_experts.gating.bias_rules import RuleName


class Router(NamedTuple):
    """How to build a layer, and what training, the parameter counts and the dense twin need to know about it."""

    build: Callable[[int, int, int], MoE]  # (dim, num_experts, width)
    choices: int
    gated: bool = False  # experts with a gate (SwiGLU) have a dense twin with a gate
    bias_rule: RuleName | None = None  # by which `balance_experts` moves the expert bias after each step


def top2(dim: int, num_experts: int, width: int) -> MoE:
    """Two choices for every byte and capacity for a quarter more than a balanced load (2 slots a byte)."""
    return MoE(
        dim,
        num_experts,
        width // 2,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=2.5,
        capacity_factor_eval=4.0,
        priority="token",
    )


def gshard(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2006.16668: the second choice is kept at random, by its weight."""
    return MoE(dim, num_experts, width // 2, capacity_factor_train=2.0, priority="token")


def switch(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2101.03961: one choice, capacity 1.25, jitter."""
    gate = TopKGating(
        dim,
        num_experts,
        k=1,
        jitter=0.01,
        capacity_factor_train=1.25,
        capacity_factor_eval=2.0,
        priority="token",
    )
    return MoE(dim, num_experts, gate=gate, experts=Experts(dim, num_experts, width))


def shazeer2017(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 1701.06538: four choices by noisy scores; both losses with coefficient 0.1."""
    gate = NoisyTopKGating(dim, num_experts, k=4)
    return MoE(dim, num_experts, gate=gate, experts=Experts(dim, num_experts, width // 4, nn.ReLU), loss_coef=0.1)


def mixtral(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2401.04088: two choices of gated experts, weights normalised, dropless."""
    gate = TopKGating(dim, num_experts, k=2)
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 2))


def mixtral_capacity(dim: int, num_experts: int, width: int) -> MoE:
    """Mixtral with slots for a balanced load in training: what exceeds it is dropped. Dropless in evaluation."""
    gate = TopKGating(dim, num_experts, k=2, capacity_factor_train=1.0, priority="token")
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 2))


def mixtral_bias(dim: int, num_experts: int, width: int) -> MoE:
    """Mixtral with an expert bias in place of a balancing loss: arXiv 2408.15664's, or Kimi K3's by quantiles."""
    gate = TopKGating(dim, num_experts, k=2, expert_bias=True)
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 2), loss_coef=0.0)


def mixtral_shared(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2401.06066's shared expert: one of a byte's two experts is the same for all bytes, the other is chosen."""
    gate = TopKGating(dim, num_experts, k=1)
    experts, shared = GatedExperts(dim, num_experts, width // 2), SharedExpert(dim, width // 2)
    return MoE(dim, num_experts, gate=gate, experts=experts, shared_expert=shared)


def olmoe(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2409.02060: eight choices of small gated experts, weights not normalised, z-loss."""
    gate = TopKGating(dim, num_experts, k=8, normalize=False)
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 8), z_loss_coef=1e-3)


def qwen3_moe(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2505.09388: eight choices of small gated experts, weights normalised."""
    gate = TopKGating(dim, num_experts, k=8, balance_over="batch")
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 8), loss_coef=1e-3)


def deepseek_v3(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2412.19437: sigmoid scores, groups of experts, a shared expert; an expert bias in place of a loss."""
    hidden_dim = width // 9
    gate = TopKGating(
        dim,
        num_experts,
        k=8,
        score="sigmoid",
        scale=2.5,
        num_groups=8,
        top_groups=4,
        expert_bias=True,
    )
    return MoE(
        dim,
        num_experts,
        gate=gate,
        experts=GatedExperts(dim, num_experts, hidden_dim),
        shared_expert=SharedExpert(dim, hidden_dim),
        loss_coef=1e-4,
    )


class SharedExpert(nn.Module):
    """A gated feed-forward layer that every byte visits."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


ROUTERS = {
    "top2": Router(top2, choices=2),
    "gshard": Router(gshard, choices=2),
    "switch": Router(switch, choices=1),
    "shazeer2017": Router(shazeer2017, choices=4),
    "mixtral": Router(mixtral, choices=2, gated=True),
    "mixtral_capacity": Router(mixtral_capacity, choices=2, gated=True),
    "mixtral_bias": Router(mixtral_bias, choices=2, gated=True, bias_rule="sign"),
    "mixtral_quantile": Router(mixtral_bias, choices=2, gated=True, bias_rule="quantile"),
    "mixtral_shared": Router(mixtral_shared, choices=1, gated=True),
    "olmoe": Router(olmoe, choices=8, gated=True),
    "qwen3_moe": Router(qwen3_moe, choices=8, gated=True),
    "deepseek_v3": Router(deepseek_v3, choices=8, gated=True, bias_rule="sign"),
}
