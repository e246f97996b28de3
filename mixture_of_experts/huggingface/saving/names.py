"""Names of weights in files. A model's class may rename the weights of its checkpoints; those of layers keep theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.huggingface.feed_forward import layers_by_path
from mixture_of_experts.huggingface.private_transformers import Rename, as_saved


def keep_names(model: Any, conversions: list[Any]) -> list[Any]:
    """What is done with names and weights while a model is loaded, so that weights of its layers keep their names.

    Renamings there and back need not undo each other for weights of ours: `.gate.` may become `.mlp.gate.`, whatever
    stands before it. So the first renaming puts a mark in the place of each name, and the last one puts the name back.
    """
    layers = tuple(f"{name}." for name in layers_by_path(model))
    weights = [name for name in model.state_dict() if name.startswith(layers)]
    # of three axes, as what saves them may join weights along any
    numbers = in_files(model, {name: torch.full((1, 1, 1), number) for number, name in enumerate(weights)})
    marks = {file: f"\0{number.item()}" for file, number in numbers.items()}  # which no renaming knows
    names = {f"\0{number}": name for number, name in enumerate(weights)}
    return [Rename(lambda name: marks.get(name, name)), *conversions, Rename(lambda name: names.get(name, name))]


def in_files(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model by all names that they may have in files: their own, and those by which its class saves them,
    with a head and without."""
    prefix = f"{model.base_model_prefix}."
    own = {start + name.removeprefix(prefix): weight for name, weight in weights.items() for start in ("", prefix)}
    return {**own, **as_saved(model, own)}
