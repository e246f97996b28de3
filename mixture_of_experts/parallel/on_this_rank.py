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

TABLES = ("_parameters", "_buffers", "_modules")  # of a module


@contextmanager
def on_this_rank(experts: nn.Module, sharding: ExpertSharding, local_class: type[nn.Module]) -> Iterator[nn.Module]:
    """A context with a stand-in for a module: it is of the module's own class, holds this rank's part of each stack,
    and tells the number of its experts. What a forward sets on it is set on the module at the end.

    Other threads may read the module, which stays as it is meanwhile. A graph cannot hold another object, so it is
    traced on the module itself. `torch.func.functional_call` would exchange the tensors alone, and call hooks, which
    run around the whole forward.
    """
    if torch.compiler.is_compiling():
        with exchanged(experts, sharding, local_class):
            yield experts
        return
    stand_ins: dict[nn.Module, nn.Module] = {}
    stand_in = stand_in_of(experts, stand_ins)
    with exchanged(stand_in, sharding, local_class):
        yield stand_in
    for module, its in stand_ins.items():
        keep_changes(module, its)


def stand_in_of(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module with the attributes and tensors of another, in tables of its own; it is noted in `made`."""
    if module not in made:
        made[module] = its = object.__new__(type(module))
        its.__dict__.update(module.__dict__, _parameters={**module._parameters}, _buffers={**module._buffers})
        children = {name: None if part is None else stand_in_of(part, made) for name, part in module._modules.items()}
        its.__dict__["_modules"] = children
    return made[module]


def keep_changes(module: nn.Module, its: nn.Module) -> None:
    """Set on a module the attributes and buffers that were set on its stand-in."""
    for before, now in ((module._buffers, its._buffers), (module.__dict__, its.__dict__)):
        changed = {name: value for name, value in now.items() if before.get(name, module) is not value}
        before.update({name: value for name, value in changed.items() if name not in TABLES})


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
