"""Maps the weight names in files to those in a model.

A `transformers` class may rename the weights of its checkpoints when it loads them, and restore the original names when
it saves them. A model with this package's layers saves all weights under its own names, because the `Trainer` does not
rename weights when it resumes a run or loads the best model. Weights stored under other names would keep their current
values. Earlier versions of this package saved the layers' weights under the class's names. Such files are also
supported.
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
    """Make a model and all models inside it save weights under their own names, if they contain this package's
    layers."""
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel) and find_layers(inner):
            use_own_names_on_save(inner)


def make_load_conversions(model: Any, conversions: list[Any]) -> list[Any]:
    """Return the name and weight conversions for loading a model. The conversions preserve names that already exist in
    the model, and map the names of the layers' weights to those in the model.

    The class's own renamings may also match names that already exist in the model. For the layers' weights, reversing a
    renaming may not restore the original name: `.gate.` may become `.mlp.gate.` after any prefix. Therefore, the first
    returned renaming replaces each name with a placeholder, and the last renaming replaces the placeholder with the
    model's name.
    """
    layers, weights = tuple(f"{name}." for name in find_layers(model)), list(model.state_dict())
    # three dimensions, because saving may concatenate weights along any of them
    numbers = {name: torch.full((1, 1, 1), number) for number, name in enumerate(weights)}
    files = own_names(model, numbers)
    files |= map_to_file_names(model, {name: number for name, number in numbers.items() if name.startswith(layers)})
    # placeholder names, which no renaming matches
    placeholders = {file: f"\0{number.item()}" for file, number in files.items()}
    names = {f"\0{number}": name for number, name in enumerate(weights)}
    return [
        FunctionRenaming(lambda name: placeholders.get(name, name)),
        *conversions,
        FunctionRenaming(lambda name: names.get(name, name)),
    ]


def map_to_file_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's weights under all names that they may have in files: their own names, and the names in the
    class's checkpoints."""
    return {**own_names(model, weights), **own_names(model, map_to_published_names(model, weights))}


def own_names(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's weights under their own names, each with and without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    return {start + name.removeprefix(prefix): weight for name, weight in weights.items() for start in ("", prefix)}
