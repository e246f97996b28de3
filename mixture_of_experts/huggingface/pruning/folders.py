"""Prunes saved models, weight by weight, so that the model need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mixture_of_experts.huggingface.feed_forward import layers_by_path
from mixture_of_experts.huggingface.pruning.cutting import PrunableLayer
from mixture_of_experts.huggingface.pruning.prune import Chosen, prunable, prune_sites
from mixture_of_experts.huggingface.saving.folders import read_experts, readable, rewrite


def prune_folder(
    source: Path, target: Path, *, by: Any, keep: int | None = None, max_shard_size: int = 5 * 10**9
) -> Chosen:
    """Remove experts of a saved model with experts; return the ids that each layer keeps, by the name of its gate.

    Args:
        source: a folder that `save_pretrained` or `upcycle_folder` wrote.
        target: a new folder.
        by, keep: as in `prune`: "random", or scores or ids by names of gates. `expert_scores` reads a text, with the
            model in memory.
        max_shard_size: most bytes of a file of weights.

    Raises:
        ValueError, TypeError: as in `prune`; or the folder has no experts, or its files lack some of the weights.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
    """
    model = read_experts(source, "prune")
    sites, state = prunable(model, list(by) if isinstance(by, Mapping) else None), model.state_dict()
    names = {module: name for name, module in model.named_modules()}
    axes = {
        f"{names[module]}.{name}": (site.name, axis)
        for site in sites
        for module, name, axis in PrunableLayer(site).tensors()
    }
    kept = prune_sites(model.to("meta"), sites, keep, by)

    def pruned(name: str) -> Tensor:
        gate, axis = axes.get(name, (None, 0))
        return state[name] if gate is None else state[name].index_select(axis, torch.tensor(kept[gate]))

    def change(path: str) -> dict[str, Tensor]:
        return {name: pruned(name) for name in state if name.startswith(f"{path}.")}

    rewrite(model, state, layers_by_path(model), change, source, target, max_shard_size)
    return kept


def read_choice(path: Path) -> dict[str, Any]:
    """Scores or ids by names of gates, from safetensors or JSON."""
    if path.suffix == ".json":
        with readable(path):
            return dict(json.loads(path.read_text()))
    with readable(path):
        return dict(load_file(path))
