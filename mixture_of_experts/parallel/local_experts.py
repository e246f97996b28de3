"""Makes sharded experts look as if they contained only this rank's experts, so that their code runs unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixture_of_experts.parallel.sharding import ExpertSharding


class _ScaleGradient(torch.autograd.Function):
    """An identity function that multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


@contextmanager
def use_local_experts(experts: Any) -> Iterator[Any]:
    """Context manager that yields a stand-in for sharded experts.

    The stand-in is an instance of the experts' original class. It holds this rank's part of each stacked tensor, and
    reports the local number of experts. On exit, attributes and buffers that the forward pass set on the stand-in are
    copied to the experts.

    The experts themselves are not modified, so other threads may read them, and attributes set by those threads are
    kept. A traced graph cannot use a stand-in, so tracing uses the experts themselves. `torch.func.functional_call` is
    not suitable, because it replaces only tensors and also calls the experts' hooks, which must run only for the
    forward pass as a whole.
    """
    if torch.compiler.is_compiling():
        with hold_local_shards(experts, experts.sharding):
            yield experts
        return
    stand_ins: dict[Any, Any] = {module: object.__new__(type(module)) for module in experts.modules()}
    for module, stand_in in stand_ins.items():
        parts = {name: stand_ins.get(part) for name, part in module._modules.items()}
        own = dict(_parameters={**module._parameters}, _buffers={**module._buffers}, _modules=parts)
        stand_in.__dict__.update(module.__dict__, **own)
    initial = [({**stand_in.__dict__}, {**stand_in._buffers}) for stand_in in stand_ins.values()]
    local_experts = stand_ins[experts]
    local_experts.__class__ = experts.local_class
    with hold_local_shards(local_experts, experts.sharding):
        yield local_experts
    for (module, stand_in), (attributes, buffers) in zip(stand_ins.items(), initial, strict=True):
        module.__dict__.update(find_changes(stand_in.__dict__, attributes))
        module._buffers.update(find_changes(stand_in._buffers, buffers))


def find_changes(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in now.items() if name not in before or before[name] is not value}


@contextmanager
def hold_local_shards(experts: nn.Module, sharding: ExpertSharding) -> Iterator[None]:
    """Context manager in which a module holds this rank's part of its tensors and reports local expert counts."""
    changes = [(table, name, table[name], part) for table, name, part in iter_local_shards(experts, sharding)]
    try:
        for table, name, _, part in changes:
            table[name] = part
        yield
    finally:
        for table, name, whole, part in changes:
            assigned, table[name] = table[name], whole
            if assigned is not part:  # the forward method reassigned this buffer
                part.copy_(assigned.detach())


def iter_local_shards(experts: nn.Module, sharding: ExpertSharding) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """For each sharded tensor or size of a module, yield the dict that contains it, its name in the dict, and its local
    value."""
    dims, local_dims = sharding.expert_dims, sharding.local_dims
    for path, module in experts.named_modules():
        for table in (module._parameters, module._buffers):
            for name, whole in table.items():
                if f"{path}.{name}".lstrip(".") in sharding.sharded_names:
                    yield table, name, get_local_shard(whole, sharding)
        for name in ("num_experts", "expert_dims"):
            size = module.__dict__.get(name)
            if size in (dims, math.prod(dims)):
                yield module.__dict__, name, local_dims if size == dims else math.prod(local_dims)


def get_local_shard(whole: Any, sharding: ExpertSharding) -> Tensor:
    """Return this rank's part of a sharded parameter, or of a buffer that covers all experts on every rank."""
    if isinstance(whole, DTensor):
        part = whole.to_local()
        return part if sharding.gradient_factor == 1 else _ScaleGradient.apply(part, sharding.gradient_factor)
    each = sharding.local_dims[0]
    return whole.narrow(0, sharding.mesh.get_local_rank() * each, each)
