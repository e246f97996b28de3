"""Defines the `config.json` of a model with `MoE` layers, and the configuration that `AutoConfig` reads from it.

    {"model_type": "mixture_of_experts",
     "architectures": [...],
     "dense_config": {"model_type": "llama", ..., "quantization_config": {"quant_method": "mixture_of_experts",
                                                                         "layers": [...]}}}

Without this package, `AutoConfig` and all other Auto classes reject this model type. Once this package is imported,
`AutoConfig` returns the dense configuration, with `ExpertsLoader` as the quantizer. A model's own class also finds
`dense_config`, because it looks for a sub-configuration with its own `model_type`.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from os import PathLike
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.saving.layer_settings import LayerRecord, describe_layers

MODEL_TYPE = "mixture_of_experts"  # value of `model_type` and `quant_method`
LAYERS_KEY = "mixture_of_experts"  # configuration attribute that describes a model's layers with experts
DENSE_CONFIG_KEY = "dense_config"
UNSTACKED_FORM = {"class": "UnstackedExperts"}  # the entry that describes unstacked experts


class ExpertsConfig(PreTrainedConfig):
    """Reads the configuration of a saved MoE model, and returns the configuration of the dense model."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        dense = config_dict.get(DENSE_CONFIG_KEY, {})
        name = dense.get("model_type")
        if name not in CONFIG_MAPPING:
            raise ValueError(
                f"this configuration must name a dense model known to transformers, but {DENSE_CONFIG_KEY}.model_type "
                f"is {name!r}"
            )
        return make_config_class(CONFIG_MAPPING[name]).from_dict(dense, **kwargs)


AutoConfig.register(MODEL_TYPE, ExpertsConfig)


class ExpertsConfigMixin:
    """A mixin for configuration classes that adds a description of the experts to the saved file."""

    def to_dict(self: Any) -> dict[str, Any]:
        found = super().to_dict()  # type: ignore[misc]
        return {**found, LAYERS_KEY: read_layer_entries(self)} if LAYERS_KEY in found else found

    def to_json_file(self: Any, json_file_path: str | PathLike[str], use_diff: bool = True) -> None:
        # the saved configuration of a quantized model would not describe the layers
        if read_quantization(self).get("quant_method", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(
                f"a quantized model with experts ({type(self.quantization_config).__name__}) cannot be saved; save the "
                "model before quantization, and save only the adapters afterwards"
            )
        layers = read_layer_entries(self)
        if any("block" in layer and UNSTACKED_FORM in layer.get("forms", {}).values() for layer in layers):
            raise ValueError(
                f"{type(self).__name__} has unstacked experts in layers that replaced blocks, but transformers might "
                "stack their weights when loading them; call restack() on the model before saving it"
            )
        records = vars(self).get(LAYERS_KEY)
        records = records if isinstance(records, dict) else {}
        undescribed = [f"{path} of {name}" for name, record in records.items() for path in record.find_undescribed()]
        if undescribed:
            warnings.warn(
                f"config.json cannot describe {', '.join(undescribed)}, which was changed after the layer was "
                "inserted; set it again after loading",
                stacklevel=2,
            )
        dense = self.to_diff_dict() if use_diff else self.to_dict()
        dense["quantization_config"] = {"quant_method": MODEL_TYPE, "layers": layers}
        dense.pop(LAYERS_KEY, None)
        whole = {"model_type": MODEL_TYPE, "architectures": self.architectures, DENSE_CONFIG_KEY: dense}
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._encode_special_floats(whole), indent=2, sort_keys=True) + "\n")

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return empty, (type(self).__bases__[1],), self.__dict__


@cache
def make_config_class(plain: type[PreTrainedConfig]) -> Any:
    """Add `ExpertsConfigMixin` to the configuration class of a dense model, and return the new class. The new class
    keeps the original name, because `transformers` looks up classes by name."""
    if issubclass(plain, ExpertsConfigMixin):
        return plain
    return type(plain.__name__, (ExpertsConfigMixin, plain), {"__module__": plain.__module__, "__doc__": plain.__doc__})


def empty(plain: type[PreTrainedConfig]) -> Any:
    """Return an empty configuration for `copy` and `pickle`. Pickle cannot store the class by name, because the name
    refers to the dense class."""
    return object.__new__(make_config_class(plain))


def read_layer_entries(config: Any) -> list[dict[str, Any]]:
    """Return the layer descriptions in a configuration, or [] if it contains none. The configuration may belong to a
    model in memory or come from a file."""
    found, read = getattr(config, LAYERS_KEY, None), read_quantization(config)
    if found is None and read.get("quant_method") == MODEL_TYPE:
        found = read.get("layers")
    return describe_layers(found) if isinstance(found, dict) else list(found or [])


def read_quantization(config: Any) -> dict[str, Any]:
    """Return a configuration's quantizer settings, or {} if it has none."""
    read = getattr(config, "quantization_config", None) or {}
    return read if isinstance(read, dict) else vars(read)


def find_outermost_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the `transformers` models in a module, without the models inside them."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from find_outermost_models(child)


def store_layers_in_config(module: nn.Module) -> None:
    """Describe the `MoE` layers of all `transformers` models in a module in the models' configurations."""
    for model in find_outermost_models(module):
        if layers := find_layers(model):
            _store_layers(model, layers)


def _store_layers(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Describe a model's layers in its configuration.

    The configuration is copied first, because other models may share it. A model without a head keeps the original
    configuration, because it may be part of a model with a head, whose configuration must also describe the experts.
    """
    config = model.config
    for layer in layers.values():
        if layer.record is None or layer.record.layer() is not layer:
            layer.record = LayerRecord(layer)
    model.name_or_path = ""  # otherwise, PEFT would record this name as the adapters' base model
    copies: dict[int, Any] = {}
    if model.base_model is model:
        copies[id(config)] = config
    else:
        copy.deepcopy(config, copies)
    config_copy = copies[id(config)]
    config_copy.__class__ = make_config_class(type(config_copy))
    setattr(config_copy, LAYERS_KEY, {name: layer.record for name, layer in layers.items()})
    for module in model.modules():
        held = vars(module).get("config")
        if id(held) in copies:
            module.config = copies[id(held)]


def remove_layers_from_config(config: Any) -> None:
    """Remove the descriptions of experts from a configuration in memory."""
    if isinstance(config, ExpertsConfigMixin):
        config.__class__ = type(config).__bases__[1]
        for name in (LAYERS_KEY, "quantization_config"):
            vars(config).pop(name, None)
