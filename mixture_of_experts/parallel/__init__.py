"""Implements expert parallelism with PyTorch's distributed modules. See docs/distributed/expert_parallelism.md."""

from mixture_of_experts.parallel.fsdp import fully_shard_experts
from mixture_of_experts.parallel.gradients import (
    average_gradients,
    clip_grad_norm_,
    expert_parameters,
    ignore_experts_in_ddp,
    replicated_parameters,
)
from mixture_of_experts.parallel.parallelize import parallelize_module
from mixture_of_experts.parallel.routers import shard_routers
from mixture_of_experts.parallel.sharded_experts import ShardedExperts
from mixture_of_experts.parallel.style import ExpertParallel

__all__ = [
    "ExpertParallel",
    "ShardedExperts",
    "average_gradients",
    "clip_grad_norm_",
    "expert_parameters",
    "fully_shard_experts",
    "ignore_experts_in_ddp",
    "parallelize_module",
    "replicated_parameters",
    "shard_routers",
]
