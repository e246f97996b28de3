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
def on_this_rank(experts: nn.Module, sharding: ExpertSharding, local_class: type[nn.Module]) -> Iterator[nn.Module]:
    """A context with a stand-in for a module: it is of the module's own class, holds this rank's part of each stack,
    and tells the number of its experts. At the end the module gets what a forward set on the stand-in, and loses what
    it deleted there.

    Other threads may read the module, which stays as it is meanwhile, and what they set on it stays. A graph cannot
    hold another object, so it is traced on the module itself. `torch.func.functional_call` would exchange the tensors
    alone, and call hooks, which run around the whole forward.
    """
    if torch.compiler.is_compiling():
        with exchanged(experts, sharding, local_class):
            yield experts
        return
    stand_ins: dict[Any, nn.Module] = {module: object.__new__(type(module)) for module in experts.modules()}
    for module, its in stand_ins.items():
        parts = {name: stand_ins.get(part) for name, part in module._modules.items()}
        own = dict(_parameters={**module._parameters}, _buffers={**module._buffers}, _modules=parts)
        its.__dict__.update(module.__dict__, **own)
    began = {its: [{**table} for table in tables_of(its)] for its in stand_ins.values()}
    with exchanged(stand_ins[experts], sharding, local_class):
        yield stand_ins[experts]
    originals = {its: module for module, its in stand_ins.items()}
    for its, module in originals.items():
        for table, now, before in zip(tables_of(module), tables_of(its), began[its], strict=True):
            for name, value in now.items():
                if name not in before or before[name] is not value:
                    table[name] = originals.get(value, value) if isinstance(value, nn.Module) else value
            for name in before.keys() - now.keys():
                table.pop(name, None)


def tables_of(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module keeps its attributes, parameters, buffers and parts."""
    return [module.__dict__, module._parameters, module._buffers, module._modules]


@contextmanager
def exchanged(experts: nn.Module, sharding: ExpertSharding, local_class: type[nn.Module]) -> Iterator[None]:
    """A context in which a module itself is of its own class, and holds and tells this rank's part."""
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
