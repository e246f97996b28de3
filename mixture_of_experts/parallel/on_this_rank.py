"""Spread experts as if they were this rank's experts alone, on which their own, unchanged code runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixture_of_experts.parallel.exchange import scale_gradient
from mixture_of_experts.parallel.sharding import ExpertSharding


@contextmanager
def on_this_rank(experts: nn.Module, sharding: ExpertSharding, local_class: type[nn.Module]) -> Iterator[None]:
    """A context in which a module is of its own class, holds this rank's part of each stack, and tells the number of
    its experts. What its forward sets on it stays.

    `torch.func.functional_call` would swap the tensors alone, and call hooks, which run around the whole forward.
    """
    changes: list[tuple[dict[str, Any], str, Any, Any]] = []
    for path, module in experts.named_modules():
        for table, part_of in ((module._parameters, shard_here), (module._buffers, rows_here)):
            for name, whole in table.items():
                if whole is not None and f"{path}.{name}".lstrip(".") in sharding.stacked:
                    changes.append((table, name, whole, part_of(whole, sharding)))
        changes += [(module.__dict__, *size) for size in sizes_here(module, sharding)]
    spread, compiling = type(experts), torch.compiler.is_compiling()  # a graph cannot change a class
    try:
        if not compiling:
            experts.__class__ = local_class
        for table, name, _, part in changes:
            table[name] = part
        yield
    finally:
        for table, name, whole, part in changes:
            assigned, table[name] = table[name], whole
            if assigned is not part and type(whole) is Tensor:  # a buffer
                part.detach().copy_(assigned.detach())
        if not compiling:
            experts.__class__ = spread


def shard_here(parameter: Tensor, sharding: ExpertSharding) -> Tensor:
    return scale_gradient(parameter.to_local() if isinstance(parameter, DTensor) else parameter, sharding.factor)


def rows_here(buffer: Tensor, sharding: ExpertSharding) -> Tensor:
    """This rank's part of a buffer with an entry for each expert, which itself is whole on every rank."""
    each = sharding.local_dims[0]
    return buffer.narrow(0, sharding.mesh.get_local_rank() * each, each)


def sizes_here(module: nn.Module, sharding: ExpertSharding) -> Iterator[tuple[str, Any, Any]]:
    """The attributes that tell the number of experts, with the numbers of all ranks and of this one."""
    for name in ("num_experts", "expert_dims"):
        size = module.__dict__.get(name)
        if size == sharding.dims:
            yield name, size, sharding.local_dims
        elif isinstance(size, int) and size == math.prod(sharding.dims):
            yield name, size, math.prod(sharding.local_dims)
