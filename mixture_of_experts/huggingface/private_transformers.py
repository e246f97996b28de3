"""Wraps all undocumented APIs of `transformers` and accelerate that this package uses.

`tests/huggingface/test_private_transformers.py` shows which of these APIs break in a new version.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.integrations.moe import _default_apply_gate
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel, local_torch_dtype
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    OutputRecorder,
    _active_collector,
    maybe_install_capturing_hooks,
)
from transformers.utils.quantization_config import QuantizationMethod

# Weight names


class FunctionRenaming(WeightRenaming):
    """A renaming that applies a function to each weight name when a model is loaded, but not when it is saved."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__([], [])
        self.function: Callable[[str], str] = function

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.function(source_key), None


class NoConversions(list[Any]):
    """An empty list of weight conversions, which makes a model save its state dict unchanged. `stock` stores the
    original conversions."""

    stock: list[Any] | None

    def __init__(self, stock: list[Any] | None = None) -> None:
        super().__init__()
        self.stock = stock


def use_own_names_on_save(model: nn.Module) -> None:
    """Make a model save its weights with the names and layout of its state dict."""
    stock = vars(model).get("_weight_conversions")
    if not isinstance(stock, NoConversions):
        model._weight_conversions = NoConversions(stock)  # pyright: ignore[reportArgumentType]


def save_stock_names(model: nn.Module) -> None:
    """Undo `use_own_names_on_save`."""
    held = vars(model).get("_weight_conversions")
    if isinstance(held, NoConversions):
        clear_weight_conversions(model)
        vars(model).update({} if held.stock is None else {"_weight_conversions": held.stock})


def convert_to_saved(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a model's weights to the names and layout that `save_pretrained` writes."""
    return revert_weight_conversion(model, dict(weights))  # pyright: ignore[reportArgumentType]


def map_to_published_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a model's weights to the names and layout of its class's checkpoints, regardless of how the model itself
    is saved."""
    model = copy.copy(model)
    clear_weight_conversions(model)
    return convert_to_saved(model, weights)


def clear_weight_conversions(model: nn.Module) -> None:
    """Make a model created from a state dict save its weights under the names that its class's checkpoints use."""
    vars(model).pop("_weight_conversions", None)


def load_partial_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Load a subset of a stock model's weights. `weights` has the names and layout of the class's checkpoints. All
    other weights remain unchanged."""
    mapping: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(weight_mapping=mapping)
    found, _ = convert_and_load_state_dict_in_model(model, dict(weights), settings)
    clear_weight_conversions(model)  # these conversions apply only to the given weights
    if found.unexpected_keys:
        raise ValueError(f"{type(model).__name__} has no weights named {', '.join(sorted(found.unexpected_keys))}")
    for name, stored, expected in sorted(found.mismatched_keys):
        raise make_shape_error(name, stored, expected)
    for name in sorted(found.conversion_errors):  # for example, experts of different shapes cannot be stacked
        raise ValueError(
            f"the stored weights of {name} do not match the shapes in config.json; download both again, or correct "
            "config.json"
        )


def make_shape_error(name: str, stored: Sequence[int], expected: Sequence[int]) -> ValueError:
    return ValueError(
        f"{name} has shape {tuple(stored)} in the files, but config.json implies {tuple(expected)}; download both "
        "again, or correct config.json"
    )


def find_unexpected_names(model: Any, names: Collection[str]) -> set[str]:
    """Return the unexpected weight names, except those that `transformers` ignores for the model's class."""
    found: Any = SimpleNamespace(missing_keys=set(), unexpected_keys={*names})
    model._adjust_missing_and_unexpected_keys(found)
    return found.unexpected_keys


def default_dtype(dtype: torch.dtype, model_class: type[PreTrainedModel]) -> AbstractContextManager[None]:
    """Return a context manager in which models are constructed in `dtype`, as in `from_pretrained`."""
    return local_torch_dtype(dtype, model_class.__name__)


def get_loaded_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype to which `from_pretrained(dtype=dtype)` casts each floating-point weight, keyed by weight name.

    The model must have been constructed within `default_dtype`. Some weights are always loaded in float32.
    """
    plan = model._get_dtype_plan(dtype)
    found = {name: weight.dtype for name, weight in model.state_dict().items() if weight.is_floating_point()}
    if plan:
        pattern, globs, _ = build_glob_alternation(list(plan))
        for name in found:
            if (match := pattern.search(name)) is not None and match.lastgroup is not None:
                found[name] = plan[globs[match.lastgroup]]
    return found


# Experts


def apply_gating(experts: Any, gate_up: Tensor) -> Tensor:
    """Apply the experts' own gating function to the concatenated or interleaved gate and up outputs `(t, 2 h)`."""
    return experts._apply_gate(gate_up)


def has_default_gating(experts: Any) -> bool:
    """Return whether experts use the default gating function of `transformers`. The default function splits gate and up
    into halves regardless of `is_concatenated`."""
    return type(experts)._apply_gate is _default_apply_gate


# Training


def get_checkpoint_function(module: nn.Module) -> Any:
    """Return the function that runs a layer under the model's own activation checkpointing, or None if checkpointing is
    not enabled."""
    return vars(module).get("_gradient_checkpointing_func")


def set_checkpoint_function(module: nn.Module, function: Any) -> None:
    module._gradient_checkpointing_func = function  # pyright: ignore[reportArgumentType]


def predicts_next_token(model: nn.Module) -> bool:
    """Return whether position i predicts label i + 1, according to the `Trainer`'s rule."""
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def remove_capturing_hooks(module: nn.Module) -> None:
    """Remove the hooks that capture a module's outputs for the model's return value. The module's replacement has its
    own hooks."""
    for number, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) == maybe_install_capturing_hooks.__module__:
            del module._forward_hooks[number]


