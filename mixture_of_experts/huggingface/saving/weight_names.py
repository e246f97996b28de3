"""Names of weights in files.

A class of `transformers` may rename the weights of its checkpoints when it loads them, and rename them back when it
saves them. A model with layers saves all weights under its own names, because `Trainer` loads files as they are: what
has another name in them would keep its values when a run is resumed, or when its best model is loaded. Files that have
the weights of layers under the class's names, as earlier versions wrote them, are loaded too.
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
    """Make a model, and each model in it, save weights under their own names if it has layers."""
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and find_layers(inner):
            use_own_names_on_save(inner)


def make_load_conversions(model: Any, conversions: list[Any]) -> list[Any]:
    """What is done with names and weights while a model is loaded, so that what has its own name in the files keeps it,
    and weights of layers have their own name afterwards.

    Renamings need not leave own names alone, and those there and back need not undo each other for weights of layers:
    `.gate.` may become `.mlp.gate.`, whatever stands before it. So the first renaming puts a mark in the place of each
    name, and the last one puts the name back.
    """
    layers, weights = tuple(f"{name}." for name in find_layers(model)), list(model.state_dict())
    # of three axes, as what saves them may join weights along any
    numbers = {name: torch.full((1, 1, 1), number) for number, name in enumerate(weights)}
    files = own_names(model, numbers)
    files |= map_to_file_names(model, {name: number for name, number in numbers.items() if name.startswith(layers)})
    placeholders = {file: f"\0{number.item()}" for file, number in files.items()}  # which no renaming knows
    names = {f"\0{number}": name for number, name in enumerate(weights)}
    return [
        FunctionRenaming(lambda name: placeholders.get(name, name)),
        *conversions,
        FunctionRenaming(lambda name: names.get(name, name)),
    ]


def map_to_file_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model by all names that they may have in files: their own, and those of its class's checkpoints."""
    own = own_names(model, weights)
    return {**own, **map_to_published_names(model, own)}


def own_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model by their own names, with a head and without."""
    prefix = f"{model.base_model_prefix}."
    return {start + name.removeprefix(prefix): weight for name, weight in weights.items() for start in ("", prefix)}
