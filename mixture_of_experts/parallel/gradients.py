"""Averages and clips the gradients of replicated parameters and sharded DTensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mixture_of_experts.parallel.sharded_experts import ShardedExperts
from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.support.private_torch import ignore_in_ddp
from mixture_of_experts.whole_model.balancing import find_rank_local_buffers


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of sharded experts, keyed by name. The parameters differ between ranks, so DDP must ignore
    them."""
    # compared by identity, because wrappers may change the names
    sharded = {
        parameter
        for module in model.modules()
        if isinstance(module, ShardedExperts)
        for name, parameter in module.named_parameters()
        if name in module.sharding.sharded_names
    }
    return {name: parameter for name, parameter in model.named_parameters() if parameter in sharded}


def replicated_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all named parameters except those of sharded experts. These parameters are replicated on all ranks or
    sharded by FSDP2."""
    sharded = expert_parameters(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in sharded}


def ignore_experts_in_ddp(model: nn.Module) -> nn.Module:
    """Make `DistributedDataParallel(model)` ignore rank-specific tensors, and return the model.

    Call this function before wrapping the model. The rank-specific tensors are the parameters and buffers of sharded
    experts and the counts of gates with an expert bias. In each forward pass, DDP would overwrite these buffers and
    counts with those of the first rank.
    """
    # DDP compares module paths for buffers and parameter names for parameters, which differ for some wrappers
    sharded_names = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, ShardedExperts)
        for name in module.sharding.sharded_names
    }
    ignore_in_ddp(model, find_rank_local_buffers(model) | sharded_names | expert_parameters(model).keys())
    return model


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | DeviceMesh, op: str = "mean") -> None:
    """Replace gradients with their mean or sum over the ranks of a group.

    Call this function once before each optimizer step. If only expert parallelism is used, pass the replicated
    parameters. If expert parallelism is combined with DDP, pass the expert parameters that are replicated over the
    data-parallel ranks. A missing gradient counts as 0. If no rank has a gradient for a parameter, its gradient remains
    None. Frozen parameters are skipped.

    Args:
        parameters: the parameters whose gradients to reduce. All ranks must pass the same parameters.
        group: a process group or a 1-D mesh.
        op: "mean" or "sum".
    """
    check_choice("op", op, ("mean", "sum"))
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    if group.size() == 1:
        return
    for bucket in _make_buckets(parameter for parameter in parameters if parameter.requires_grad):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        parts = [_to_local(grad) for grad in grads]
        present = parts[0].new_tensor([p.grad is not None for p in bucket])
        flat = torch.cat([*(part.flatten() for part in parts), present])
        dist.all_reduce(flat, group=group)
        *sums, present = flat.split([*(part.numel() for part in parts), len(bucket)])
        for parameter, grad, part, total, is_present in zip(bucket, grads, parts, sums, present, strict=True):
            if parameter.grad is not None or is_present:
                parameter.grad = grad
                part.copy_((total / group.size() if op == "mean" else total).view_as(part))


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip gradients in place so that their total norm over all parameters and ranks is at most `max_norm`.

    Args:
        parameters: the model or its parameters, which may be replicated tensors or DTensors on any mesh. All ranks must
            pass the same parameters.
        max_norm: maximum norm of the gradients.
        norm_type: order p of the norm, which must be positive or inf.
        error_if_nonfinite: whether to raise a RuntimeError if the total norm is infinite or NaN.

    Returns:
        The total norm before clipping, as a 0-dim tensor. The result equals the norm that
        `torch.nn.utils.clip_grad_norm_` returns in a single process.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a positive number or inf, got {norm_type}")
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    by_mesh: dict[Any, list[Tensor]] = {}  # torch's own functions support only one mesh per call
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None or isinstance(parameter, DTensor):  # the gradient may exist only on other ranks
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms: list[Any] = [
        get_total_norm([torch.zeros_like(p) if p.grad is None else p.grad for p in members], norm_type)
        for members in by_mesh.values()
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for members in by_mesh.values():
        clip_grads_with_norm_(members, max_norm, total)
    return total


def _to_local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor. Without autograd, the result shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _make_buckets(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Yield buckets of about 2**25 elements each, whose parameters have the same dtype and device. This limits both the
    number of collectives and the memory use."""
    open_buckets: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(parameter)
        if sum(_to_local(member).numel() for member in bucket) >= 2**25:
            yield open_buckets.pop(kind)
    yield from open_buckets.values()
