"""`parallelize_module` that checks its plan: every key must match, on every rank."""

from __future__ import annotations

from fnmatch import fnmatch
from types import MethodType
from typing import Any

import torch.distributed.tensor.parallel as tensor_parallel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from mixture_of_experts.parallel.agreement import check_ranks_agree
from mixture_of_experts.parallel.spread_experts import ExpertParallelExperts
from mixture_of_experts.parallel.style import ExpertParallel, check_mesh, describe_layer


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh,
    parallelize_plan: ParallelStyle | dict[str, ParallelStyle],
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Apply parallel styles to a model, as `torch.distributed.tensor.parallel.parallelize_module` does; return it.

    Here a key that matches nothing is an error. If the model has a `save_pretrained` (as models of transformers have),
    that method gathers the experts afterwards: all ranks must call it together.

    Args:
        module: the model; it is changed in place.
        device_mesh: 1-D.
        parallelize_plan: a style, or styles by the names of submodules (`layers.*.ffn`).
        src_data_rank: the rank of the mesh whose parameters all ranks take; None: each rank keeps its own.

    Raises:
        ValueError: a key matches nothing, or a layer cannot be spread; the error names it.
    """
    plan = parallelize_plan if isinstance(parallelize_plan, dict) else {"": parallelize_plan}
    check_mesh(device_mesh)
    check_ranks_agree(lambda: describe_plan(module, device_mesh, plan), device_mesh)
    for key, style in plan.items():
        for submodule in matching_submodules(module, key):
            tensor_parallel.parallelize_module(submodule, device_mesh, style, src_data_rank=src_data_rank)
    if device_mesh.size() > 1:
        save_whole(module)
    return module


def describe_plan(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> dict[str, Any]:
    """Everything in which the ranks' models must agree; raises for a wrong plan, or a layer that cannot be spread."""
    description: dict[str, Any] = {}
    spread_by: dict[Any, str] = {}  # experts
    for key, style in plan.items():
        found = matching_submodules(module, key)
        if not found:
            names = ", ".join(name for name, _ in module.named_modules() if name and name.count(".") <= key.count("."))
            raise ValueError(f"plan key {key!r} matches no submodule of {type(module).__name__}: there are {names}")
        if not isinstance(style, ExpertParallel):
            continue
        for layer, name in found.items():
            try:
                of_layer = describe_layer(layer, style.sharding(layer, mesh))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}" if name else str(error)) from error
            by = f"{name} (by {key!r})"
            if (first := spread_by.setdefault(layer.experts, by)) is not by:
                raise ValueError(f"{by} has the experts of {first}: give each layer its own, and name it by one key")
            description |= {f"{name}.{what}".lstrip("."): value for what, value in of_layer.items()}
    return description


def matching_submodules(module: nn.Module, key: str) -> dict[nn.Module, str]:
    """The submodules that match a key of a plan, each once, with its name; every part of the key may have wildcards."""
    found: dict[nn.Module, str] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        if fnmatch(name, key) and name.count(".") == key.count(".") and (name or not key):
            found.setdefault(submodule, name)
    return found


def save_whole(module: nn.Module) -> None:
    """Make `save_pretrained` of all models in a module write the experts of all ranks."""
    for model in module.modules():
        save = getattr(type(model), "save_pretrained", None)
        if save is not None and any(isinstance(part, ExpertParallelExperts) for part in model.modules()):
            model.save_pretrained = MethodType(save_pretrained_whole, model)  # type: ignore[assignment]


def save_pretrained_whole(model: Any, *args: Any, state_dict: dict[str, Any] | None = None, **options: Any) -> Any:
    """Call the model's own `save_pretrained` with a state gathered from all ranks; the first rank writes."""
    if state_dict is None:
        try:
            state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        except RuntimeError as error:
            raise RuntimeError(
                f"save_pretrained could not gather the experts of all ranks: {error}\nCall it on every rank"
            ) from error
    return type(model).save_pretrained(model, *args, state_dict=state_dict, **options)
