"""Auxiliary-loss-free balancing of sixteen experts, three of which are favored at the start.

The program trains with and without an expert bias.

python examples/expert_bias.py  # takes seconds
"""

import torch
import torch.nn.functional as F
from torch import nn

from mixture_of_experts import GatedExperts, MoE, TopKGating, balance_experts


def train(rate, seed=0, steps=200, dim=32, num_experts=16):
    """Return the busiest expert's load divided by the mean load, before and after training on a small task."""
    torch.manual_seed(seed)
    gate = TopKGating(dim, num_experts, k=2, score="sigmoid", expert_bias=rate is not None)
    experts = GatedExperts(dim, num_experts, hidden_dim=16)
    moe = MoE(dim, gate=gate, experts=experts, loss_coef=0.0)
    task = nn.Linear(dim, dim).requires_grad_(False)
    common = F.normalize(torch.randn(dim), dim=0)  # a direction that all tokens share and that three experts respond to
    gate.w_gating.data[:, :3] += common[:, None]

    def tokens(sequences):
        return torch.randn(sequences, 128, dim) + 2 * common

    @torch.no_grad()
    def imbalance():
        load = gate(tokens(64)).queue_length.sum(0).float()
        return (load.max() / load.mean()).item()

    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
    if rate is not None:
        balance_experts(moe, optimizer, rate=rate)
    before = imbalance()
    for _ in range(steps):
        x = tokens(8)
        out, aux_loss = moe(x)
        loss = F.mse_loss(out, task(x).tanh()) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, imbalance()


def main():
    for rate in (None, 2e-3):
        before, after = train(rate)
        print(f"rate {rate}: max / mean load {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    main()
