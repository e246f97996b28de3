"""Compute the experts of torchtitan models with this package. Needs torchtitan 0.3.

See docs/distributed/trainers.md.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import GroupedExperts

from mixture_of_experts.ops import moe_ffn


class MixtureExperts(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD, num_tokens_per_expert_E):
        weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        w1, w2, w3 = ((w.to_local() if isinstance(w, DTensor) else w).transpose(1, 2) for w in weights)
        experts = torch.arange(len(num_tokens_per_expert_E), device=x_RD.device)
        expert = experts.repeat_interleave(num_tokens_per_expert_E, output_size=len(x_RD)).unsqueeze(-1)
        return moe_ffn(x_RD, expert, torch.ones_like(expert, dtype=torch.float32), w1, w2, w3, activation=nn.SiLU())
