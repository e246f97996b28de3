"""A provider, which enables statistics, replay and balancing for another library's routers, here acme's.

python examples/provider.py  # tracks two acme blocks
"""

import torch
from torch import nn

from mixture_of_experts.providers import ExternalRouter, Provider, register_provider
from mixture_of_experts.stats import track_routing
from mixture_of_experts.summary import summary


class SparseBlock(nn.Module):
    """A sparse block of a library called acme."""

    __module__ = "acme.blocks"  # as if acme defined the class

    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.router = AcmeRouter(dim, num_experts, top_k)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_experts))

    def forward(self, x):
        _, weight, expert = self.router(x.flatten(0, -2))
        every = torch.stack([each(x).flatten(0, -2) for each in self.experts], dim=1)  # (t, e, d)
        return (weight.unsqueeze(-1) * every.take_along_dim(expert.unsqueeze(-1), dim=1)).sum(dim=1).view_as(x)


class AcmeRouter(nn.Linear):
    __module__ = "acme.routers"

    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, bias=False)
        self.top_k = top_k

    def forward(self, x):
        logits = super().forward(x)
        weight, expert = torch.topk(logits.softmax(dim=-1), self.top_k)
        return logits, weight, expert


class AcmeProvider(Provider):
    def find_router(self, block):
        if isinstance(block, SparseBlock):
            return ExternalRouter("router", num_experts=block.num_experts, k=block.top_k)
        return None


def main():
    register_provider("acme", AcmeProvider())

    model = nn.Sequential(SparseBlock(16, num_experts=8, top_k=2), SparseBlock(16, num_experts=8, top_k=2))
    with track_routing(model) as stats:
        model(torch.randn(2, 10, 16))
    print(stats.layers)
    print(summary(model).active)


if __name__ == "__main__":
    main()
