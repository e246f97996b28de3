"""Checks that adapters which PEFT loads into a model with layers of this package reach their experts.

PEFT ignores weights in an adapter's file for which the model has no parameter, so experts would compute without the
adapter, or with one that was never trained.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.private_peft import find_renamed_weights
from mixture_of_experts.quantize import QuantizedExperts


def check_adapter_names(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    """Pre-hook of `load_state_dict` on a model with layers: gives adapter weights of experts their names in the model.

    On loading, PEFT renames adapter weights by the rules for checkpoints of the model's class, which may also match the
    names of layers: Mistral Large 4 inserts `.mlp` before `.experts.`.

    Args:
        model: the model.
        state_dict: what is loaded; it is changed in place.
        prefix: the model's path in the model that loads it.
        args: the other arguments of such a hook.

    Raises:
        ValueError: it contains adapter weights of a layer that the layer does not have.
    """
    # quantized experts have no weights for PEFT to adapt outside of `weights_shown`; their forward raises
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
            f"the adapter has {min(unknown)}, but the layer there has no such weight, so its experts would compute "
            "without it. An adapter of the stock model: load it there, and merge_and_unload() it before "
            "from_transformers(). An adapter of this model: load it before all others, with the same target_parameters"
        )


def has_quantized_experts(layer: nn.Module) -> bool:
    return any(isinstance(module, QuantizedExperts) for module in layer.modules())
