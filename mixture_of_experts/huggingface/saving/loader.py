"""Loads saved MoE models through the `from_pretrained` methods of `transformers`.

The loader uses the quantizer interface of `transformers`, because a quantizer can modify a model before its weights are
loaded. The loader does not quantize anything.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixture_of_experts.huggingface.replacement.dense_ffn import Adapter
from mixture_of_experts.huggingface.saving.configuration import LAYERS_KEY, MODEL_TYPE, read_layer_entries
from mixture_of_experts.huggingface.saving.layer_settings import GateFactory
from mixture_of_experts.huggingface.saving.restore import finish_loading, insert_experts
from mixture_of_experts.huggingface.saving.shards import check_float, check_shards
from mixture_of_experts.huggingface.saving.weight_names import make_load_conversions

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# arguments that a configuration would otherwise store as settings
NON_CONFIG_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")


@register_quantization_config(MODEL_TYPE)
@dataclass
class ExpertsLoaderConfig(QuantizationConfigMixin):
    """Layer descriptions from a configuration file, and arguments that were passed to `from_pretrained`."""

    quant_method: Any = MODEL_TYPE
    layers: Any = ()
    gate: GateFactory | None = None
    adapters: Mapping[str, Adapter] | None = None
    repack: bool = True  # whether to repack 4-bit weights in memory for this machine


@register_quantizer(MODEL_TYPE)
class ExpertsLoader(HfQuantizer):
    """A quantizer that inserts `MoE` layers into a model before its weights are loaded. The model is not marked as
    quantized, because trainers reject quantized models."""

    def preprocess_model(
        self, model: Any, *args: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        check_shards(model.config.name_or_path, checkpoint_files or ())
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # a submodule may have its own copy of the configuration
                vars(module.config).pop("quantization_config", None)
        loader_config: Any = self.quantization_config
        insert_experts(model, loader_config.layers, loader_config.gate, loader_config.adapters)
        state = model.state_dict()
        self.float_names = {name for name in state if state[name].is_floating_point()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return make_load_conversions(model, weight_conversions)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        loader_config: Any = self.quantization_config
        finish_loading(model, loader_config.repack)
        for name, value in model.state_dict().items():  # integers are loaded without conversion
            if name in self.float_names:
                check_float(name, value)
        del model.hf_quantizer

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def from_pretrained(
    path: str | PathLike[str],
    model_class: Any = None,
    *,
    gate: GateFactory | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    **settings: Any,
) -> Any:
    """Load a model that was modified by `replace_ffn` or `upcycle` and saved with `save_pretrained`.

    Once this package is imported, such a model can also be loaded with the Auto classes or with its own class. In
    addition, this function accepts a custom gate and adapters.

    Args:
        path: the folder of the model, or its name on the Hugging Face Hub.
        model_class: a `transformers` model class or `AutoModel...` class. Default: the class of the saved model.
        gate: the function that was passed to `replace_ffn`. It is required only for custom gates, because `config.json`
            describes this package's own gates.
        adapters: the adapters that were passed to `replace_ffn`.
        settings: arguments for the class's own `from_pretrained`, and configuration settings such as `num_labels=3`.
            `trust_remote_code` is False by default, so that no code from the folder is run and no prompt appears.

    Raises:
        ValueError: the configuration does not describe any experts, does not describe their gate, or contains settings
            that the layers do not have. Also raised if weight files are outside of the folder, do not match their
            index, or contain integers for floating-point weights.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from mixture_of_experts.huggingface import from_pretrained, replace_ffn
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
        >>> names = replace_ffn(model, num_experts=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = from_pretrained(folder)
        >>> type(again).__name__, bool((again.transformer.h[1].mlp.moe.experts.w1
        ...     == model.transformer.h[1].mlp.moe.experts.w1).all())
        ('GPT2LMHeadModel', True)
    """
    if "quantization_config" in settings:
        raise ValueError(
            "quantization_config is not supported; load the model, and then quantize it, for example with torchao's "
            "quantize_"
        )
    # with None, transformers would prompt on standard input
    settings.setdefault("trust_remote_code", False)
    config = settings.pop("config", None)
    if config is None:
        of_hub, trusted = (
            {name: settings[name] for name in HUB_ARGUMENTS if name in settings},
            settings["trust_remote_code"],
        )
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **of_hub)
    config = copy.deepcopy(config)
    for name in [name for name in settings if hasattr(config, name) and name not in NON_CONFIG_ARGUMENTS]:
        setattr(config, name, settings.pop(name))
    layers = read_layer_entries(config)
    if not layers:
        raise ValueError(
            f"{path} has no experts, because its configuration has no {LAYERS_KEY!r}; load the model with its own class"
        )
    config.quantization_config = {"quant_method": MODEL_TYPE, "layers": layers, "gate": gate, "adapters": adapters}
    return (model_class or find_saved_class(config)).from_pretrained(path, config=config, **settings)


def find_saved_class(config: Any) -> Any:
    """Return the `transformers` class of a saved model, given its configuration."""
    name = (config.architectures or ["?"])[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"transformers has no model class {name!r}; pass model_class, or write the model's class to config.json, "
            'such as "architectures": ["LlamaForCausalLM"]'
        )
    return found
