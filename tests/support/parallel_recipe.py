"""What a program has around a layout of docs/distributed/expert_parallelism.md: its beginning and its loop."""

BEGINNING = """\
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixture_of_experts import MoE
from mixture_of_experts.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    ignore_experts_in_ddp,
    parallelize_module,
    replicated_parameters,
)

if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # else "cuda" is the first GPU on every rank
dist.init_process_group(timeout=timedelta(minutes=2))
rank, world = dist.get_rank(), dist.get_world_size()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)  # the same on every rank: the ranks begin with one model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(32), MoE(dim=32, num_experts=8)

    def forward(self, x):
        out, aux_loss = self.ffn(self.norm(x))
        return x + out, aux_loss


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        total = x.new_zeros(())
        for layer in self.layers:
            x, aux_loss = layer(x)
            total = total + aux_loss
        return x, total


model = Model().to(device)
"""

LOOP = """\
by_mesh = {}
for parameter in model.parameters():
    by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
groups = [{"params": parameters} for parameters in by_mesh.values()]
optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
for step in range(3):
    x = torch.randn(rank, 16, 32, device=device)  # rank 0 has nothing
    count = torch.tensor(x.shape[0] * x.shape[1], device=device)
    dist.all_reduce(count)
    out, aux_loss = parallel(x)
    loss = (out - 1).square().mean(-1).sum() * world / count + aux_loss
    loss.backward()
    before_clipping()
    norm = clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    save_checkpoint("run", model, optimizer, step=step, extra={"step": step})
extra = load_checkpoint("run", model, optimizer)
"""
