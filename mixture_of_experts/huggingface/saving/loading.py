"""Loads saved models with experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from mixture_of_experts.huggingface.feed_forward import Replaced
from mixture_of_experts.huggingface.replacement.adapters import Adapter
from mixture_of_experts.huggingface.saving.configuration import KEY, layers_with_experts
from mixture_of_experts.huggingface.saving.layer_settings import GateFactory
from mixture_of_experts.huggingface.saving.names import LayerNames
from mixture_of_experts.huggingface.saving.restore import finish_loading, put_experts

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
NOT_IN_CONFIG = ("dtype", "torch_dtype", "quantization_config")  # a configuration would keep them as settings


def from_pretrained(
    path: str | PathLike[str],
    model_class: Any = None,
    *,
    gate: GateFactory | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    **settings: Any,
) -> Any:
    """Load a model that `replace_ffn` or `upcycle` changed and `save_pretrained` wrote.

    Auto classes and the model's own class load it too, once this package is imported. This function also takes a gate
    of your own, adapters, and folders that earlier versions saved.

    Args:
        path: the folder, or a name on the hub.
        model_class: a class of `transformers` or one of its `AutoModel...`; by default the class that was saved.
        gate: the function that was given to `replace_ffn`. It is needed only for gates that are not of this package;
            `config.json` describes the others.
        adapters: those that were given to `replace_ffn`.
        settings: arguments of the class's own `from_pretrained`, and settings of the configuration (`num_labels=3`).
            With `config=` of a changed model you can load a checkpoint of the dense model: experts are then
            initialised, with a warning. (To make them copies of the networks, load the dense model and call `upcycle`.)

    Raises:
        ValueError: the configuration has no experts, or does not describe their gate.

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
    config = settings.pop("config", None)
    if config is None:
        kept = {name: settings.pop(name) for name in (*HUB, *NOT_IN_CONFIG) if name in settings}
        hub = {name: value for name, value in kept.items() if name in HUB}
        read: Any = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **hub, **settings)
        config, settings = read[0], {**read[1], **kept}
    config = copy.deepcopy(config)
    layers = layers_with_experts(config)
    if not layers:
        raise ValueError(f"{path} has no experts: its configuration has no {KEY!r}. Load it by its own class")
    vars(config).pop("quantization_config", None)
    plain = find_class(config, model_class)
    wants_info = settings.pop("output_loading_info", False)
    # a dense matrix in the place of experts is no mismatch here: experts are initialised
    may_mismatch = settings.pop("ignore_mismatched_sizes", False)
    loads: Any = with_experts(plain, layers, gate, adapters)
    model, info = loads.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    refuse_mismatches(model, info["mismatched_keys"], may_mismatch)
    finish_loading(model, info["missing_keys"])
    return (model, info) if wants_info else model


def find_class(config: Any, model_class: Any) -> type[PreTrainedModel]:
    """The class of a model: `model_class`, or the saved class; for an Auto class that of the configuration."""
    if model_class is None:
        names = getattr(config, "architectures", None) or ["?"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise ValueError(f"transformers has no class {names[0]!r}: pass model_class")
    mapping = getattr(model_class, "_model_mapping", None)
    return model_class if mapping is None else mapping[type(config)]


def with_experts(
    plain: type[PreTrainedModel], layers: list[dict[str, Any]], gate: GateFactory | None, adapters: Any
) -> type[PreTrainedModel]:
    """A subclass of `plain` whose models are made with experts, so that weights find their places."""

    def initialise(self, config, *args, **kwargs):
        plain.__init__(self, config, *args, **kwargs)
        put_experts(self, layers, gate, adapters)
        self.__class__ = plain  # before FSDP makes its own class of it

    def load(model: Any, state_dict: Any, files: Any, load_config: Any, *others: Any) -> Any:
        mapping = [*(load_config.weight_mapping or []), LayerNames(model)]
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        return plain._load_pretrained_model(model, state_dict, files, load_config, *others)

    # with the module of `plain`, or transformers would take it for a user's code
    own = {"__init__": initialise, "_load_pretrained_model": staticmethod(load), "__module__": plain.__module__}
    return type(plain.__name__, (plain,), own)


def refuse_mismatches(model: nn.Module, mismatched: Collection[Any], allowed: bool) -> None:
    """Refuse sizes that do not match, as transformers does, but not those of layers that became experts."""
    for name, found, expected in mismatched:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Replaced) and name.endswith("weight"):
            module.weight.zero_()
        elif not allowed:
            raise RuntimeError(
                f"size mismatch: {name} has shape {tuple(found)} in the checkpoint, {tuple(expected)} here"
            )
