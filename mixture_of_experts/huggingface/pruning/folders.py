"""Prunes saved models, weight by weight, so that the model need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixture_of_experts.huggingface.pruning.cutting import tensors_to_cut
from mixture_of_experts.huggingface.pruning.prune import Chosen, prunable, prune_sites
from mixture_of_experts.huggingface.saving.folders import empty_with_experts, finish, finished, opened, readable


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
    with finished(target, max_shard_size) as writer:
        model, weights = empty_with_experts(source, "prune")
        sites = prunable(model, list(by) if isinstance(by, Mapping) else None)
        names = {module: name for name, module in model.named_modules()}
        axes = {
            stored: (site.name, axis)
            for site in sites
            for module, name, axis in tensors_to_cut(site)
            for stored in weights.names.get(f"{names[module]}.{name}", ())  # none for a buffer that is not saved
        }
        kept = prune_sites(model, sites, keep, by)
        for stored in tqdm(weights.files, desc="weights", unit="weight"):
            gate, axis = axes.get(stored, (None, 0))
            value = weights[stored]
            writer.add(stored, value if gate is None else value.index_select(axis, torch.tensor(kept[gate])))
        finish(model, writer, source)
        return kept


def read_choice(path: Path) -> dict[str, Any]:
    """Scores or ids by names of gates, from safetensors or JSON."""
    if path.suffix == ".json":
        with readable(path):
            return dict(json.loads(path.read_text()))
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
