"""Keeps the names of the weights of layers where a model's class renames the weights of its checkpoints."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, apply_renamings
from transformers.core_model_loading import rename_source_key as name_when_loaded

from mixture_of_experts.huggingface.feed_forward import MoEFeedForward


class LayerNames(WeightRenaming):
    """The last renaming while a model is loaded: gives the weights of its layers their own names back.

    Names in a file are those of the class's checkpoints. Renamings there and back need not undo each other for
    weights of ours: `.gate.` may become `.mlp.gate.`, whatever stands before it. It is not used to save the model.

    Raises:
        ValueError: a weight of a layer is loaded as a part of another weight of the model.
    """

    __slots__ = ("own",)

    def __init__(self, model: Any) -> None:
        super().__init__([], [])
        layers = [name for name, module in model.named_modules() if isinstance(module, MoEFeedForward)]
        names: set[str] = set(model.state_dict())
        prefix = f"{model.base_model_prefix}."
        saving = [one for one in get_model_conversion_mapping(model, add_legacy=False) if type(one) is not PrefixChange]
        saving = [one for one in (one.reverse_transform() for one in saving[::-1]) if isinstance(one, WeightRenaming)]
        loading = get_model_conversion_mapping(model)
        renamings = [one for one in loading if isinstance(one, WeightRenaming)]
        converters = [one for one in loading if isinstance(one, WeightConverter)]
        self.own: dict[str, str] = {}
        for name in (name for name in names if any(name.startswith(f"{layer}.") for layer in layers)):
            stored = apply_renamings(name, saving)
            heads = [start + file.removeprefix(prefix) for file in (stored, name) for start in ("", prefix)]
            for file in (stored, name, *heads):  # with `save_original_format=False`; of models with and without a head
                loaded, merged = name_when_loaded(file, renamings, converters)
                if not merged and (loaded == name or loaded not in names) and self.own.get(loaded, name) == name:
                    self.own[loaded] = name
                elif file == stored:
                    raise ValueError(
                        f"transformers loads {file}, a weight of a layer with experts, as {loaded}, another weight of "
                        f"a {type(model).__name__}: load the stock model, and change it after that"
                    )

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.own.get(source_key, source_key), None
