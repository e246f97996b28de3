"""Norms and averages of gradients if some parameters are a rank's own.

A parameter is *whole* (the same on every rank), or a DTensor (each rank has a part), or a plain parameter of this rank
alone, in a list of modules of which every rank keeps some.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from mixture_of_experts.parallel.spread_experts import ExpertParallelExperts
from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.support.private_torch import ignore_in_ddp
from mixture_of_experts.whole_model.balancing import names_of_counts

Parameters = nn.Module | Iterable[Tensor]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, by name, of which every rank has its own part. DDP must ignore them."""
    own = set()
    for prefix, module in model.named_modules():
        if isinstance(module, ExpertParallelExperts):
            module.mark_parameters()
            own |= {f"{prefix}.{name}".lstrip(".") for name in module.own_parameter_names()}
    return {name: parameter for name, parameter in model.named_parameters() if name in own}


def replicated_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, by name, that are not in `expert_parameters`: whole on every rank, or sharded by FSDP2."""
    own = expert_parameters(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in own}


def ignore_experts_in_ddp(model: nn.Module) -> nn.Module:
    """Make `DistributedDataParallel(model)` ignore what is a rank's own; call this first. Returns the model.

    These are the experts, and the counts of gates with an expert bias: DDP would overwrite the counts in every forward
    with those of the first rank.
    """
    ignore_in_ddp(model, names_of_counts(model) | expert_parameters(model).keys())
    return model


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | DeviceMesh, op: str = "mean") -> None:
    """Replace gradients by their mean, or their sum, over the ranks of a group.

    Call it once before each optimizer step: for whole parameters under expert parallelism alone, and for the experts of
    data-parallel replicas beside DDP. If some ranks have no gradient of a parameter, it counts as 0 there; if no rank
    has one, it stays None. Frozen parameters are skipped.

    Args:
        parameters: the same parameters on all ranks.
        group: a process group or a 1-D mesh.
        op: "mean" or "sum".
    """
    check_choice("op", op, ("mean", "sum"))
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    if group.size() == 1:
        return
    for bucket in _buckets(parameter for parameter in parameters if parameter.requires_grad):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        parts = [_local(grad) for grad in grads]
        present = parts[0].new_tensor([p.grad is not None for p in bucket])
        flat = torch.cat([*(part.flatten() for part in parts), present])
        dist.all_reduce(flat, group=group)
        *sums, present = flat.split([*(part.numel() for part in parts), len(bucket)])
        for parameter, grad, part, total, there in zip(bucket, grads, parts, sums, present, strict=True):
            if parameter.grad is not None or there:
                parameter.grad = grad
                part.copy_((total / group.size() if op == "mean" else total).view_as(part))


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients so that their total norm, over all parameters and ranks, is at most `max_norm`.

    Args:
        parameters: the model, or its parameters: whole ones and DTensors of any meshes, the same on all ranks. If FSDP2
            shards a list of expert modules, give the model: only it tells which rank has which module.
        max_norm: the largest norm.
        norm_type: p of the norm, above 0, or inf.
        error_if_nonfinite: whether a norm that is infinite or NaN raises RuntimeError.

    Returns:
        The total norm before scaling, 0-dim: the same as `torch.nn.utils.clip_grad_norm_` returns in one process.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, or inf, got {norm_type}")
    if isinstance(parameters, nn.Module):
        expert_parameters(parameters)  # marks the parameters that are a rank's own
        parameters = parameters.parameters()
    every = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    totals = [_norm_of_group(members, groups, norm_type) for groups, members in _by_owners(every).items()]
    totals = [total.to(totals[0].device) for total in totals]
    total = torch.linalg.vector_norm(torch.stack(totals), norm_type) if totals else torch.zeros(())
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {total}: it cannot be clipped")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in every:
        if parameter.grad is not None:
            gradient = _local(parameter.grad)
            gradient.mul_(factor.to(gradient.device))
    return total


def _by_owners(parameters: list[Tensor]) -> dict[tuple[dist.ProcessGroup, ...], list[Tensor]]:
    """Sort parameters by the process groups over which they are spread; whole ones have none.

    Parameters without a gradient are sorted too, so that all ranks come to the same collectives.
    """
    owners: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups = []
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            groups = [mesh.get_group(i) for i, p in enumerate(parameter.placements) if not isinstance(p, Replicate)]
        mesh = getattr(parameter, "expert_mesh", None)
        groups += [mesh.get_group()] if mesh is not None else []
        owners.setdefault(tuple(groups), []).append(parameter)
    return owners  # in the order of the model, the same on every rank


def _norm_of_group(parameters: list[Tensor], groups: Iterable[dist.ProcessGroup], norm_type: float) -> Tensor:
    """The norm of the gradients of parameters that are spread over the same process groups."""
    # the dtype of all parameters, as ranks may have gradients of different ones
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
    norms = [torch.zeros((), dtype=dtype, device=_local(parameters[0]).device)]
    for parameter in parameters:
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(_local(parameter.grad), norm_type, dtype=dtype)
            norms.append(norm.to(norms[0].device))
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for group in groups:
        if math.isinf(norm_type):
            dist.all_reduce(total, dist.ReduceOp.MAX, group)
        else:
            total = total**norm_type
            dist.all_reduce(total, group=group)
            total = total ** (1 / norm_type)
    return total


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; without autograd both share memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(f"a gradient with placements {tensor.placements} is no finished sum: reduce it first")
    return tensor.to_local()


def _buckets(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Lists of parameters of one dtype and device, of about 2**25 elements each: few collectives, little memory."""
    open_buckets: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        local = _local(parameter)
        kind = (local.dtype, local.device)
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(parameter)
        if sum(_local(member).numel() for member in bucket) >= 2**25:
            yield open_buckets.pop(kind)
    yield from open_buckets.values()
