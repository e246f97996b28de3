"""`parallelize_module` with a plan whose every key has to match, on every rank."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import torch.distributed.tensor.parallel as tensor_parallel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from mixture_of_experts.parallel.agreement import check_ranks_agree
from mixture_of_experts.parallel.style import ExpertParallel, check_mesh, describe_layer


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh,
    parallelize_plan: ParallelStyle | dict[str, ParallelStyle],
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """`torch.distributed.tensor.parallel.parallelize_module`, but a key that matches nothing is an error.

    Args:
        module: the model, changed in place and returned.
        device_mesh: 1-D.
        parallelize_plan: a style, or styles by the names of submodules (`layers.*.ffn`).
        src_data_rank: the rank of the mesh whose parameters all start from; None: each rank's own are right.

    Raises:
        ValueError: naming the key and what there is.
    """
    if not isinstance(parallelize_plan, dict):
        return tensor_parallel.parallelize_module(module, device_mesh, parallelize_plan, src_data_rank=src_data_rank)
    check_mesh(device_mesh)
    for style in parallelize_plan.values():
        if isinstance(style, ExpertParallel):
            style.set_timeout(device_mesh)
    check_ranks_agree(lambda: describe_plan(module, device_mesh, parallelize_plan), device_mesh)
    for key, style in parallelize_plan.items():
        for submodule in matching_submodules(module, key).values():
            tensor_parallel.parallelize_module(submodule, device_mesh, style, src_data_rank=src_data_rank)
    return module


def describe_plan(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> dict[str, Any]:
    """All in which the ranks' models have to agree; raises for what is wrong with the plan or a layer it names."""
    description: dict[str, Any] = {}
    owner: dict[int, tuple[str, str]] = {}
    for key, style in plan.items():
        found = matching_submodules(module, key)
        if not found:
            names = ", ".join(name for name, _ in module.named_modules() if name and name.count(".") <= key.count("."))
            raise ValueError(f"plan key {key!r} matches no submodule of {type(module).__name__}: there are {names}")
        if not isinstance(style, ExpertParallel):
            continue
        for name, layer in found.items():
            try:
                sharding = style.sharding(layer, mesh)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}" if name else str(error)) from error
            first = owner.setdefault(id(layer.experts), (key, name))
            if first != (key, name):
                raise ValueError(
                    f"{name} (by {key!r}) has the experts of {first[1]} (by {first[0]!r}): give each layer its own, "
                    "and name it by one key"
                )
            prefix = f"{name}." if name else ""
            description.update((prefix + what, value) for what, value in describe_layer(layer, sharding).items())
    return description


def matching_submodules(module: nn.Module, key: str) -> dict[str, nn.Module]:
    """The submodules by name that a plan key names, each once; each part of the key may hold wildcards."""
    found = {"": module}
    for part in key.split(".") if key else ():
        found = {
            f"{path}.{name}".lstrip("."): child
            for path, parent in found.items()
            for name, child in parent.named_children()
            if fnmatch(name, part)
        }
    first = {id(submodule): name for name, submodule in reversed(found.items())}
    return {name: submodule for name, submodule in found.items() if first[id(submodule)] == name}
