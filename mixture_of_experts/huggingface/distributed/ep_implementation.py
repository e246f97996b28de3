"""Provides this package's token exchange to `transformers` MoE models loaded with
`DistributedConfig(ep_implementation=EP_IMPLEMENTATION_NAME)`.

Importing this module registers the implementation. The experts themselves run with the model's
`experts_implementation`.

Axes: t (tokens), k (choices per token), e (experts of all ranks), l (experts of one rank), r (rows sorted by expert), d
(model dimension).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.dispatch.permutation import permute_without_gaps
from mixture_of_experts.dispatch.rows import combine, dispatch
from mixture_of_experts.parallel.exchange import Channel, exchange_rows

EP_IMPLEMENTATION_NAME = "mixture_of_experts"


class ExchangeImplementation(EPImplementation):
    """An expert-parallel implementation that sends each row to the rank that holds its expert. Router weights are
    applied after the rows have been returned to the ranks that hold their tokens.

    If the calls on different ranks do not match, every rank raises an error that describes both calls.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.num_experts: int = self.num_local_experts * ep_mesh.size()  # type: ignore[assignment, operator]
        shared_batch = tp_mesh if tp_mesh.size() > 1 else None
        self.channel: Channel = Channel(ep_mesh.get_group(), shared_batch=shared_batch)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' output `(t, d)` for tokens `(t, d)`, given expert ids and router weights `(t, k)`. Expert
        ids greater than or equal to e are skipped."""
        permutation = permute_without_gaps(assign_experts(top_k_index, top_k_weights, self.num_experts))
        assert permutation.rows_per_expert is not None
        rows, training = dispatch(hidden_states, permutation), self.experts.training
        return combine(
            exchange_rows(rows, permutation.rows_per_expert, self.compute_local_experts, self.channel, training),
            permutation,
        )

    def compute_local_experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Run this rank's experts on rows `(r, d)` sorted by expert. `counts` `(l,)` contains the number of rows for
        each expert."""
        if not rows.shape[0]:  # compute a row of zeros, because other ranks wait for this rank's backward pass
            nothing = rows.sum(dim=0, keepdim=True)
            return self.experts_forward(nothing, counts.new_zeros(1, 1), nothing.new_ones(1, 1))[:0]
        index = torch.arange(len(counts), device=rows.device).repeat_interleave(counts, output_size=rows.shape[0])
        return self.experts_forward(rows, index.unsqueeze(-1), rows.new_ones(rows.shape[0], 1))


EPImplementationInterface.register(EP_IMPLEMENTATION_NAME, ExchangeImplementation)
