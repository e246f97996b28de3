"""Undocumented properties of PEFT's wrappers that this package relies on. PEFT is not imported.

`tests/huggingface/test_private_peft.py` shows which of them a new version breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_peft_wrapper(module: nn.Module) -> bool:
    """Whether the module is a wrapper of PEFT: an instance of one of its classes, or of a subclass."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def get_peft_wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module that computes inside a wrapper of PEFT; None if the module is not a wrapper."""
    children: Any = module._modules
    if not ("modules_to_save" in children or "base_layer" in children) or not is_peft_wrapper(module):
        return None
    return get_active_copy(module) if "modules_to_save" in children else children["base_layer"]


def get_active_copy(wrapper: Any) -> nn.Module:
    """The module that computes in the wrapper of a saved module: the copy of the active adapter, or the original."""
    active = None if wrapper.disable_adapters else next(iter(wrapper.active_adapters), None)  # it may have no copy here
    return dict(wrapper.modules_to_save.items()).get(active, wrapper.original_module)


def list_copies(module: nn.Module) -> list[tuple[nn.Module, bool]] | None:
    """PEFT's copies of a saved module, and whether they compute: only one does. None if the module is no wrapper of
    them."""
    children: Any = module._modules
    if "modules_to_save" not in children or not is_peft_wrapper(module):
        return None
    computes = get_active_copy(module)
    copies = (children["original_module"], *children["modules_to_save"].values())
    return [(copy, copy is computes) for copy in copies]


def find_tensors_not_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those tensors of a model that no file of its adapters will contain; [] if it has no adapters. In
    addition to their own weights, these files contain the modules in `modules_to_save`, whole."""
    held = {t for name, t in (*model.named_parameters(), *model.named_buffers()) if ".modules_to_save." in name}
    return [n for n, t in tensors.items() if t not in held] if any(map(is_peft_wrapper, model.modules())) else []


def find_missed_targets(model: nn.Module) -> list[str]:
    """The `target_parameters` of a model's adapters for which PEFT found no parameter."""
    adapted = [
        f".{name}.{parameter}".replace(".base_layer", "")
        for name, module in model.named_modules()
        if isinstance(parameter := getattr(module, "parameter_name", None), str) and is_peft_wrapper(module)
    ]
    configs = getattr(model, "peft_config", {}).values()
    asked = {target for config in configs for target in getattr(config, "target_parameters", None) or ()}
    return sorted(target for target in asked if not any(name.endswith(f".{target}") for name in adapted))


def applies_b_first(wrapper: Any) -> bool:
    """Whether tokens are multiplied by B of a stacked weight first and then by A; else by A first."""
    return wrapper._did_swap_in_out_features
