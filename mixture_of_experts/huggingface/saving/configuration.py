"""The `config.json` of a model with experts, and the configuration that `AutoConfig` reads from it.

    {"model_type": "mixture_of_experts",
     "architectures": [...],
     "dense_config": {"model_type": "llama", ..., "quantization_config": {"quant_method": "mixture_of_experts",
                                                                         "layers": [...]}}}

Without this package, `AutoConfig`, and therefore every Auto class, rejects this model type. With it, they get the dense
configuration, with `ExpertsLoader` as the quantizer. A model's own class finds `dense_config` by itself, because it
looks for a sub-configuration with its own `model_type`.
"""

from __future__ import annotations

import copy
import json
import warnings
from functools import cache
from os import PathLike
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.saving.layer_settings import LayerRecord, describe_layers

MODEL_TYPE = "mixture_of_experts"  # value of `model_type` and `quant_method`
LAYERS_KEY = "mixture_of_experts"  # configuration attribute that lists a model's layers with experts
DENSE_CONFIG_KEY = "dense_config"
UNSTACKED_FORM = {"class": "UnstackedExperts"}  # the entry that describes unstacked experts


class ExpertsConfig(PreTrainedConfig):
    """A configuration that reads the saved one of a model with experts, and returns the configuration of the dense
    model."""

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
    """A mixin for the class of a model's configuration that writes a description of the experts to its file."""

    def to_dict(self: Any) -> dict[str, Any]:
        found = super().to_dict()  # type: ignore[misc]
        return {**found, LAYERS_KEY: read_layer_entries(self)} if LAYERS_KEY in found else found

    def to_json_file(self: Any, json_file_path: str | PathLike[str], use_diff: bool = True) -> None:
        # the file of a quantized model would lack the layers
        if read_quantization(self).get("quant_method", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(
                f"a quantized model with experts ({type(self.quantization_config).__name__}) cannot be saved; save the "
                "model before quantization, and save only the adapters afterwards"
            )
        layers = read_layer_entries(self)
        if any("block" in layer and UNSTACKED_FORM in layer.get("forms", {}).values() for layer in layers):
            raise ValueError(
                f"{type(self).__name__} has unstacked experts in layers that replaced blocks, and a model class may "
                "load them into stacks of its own; call restack() on the model before saving it"
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
    """Return the class of a dense model's configuration with `ExpertsConfigMixin` added. Its name is unchanged, because
    transformers looks it up."""
    if issubclass(plain, ExpertsConfigMixin):
        return plain
    return type(plain.__name__, (ExpertsConfigMixin, plain), {"__module__": plain.__module__, "__doc__": plain.__doc__})


def empty(plain: type[PreTrainedConfig]) -> Any:
    """Return an empty configuration, for copies and pickles. Pickle would find the dense class if it had only the class
    name."""
    return object.__new__(make_config_class(plain))


def read_layer_entries(config: Any) -> list[dict[str, Any]]:
    """Return the descriptions of layers with experts in a configuration, of a model in memory or from a file, or [] if
    there are none."""
    found, read = getattr(config, LAYERS_KEY, None), read_quantization(config)
    if found is None and read.get("quant_method") == MODEL_TYPE:
        found = read.get("layers")
    return describe_layers(found) if isinstance(found, dict) else list(found or [])


def read_quantization(config: Any) -> dict[str, Any]:
    """Return the quantizer settings in a configuration, or {} if there are none."""
    read = getattr(config, "quantization_config", None) or {}
    return read if isinstance(read, dict) else vars(read)


def store_layers_in_config(model: nn.Module) -> None:
    """Add the layers with experts to the model's configuration.

    The model gets a separate configuration, because other models may share the old one. A model without a head keeps
    the old one, because it may be part of a model with a head, whose configuration must describe the experts too. For a
    module that is not a `transformers` model, this applies to the models in it that have such layers.
    """
    if not isinstance(model, PreTrainedModel):
        for inner in model.children():
            store_layers_in_config(inner)
        return
    config, layers = model.config, find_layers(model)
    if not layers:
        return
    for layer in layers.values():
        if layer.record is None or layer.record.layer() is not layer:
            layer.record = LayerRecord(layer)
    model.name_or_path = ""  # PEFT would record that folder as the base model of adapters
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
    """Remove everything that describes experts from a configuration in memory."""
    if isinstance(config, ExpertsConfigMixin):
        config.__class__ = type(config).__bases__[1]
        for name in (LAYERS_KEY, "quantization_config"):
            vars(config).pop(name, None)
