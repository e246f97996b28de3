"""Defines a `parallelize_module` that raises an error on all ranks if a plan key does not match any submodule."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import torch.distributed.tensor.parallel as tensor_parallel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from mixture_of_experts.parallel.agreement import check_ranks_agree
from mixture_of_experts.parallel.style import ExpertParallel, check_mesh, describe_sharded_layer


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh,
    parallelize_plan: ParallelStyle | dict[str, ParallelStyle],
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Apply parallel styles to a model in place, and return the model.

    Unlike `torch.distributed.tensor.parallel.parallelize_module`, this function raises an error if a plan key does not
    match any submodule.

    Args:
        module: the model to modify in place.
        device_mesh: a 1-D mesh.
        parallelize_plan: a parallel style, or a dict that maps submodule names (such as `layers.*.ffn`) to styles.
        src_data_rank: the mesh rank whose parameters are sent to all ranks, or None to keep each rank's own parameters.

    Raises:
        ValueError: a plan key does not match any submodule, or a layer cannot be sharded. The error message names the
            key or layer.
    """
    plan = parallelize_plan if isinstance(parallelize_plan, dict) else {"": parallelize_plan}
    check_mesh(device_mesh)
    check_ranks_agree(lambda: describe_plan(module, device_mesh, plan), device_mesh)
    for key, style in plan.items():
        for submodule in find_matching_submodules(module, key):
            tensor_parallel.parallelize_module(submodule, device_mesh, style, src_data_rank=src_data_rank)
    return module


def describe_plan(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> dict[str, Any]:
    """Return all model properties that must be the same on every rank. Raise an error if the plan is invalid or a layer
    cannot be sharded."""
    description: dict[str, Any] = {}
    sharded_by: dict[Any, str] = {}  # keyed by experts
    for key, style in plan.items():
        found = find_matching_submodules(module, key)
        if not found:
            names = ", ".join(name for name, _ in module.named_modules() if name and name.count(".") <= key.count("."))
            raise ValueError(
                f"plan key {key!r} does not match any submodule of {type(module).__name__}; choose from {names}"
            )
        if not isinstance(style, ExpertParallel):
            continue
        for layer, name in found.items():
            try:
                of_layer = describe_sharded_layer(layer, style.sharding(layer, mesh))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}" if name else str(error)) from error
            by = f"{name} (by {key!r})"
            if (first := sharded_by.setdefault(layer.experts, by)) is not by:
                raise ValueError(
                    f"{by} has the same experts as {first}; layers must not share experts or match several keys"
                )
            description |= {f"{name}.{what}".lstrip("."): value for what, value in of_layer.items()}
    return description


def find_matching_submodules(module: nn.Module, key: str) -> dict[nn.Module, str]:
    """Return the submodules that match a plan key, with their names. Any part of the key may contain wildcards."""
    found: dict[nn.Module, str] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        if fnmatch(name, key) and name.count(".") == key.count(".") and (name or not key):
            found.setdefault(submodule, name)
    return found
