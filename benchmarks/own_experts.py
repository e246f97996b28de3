"""Experts of one's own, as docs/extending.md has them: by `routed_ffn`, and the same by `compute`.

    python -m benchmarks.own_experts

Forward and backward of a layer, in this process's own processor time on one thread, interleaved: the least of all
rounds, which others on the same cores hardly disturb.
"""

from __future__ import annotations

from time import process_time

import torch
from torch import Tensor, nn

from mixture_of_experts import MoE, RoutedExperts, TopKGating
from mixture_of_experts.ops import Network, grouped_product, routed_ffn

DIM, EXPERTS, TOKENS, ROUNDS = 512, 16, 2048, 9


class ByNetwork(RoutedExperts):
    """x u v, with u (e, d, r) and v (e, r, d)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.u = nn.Parameter(torch.randn(EXPERTS, DIM, rank) * DIM**-0.5)
        self.v = nn.Parameter(torch.randn(EXPERTS, rank, DIM) * rank**-0.5)

    def forward(self, x: Tensor, decision) -> Tensor:
        return routed_ffn(x, decision, Network((self.u,), self.v, nn.Identity()), training=self.training)


class ByCompute(ByNetwork):
    """The same, on rows."""

    forward = RoutedExperts.forward

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return grouped_product(grouped_product(rows, self.u, num_tokens_per_expert), self.v, num_tokens_per_expert)


def seconds(layer: MoE, x: Tensor) -> float:
    """Of one step."""
    start = process_time()
    out, aux_loss = layer(x)
    (out.square().mean() + aux_loss).backward()
    return process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    for rank in (64, 512):
        gate = TopKGating(DIM, EXPERTS, k=2)
        layers = {kind.__name__: MoE(DIM, gate=gate, experts=kind(rank)) for kind in (ByNetwork, ByCompute)}
        layers["ByCompute"].load_state_dict(layers["ByNetwork"].state_dict())
        x = torch.randn(4, TOKENS // 4, DIM, requires_grad=True)
        outputs = [layer(x)[0] for layer in layers.values()]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        least = dict.fromkeys(layers, float("inf"))
        for _ in range(ROUNDS):
            least = {name: min(least[name], seconds(layer, x)) for name, layer in layers.items()}
        text = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in least.items())
        print(f"rank {rank}: {text}, ratio {least['ByNetwork'] / least['ByCompute']:.2f}")


if __name__ == "__main__":
    main()
