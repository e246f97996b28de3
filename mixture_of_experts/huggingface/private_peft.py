"""Wraps the PEFT internals that this package relies on. Only `find_renamed_weights` imports PEFT.

`tests/huggingface/test_private_peft.py` shows which of these internals break in a new PEFT version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's file of adapter weights


def is_peft_wrapper(module: nn.Module) -> bool:
    """Return whether a module is a PEFT wrapper, that is, whether its class or a base class is defined in PEFT."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def get_peft_wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module that a PEFT wrapper currently runs, or None if `module` is not a wrapper."""
    children: Any = module._modules
    if not ("modules_to_save" in children or "base_layer" in children) or not is_peft_wrapper(module):
        return None
    return get_active_copy(module) if "modules_to_save" in children else children["base_layer"]


def get_active_copy(wrapper: Any) -> nn.Module:
    """Return the module that a `modules_to_save` wrapper currently runs: the active adapter's copy, or the original
    module."""
    # this wrapper may have no copy for the active adapter
    active = None if wrapper.disable_adapters else next(iter(wrapper.active_adapters), None)
    return dict(wrapper.modules_to_save.items()).get(active, wrapper.original_module)


def list_copies(module: nn.Module) -> list[tuple[nn.Module, bool]] | None:
    """Return all copies in a `modules_to_save` wrapper, each with a flag that indicates whether this copy is active.
    Return None if `module` is not such a wrapper."""
    children: Any = module._modules
    if "modules_to_save" not in children or not is_peft_wrapper(module):
        return None
    computes = get_active_copy(module)
    copies = (children["original_module"], *children["modules_to_save"].values())
    return [(copy, copy is computes) for copy in copies]


def find_tensors_not_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the given tensors that are not saved in the model's adapter files. In addition to adapter
    weights, these files contain the modules in `modules_to_save`. Return [] if the model has no adapters."""
    held = {t for name, t in (*model.named_parameters(), *model.named_buffers()) if ".modules_to_save." in name}
    return [n for n, t in tensors.items() if t not in held] if any(map(is_peft_wrapper, model.modules())) else []


def find_missed_targets(model: nn.Module) -> list[str]:
    """Return the `target_parameters` for which PEFT found no parameter in the model."""
    adapted = [
        f".{name}.{parameter}".replace(".base_layer", "")
        for name, module in model.named_modules()
        if isinstance(parameter := getattr(module, "parameter_name", None), str) and is_peft_wrapper(module)
    ]
    configs = getattr(model, "peft_config", {}).values()
    asked = {target for config in configs for target in getattr(config, "target_parameters", None) or ()}
    return sorted(target for target in asked if not any(name.endswith(f".{target}") for name in adapted))


def applies_b_first(wrapper: Any) -> bool:
    """Return whether a stacked weight's adapter multiplies tokens by B before A. Otherwise, A is applied first."""
    return wrapper._did_swap_in_out_features


def read_stack_factors(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of the update that an adapter adds to a stacked weight. The weight has shape `(e, p, q)`, and
    the factors have shapes `(e, p, k)` and `(e, k, q)`.

    PEFT stores A as `(e k, width)`, with experts as the outer dimension, and B as `(width, k e)`, with experts as the
    inner dimension. The experts' `is_transposed` attribute determines whether p is the width of A or of B.
    """
    a: Tensor = wrapper.lora_A[adapter].weight * wrapper.scaling[adapter]
    b: Tensor = wrapper.lora_B[adapter].weight
    e = wrapper.num_experts
    a = a.reshape(e, -1, a.shape[-1])  # (e, k, width of A)
    # copying a two-dimensional tensor is fastest
    b = b.reshape(-1, e).t().contiguous().view(e, b.shape[0], -1)  # (e, width of B, k)
    return (b, a) if applies_b_first(wrapper) else (a.mT, b.mT)


def write_stack_factors(wrapper: Any, adapter: str, left: Tensor, right: Tensor) -> None:
    """Set the LoRA factors A and B of a stacked weight, so that `read_stack_factors` returns `left` and `right` if the
    scaling factor is 1."""
    # shapes (e, width of B, k) and (e, k, width of A)
    b, a = (left, right) if applies_b_first(wrapper) else (right.mT, left.mT)
    wrapper.lora_A[adapter].weight = nn.Parameter(a.flatten(0, 1).contiguous())
    wrapper.lora_B[adapter].weight = nn.Parameter(b.permute(1, 2, 0).flatten(1).contiguous())


def is_plain_lora(wrapper: Any, adapter: str) -> bool:
    """Return whether an adapter is plain LoRA, without DoRA, other variants or biases."""
    has_variant = adapter in wrapper.lora_variant or wrapper.use_dora.get(adapter, False)
    return not has_variant and not wrapper.lora_bias.get(adapter, False)


def strip_wrappers(name: str) -> str:
    """Remove the parts that PEFT wrappers add to the path of a module."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def find_renamed_weights(model: Any, names: Iterable[str], adapter: str) -> dict[str, str]:
    """Return the adapter weights that PEFT would look up under names that do not exist in the model. The keys are the
    names that PEFT would use, and the values are the weights' names in the model.

    When PEFT loads an adapter, it applies the weight conversions of the model's class to the names in the file. These
    names do not contain the adapter's name.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    stored = {re.sub(rf"(\.lora_[AB])\.{re.escape(adapter)}\.", r"\1.", name): name for name in names}
    own = [*stored.values()]
    numbers = {f"base_model.model.{name}": torch.full((1, 1), i) for i, name in enumerate(stored)}
    converted = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[adapter], numbers, adapter)
    found = {
        name.removeprefix("base_model.model."): own[int(number)]
        for name, number in converted.items()
        if number.numel() == 1
    }
    return {name: original for name, original in found.items() if name not in stored}
