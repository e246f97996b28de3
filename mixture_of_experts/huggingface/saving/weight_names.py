"""Names of weights in files.

A `transformers` class may rename the weights of its checkpoints when loading them, and rename them back when saving
them. A model with layers saves all weights under its own names, because `Trainer` loads files without renaming: weights
with other names would keep their current values when a run is resumed or its best model is loaded. Files with the
weights of layers under the class's names, as written by earlier versions, are also supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.private_transformers import (
    FunctionRenaming,
    map_to_published_names,
    use_own_names_on_save,
)


def keep_names_on_saving(model: nn.Module) -> None:
    """Make a model, and each model inside it, save weights under their own names if it has layers."""
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and find_layers(inner):
            use_own_names_on_save(inner)


def make_load_conversions(model: Any, conversions: list[Any]) -> list[Any]:
    """Return the conversions of names and weights for loading a model. Names in the files that are the model's own are
    kept, and weights of layers have their own names afterwards.

    Renamings may also change the model's own names, and for weights of layers, renaming and reverse renaming may not be
    inverses: `.gate.` may become `.mlp.gate.` after any prefix. Therefore the first renaming replaces each name by a
    placeholder, and the last one restores the name.
    """
    layers, weights = tuple(f"{name}." for name in find_layers(model)), list(model.state_dict())
    # three dimensions, because saving may concatenate weights along any of them
    numbers = {name: torch.full((1, 1, 1), number) for number, name in enumerate(weights)}
    files = own_names(model, numbers)
    files |= map_to_file_names(model, {name: number for name, number in numbers.items() if name.startswith(layers)})
    placeholders = {file: f"\0{number.item()}" for file, number in files.items()}  # names that no renaming matches
    names = {f"\0{number}": name for number, name in enumerate(weights)}
    return [
        FunctionRenaming(lambda name: placeholders.get(name, name)),
        *conversions,
        FunctionRenaming(lambda name: names.get(name, name)),
    ]


def map_to_file_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a model under all names they may have in files: their own, and those in its class's
    checkpoints."""
    own = own_names(model, weights)
    return {**own, **map_to_published_names(model, own)}


def own_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a model under their own names, with and without a head."""
    prefix = f"{model.base_model_prefix}."
    return {start + name.removeprefix(prefix): weight for name, weight in weights.items() for start in ("", prefix)}
