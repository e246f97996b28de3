"""Expert parallelism on PyTorch's own distributed stack; the recipes are in docs/many_gpus.md."""

from mixture_of_experts.parallel.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from mixture_of_experts.parallel.experts import SpreadExperts
from mixture_of_experts.parallel.gradients import (
    average_gradients,
    broadcast_parameters,
    clip_grad_norm_,
    expert_parameters,
    ignore_experts_in_ddp,
    param_groups,
    replicated_parameters,
)
from mixture_of_experts.parallel.parallelize import parallelize_module
from mixture_of_experts.parallel.style import ExpertParallel

__all__ = [
    "ExpertParallel",
    "SpreadExperts",
    "average_gradients",
    "broadcast_parameters",
    "checkpoints",
    "clip_grad_norm_",
    "expert_parameters",
    "ignore_experts_in_ddp",
    "load_checkpoint",
    "parallelize_module",
    "param_groups",
    "replicated_parameters",
    "save_checkpoint",
]
