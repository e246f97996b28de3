"""Checks that the experts receive their adapters when PEFT loads an adapter file into a model with this package's
layers.

PEFT ignores weights in an adapter file if the model has no matching parameter. The experts would then run without the
adapter, or with an untrained one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.private_peft import find_renamed_weights, is_peft_wrapper
from mixture_of_experts.quantize import QuantizedExperts


def check_adapter_names(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    """A `load_state_dict` pre-hook that renames the experts' adapter weights to their names in the model.

    When PEFT loads an adapter, it renames the weights according to the checkpoint rules of the model's class. These
    rules may also match names in this package's layers. For example, the rules of Mistral Large 4 insert `.mlp` before
    `.experts.`.

    Args:
        model: a model with this package's layers.
        state_dict: the state dict being loaded, which is modified in place.
        prefix: the path of `model` in the module that loads the state dict.
        args: the remaining arguments of a pre-hook, which are ignored.

    Raises:
        ValueError: the state dict contains adapter weights that a layer does not have.
    """
    # outside of `weights_shown`, quantized experts have no weights for PEFT to adapt, and their forward pass raises an
    # error
    adaptable = [path for path, layer in find_layers(model).items() if not has_quantized_experts(layer)]
    layers = tuple(f"{prefix}{path}." for path in adaptable)
    own = {name for name, _ in model.named_parameters() if ".lora_" in name}
    unknown = {name for name in state_dict if ".lora_" in name and name.startswith(layers)}
    unknown -= {prefix + name for name in own}
    adapters = getattr(model, "peft_config", {})
    if len(adapters) > 1:  # PEFT adds the adapter's name only to names that it recognizes
        adapters = [name for name in adapters if any(f".{name}." in weight for weight in state_dict)]
    if unknown and len(adapters) == 1:
        for renamed, name in find_renamed_weights(model, own, *adapters).items():
            if prefix + renamed in unknown:
                state_dict[prefix + name] = state_dict.pop(prefix + renamed)
                unknown.remove(prefix + renamed)
    if unknown:
        raise ValueError(
            f"the adapter contains {min(unknown)}, but the layer has no such weight, so the experts would run without "
            "it. If the adapter is for the stock model, load it there and call merge_and_unload() before "
            "from_transformers(). If it is for this model, load it before any other adapter, with the same "
            "target_parameters"
        )


def adds_to_quantized_weight(module: Any) -> bool:
    """Return whether a module is a PEFT wrapper that would add an update to a quantized expert weight."""
    if not isinstance(getattr(module, "parameter_name", None), str) or hasattr(module, "passes_factors"):
        return False
    return is_peft_wrapper(module) and isinstance(module.get_base_layer(), QuantizedExperts)


def has_quantized_experts(layer: nn.Module) -> bool:
    return any(isinstance(module, QuantizedExperts) for module in layer.modules())
