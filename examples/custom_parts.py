"""Parts of published layers as custom classes: GPT-OSS's experts, and the router from Chen 2022.

python examples/custom_parts.py  # builds both layers
"""

import torch
from torch import nn

from mixture_of_experts import Choices, MoE, RoutedExperts, TokenChoiceGate, TopKGating
from mixture_of_experts.ops import ClampedSwiGLU, Network, routed_ffn


class GptOssExperts(RoutedExperts):
    """Experts with interleaved and clamped gate and up projections.

    Parameters have the same names and shapes as in the published checkpoints.
    """

    def __init__(self, dim, num_experts, hidden_dim, alpha=1.702, limit=7.0):
        super().__init__()
        self.num_experts, self.act = num_experts, ClampedSwiGLU(alpha, limit)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, dim, 2 * hidden_dim) * dim**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(num_experts, 2 * hidden_dim))
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) * hidden_dim**-0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x, assignments):
        network = Network(
            w_in=(self.gate_up_proj,),
            w_out=self.down_proj,
            b_in=(self.gate_up_proj_bias,),
            b_out=self.down_proj_bias,
            activation=self.act,
            gate_up="interleaved",
        )
        return routed_ffn(x, assignments, network, training=self.training)


class UniformNoiseGate(TokenChoiceGate):
    """Selects one expert by logit plus uniform noise, and weights it with the noiseless softmax (arXiv 2208.02813)."""

    def __init__(self, dim, num_experts, noise=1.0, **settings):
        super().__init__(dim, num_experts, k=1, **settings)
        self.noise = noise
        self.w_gating = nn.Parameter(torch.zeros(*self.outer_expert_dims, dim, num_experts))

    def decide(self, tokens):
        logits = self.product(tokens.x, self.w_gating)
        noisy = logits + self.noise * torch.rand_like(logits) if self.training else logits
        expert, probs = noisy.argmax(dim=-1, keepdim=True), logits.softmax(dim=-1)
        losses = {"balance": self.balance_loss(tokens, probs, expert), "z": self.z_loss(tokens, logits)}
        return Choices(expert, probs.gather(-1, expert), probs, losses)


def build_gpt_oss(dim=64, num_experts=32, k=4):
    """Build a GPT-OSS layer.

    A softmax over the chosen logits equals a softmax over all logits, normalized over the chosen ones.
    """
    gate = TopKGating(dim, num_experts, k, bias=True, balance_over="batch")
    return MoE(dim, gate=gate, experts=GptOssExperts(dim, num_experts, hidden_dim=dim))


def build_chen_2022(dim=64, num_experts=8):
    return MoE(dim, gate=UniformNoiseGate(dim, num_experts))


def main():
    for moe in (build_gpt_oss(), build_chen_2022()):
        out, aux_loss = moe(torch.randn(2, 32, 64))
        print(type(moe.gate).__name__, type(moe.experts).__name__, tuple(out.shape), f"aux_loss {aux_loss.item():.3f}")


if __name__ == "__main__":
    main()
