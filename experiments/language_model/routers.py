"""The routers that `train_lm.py --router NAME` offers: one short function for each paper or model.

All of them are causal, as language models require: a byte's experts depend only on that byte and earlier bytes. They
are therefore dropless or use `priority="token"`, so that later bytes cannot take the slots of earlier bytes.

`width` is the number of hidden units that process each byte with any router. The chosen experts and the shared expert,
if any, divide these units.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import Experts, GatedExperts, MoE, NoisyTopKGating, TopKGating
from mixture_of_experts.gating.bias_rules import RuleName


class Router(NamedTuple):
    """How to build a layer, and the properties that training, parameter counts and the dense twin depend on."""

    build: Callable[[int, int, int], MoE]  # (dim, num_experts, width)
    choices: int
    gated: bool = False  # gated experts (SwiGLU) have a gated dense twin
    bias_rule: RuleName | None = None  # the rule with which `balance_experts` updates the expert bias


def top2(dim: int, num_experts: int, width: int) -> MoE:
    """Two choices per byte, and capacity for a quarter more than a balanced load (2 slots per byte)."""
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
    """arXiv 2006.16668: the second choice is kept randomly, with a probability that depends on its weight."""
    return MoE(dim, num_experts, width // 2, capacity_factor_train=2.0, priority="token")


def switch(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2101.03961: one expert per byte, a capacity factor of 1.25, and jitter."""
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
    """arXiv 1701.06538: four choices by noisy scores, and both losses with coefficient 0.1."""
    gate = NoisyTopKGating(dim, num_experts, k=4)
    return MoE(dim, num_experts, gate=gate, experts=Experts(dim, num_experts, width // 4, nn.ReLU), loss_coef=0.1)


def mixtral(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2401.04088: dropless, with two gated experts per byte and normalized weights."""
    gate = TopKGating(dim, num_experts, k=2)
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 2))


def mixtral_capacity(dim: int, num_experts: int, width: int) -> MoE:
    """Mixtral with capacity for a balanced load in training, which drops excess choices. Dropless in evaluation."""
    gate = TopKGating(dim, num_experts, k=2, capacity_factor_train=1.0, priority="token")
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 2))


def mixtral_bias(dim: int, num_experts: int, width: int) -> MoE:
    """Mixtral with an expert bias instead of a balancing loss, as in arXiv 2408.15664 or by quantiles (Kimi K3)."""
    gate = TopKGating(dim, num_experts, k=2, expert_bias=True)
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 2), loss_coef=0.0)


def mixtral_shared(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2401.06066: each byte uses one shared expert, which is the same for all bytes, and one chosen expert."""
    gate = TopKGating(dim, num_experts, k=1)
    experts, shared = GatedExperts(dim, num_experts, width // 2), SharedExpert(dim, width // 2)
    return MoE(dim, num_experts, gate=gate, experts=experts, shared_expert=shared)


def olmoe(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2409.02060: eight small gated experts per byte, weights that are not normalized, and a z-loss."""
    gate = TopKGating(dim, num_experts, k=8, normalize=False)
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 8), z_loss_coef=1e-3)


def qwen3_moe(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2505.09388: eight small gated experts per byte, with normalized weights."""
    gate = TopKGating(dim, num_experts, k=8, balance_over="batch")
    return MoE(dim, num_experts, gate=gate, experts=GatedExperts(dim, num_experts, width // 8), loss_coef=1e-3)


def deepseek_v3(dim: int, num_experts: int, width: int) -> MoE:
    """arXiv 2412.19437: sigmoid scores, expert groups, a shared expert, and an expert bias."""
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
    """A gated feed-forward layer that processes every byte."""

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