def copy_output_capturing(model: nn.Module, other: nn.Module) -> None:
    """Register output-capturing hooks on the submodules of `model` at the same paths as in `other`. A model registers
    these hooks only once, so blocks that are added later need their own."""
    for name, module in other.named_modules():
        if getattr(module, "_output_capturing_hooks_installed", False):
            inner: Any = model.get_submodule(name)
            maybe_install_capturing_hooks(inner)


def has_recorded_logits(model: nn.Module, block: nn.Module) -> bool:
    """Return whether `output_router_logits=True` makes a model return the logits of a sparse block's router."""
    recorders = [
        recorder
        for inner in model.modules()
        if isinstance(inner, PreTrainedModel)
        for found in [_CAN_RECORD_REGISTRY.get(inner).get("router_logits", [])]
        for recorder in (found if isinstance(found, list) else [found])
    ]
    classes = [one.target_class if isinstance(one, OutputRecorder) else one for one in recorders]
    kinds = tuple(kind for kind in classes if isinstance(kind, type))
    return any(isinstance(module, kinds) for module in block.modules())


def collected_logits() -> list[Tensor] | None:
    """Return the router logits that the current forward pass has collected so far, or None if it does not collect
    any."""
    collected: Any = _active_collector.get()
    return None if collected is None else collected.get("router_logits")


# Loading


def was_loaded(tensor: Tensor) -> bool:
    """Return whether a parameter or buffer was loaded from the model's checkpoint."""
    return getattr(tensor, "_is_hf_initialized", False)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether a `device_map` has offloaded the weights of a module to disk or to the memory of another
    device."""
    return hasattr(module, "_hf_hook") and any(weight.is_meta for weight in module.parameters(recurse=False))


def is_from_gguf(model: nn.Module) -> bool:
    """Return whether a model was loaded from a GGUF file. The weights may be packed or dequantized."""
    return getattr(model, "quantization_method", None) == QuantizationMethod.GGUF


def is_packed_gguf(model: nn.Module) -> bool:
    """Return whether any of a model's weights are still packed in GGUF format."""
    return is_from_gguf(model) and not all(weight.is_floating_point() for weight in model.parameters())


def clear_gguf_quantizer(model: Any) -> None:
    """Remove the GGUF quantizer from a model after its weights were dequantized. Otherwise, trainers and
    `save_pretrained` would treat the model as quantized and reject it."""
    if is_from_gguf(model):
        model.hf_quantizer.remove_quantization_config(model)


def get_data_mesh(model: Any) -> Any:
    """Return the mesh ("dp_replicate", "fsdp") of the data-parallel ranks, which process different tokens. Return None
    if the model has no `distributed_config`."""
    meshes = getattr(model, "_mesh_manager", None)
    return None if meshes is None else meshes.get_mesh(("dp_replicate", "fsdp"))
