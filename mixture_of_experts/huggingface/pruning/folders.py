"""Prunes the experts of saved models, one layer at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.pruning.prune import KeptExperts, plan_pruning
from mixture_of_experts.huggingface.pruning.slicing import get_layer, slice_experts
from mixture_of_experts.huggingface.saving.folders import read_experts_model, rewrite_folder
from mixture_of_experts.huggingface.saving.shards import name_unreadable_file
from mixture_of_experts.support.private_torch import unwrap_module


def prune_folder(
    source: Path, target: Path, *, by: Any, keep: int | None = None, max_shard_size: int = 5 * 10**9
) -> KeptExperts:
    """Remove experts from a saved model. Return the ids of the experts that each layer keeps, keyed by gate name.

    Args:
        source: a folder written by `save_pretrained` or another command. The model's experts must not be quantized.
        target: path of the new folder, which must not exist yet.
        by, keep: as in `prune`, except that `by` must be "random" or a mapping from gate names to scores or expert ids.
            To compute scores, load the model from the folder and call `expert_scores`.
        max_shard_size: maximum size of a weight file, in bytes.

    Raises:
        ValueError, TypeError: as in `prune`. Also raised if the model has no experts, or if the names or shapes of its
            weights do not match the files.
        FileNotFoundError: `source` is not a folder.
        FileExistsError: `target` already exists.
        OSError: a file cannot be written, for example because the disk is full.
    """
    model = read_experts_model(source, "prune")
    kept, configure = plan_pruning(model, keep, by)
    paths = {unwrap_module(layer.moe): path for path, layer in find_layers(model).items()}
    smaller = {paths[get_layer(router)]: router for router, ids in kept.items() if len(ids) < router.num_experts}
    read = model.state_dict().__getitem__
    configure()  # the configuration now describes the pruned layers

    def change(path: str) -> dict[str, Tensor]:
        slice_experts(smaller[path], kept[smaller[path]])
        return model.get_submodule(path).state_dict(prefix=f"{path}.")

    rewrite_folder(model, read, smaller, change, source, target, max_shard_size)
    return {router.name: ids for router, ids in kept.items()}


def read_scores(file: Path) -> dict[str, Any]:
    """Read scores or expert ids, keyed by gate name, from a safetensors or JSON file. Raise ValueError for any other
    file."""
    with name_unreadable_file(file):
        return dict(json.loads(file.read_text()) if file.suffix == ".json" else load_file(file))
