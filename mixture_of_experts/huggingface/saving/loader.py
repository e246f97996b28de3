"""Lets `from_pretrained` of `transformers` itself load a model with experts.

It uses the interface for quantised models, which may change a model before weights are loaded. Nothing is quantised.
The marks of that interface are removed from the model afterwards, because trainers refuse quantised models.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixture_of_experts.huggingface.saving.configuration import NAME
from mixture_of_experts.huggingface.saving.names import LayerNames
from mixture_of_experts.huggingface.saving.restore import finish_loading, put_experts


@register_quantization_config(NAME)
class ExpertsLoaderConfig(QuantizationConfigMixin):
    """The description of layers with experts from a configuration file."""

    def __init__(self, layers: list[dict[str, Any]], quant_method: str = NAME, **others: Any) -> None:
        self.quant_method: Any = quant_method
        self.layers = layers


# transformers refuses another quantization_config by the name of this class: let it say what does take one
ExpertsLoaderConfig.__name__ += " (for another one call from_pretrained of mixture_of_experts.huggingface)"


@register_quantizer(NAME)
class ExpertsLoader(HfQuantizer):
    """Puts layers with experts into a model that has no weights yet."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        put_experts(model, self.quantization_config.layers)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return [*super().update_weight_conversions(weight_conversions, model), LayerNames(model)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        finish_loading(model)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                for name in ("quantization_config", "_is_quantized"):
                    vars(module.config).pop(name, None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
