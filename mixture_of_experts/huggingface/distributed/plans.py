"""Puts layers with experts into the parallel plans of a model, and their gates on its mesh.

`from_pretrained(..., distributed_config=...)` of `transformers` reads the plans of a model that has no weights yet.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as generic

from mixture_of_experts.gating import Gate
from mixture_of_experts.huggingface.distributed.style import STYLE
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, layers_by_path
from mixture_of_experts.huggingface.private_transformers import mesh_of_data
from mixture_of_experts.parallel.style import spread_part


def plan_experts(model: Any) -> None:
    """Change the plans of a model whose feed-forward networks became layers with experts.

    The experts get a rule in `ep_plan`. Rules for what was replaced go: a rule names all layers of a model, so a dense
    network beside layers with experts is then whole on every rank under tensor parallelism.
    """
    layers = layers_by_path(model)
    for block in dict.fromkeys(block_around(name) for name in layers):
        start, left = f"{generic(block)}.", parts_left(model.get_submodule(block))
        for plan in (model.tp_plan, model.ep_plan):
            for rule in [rule for rule in plan if rule.startswith(start) and rule.removeprefix(start) not in left]:
                del plan[rule]
    for name, layer in layers.items():
        model.ep_plan[generic(f"{name}.moe.{spread_part(layer.moe)[0]}")] = STYLE


def block_around(name: str) -> str:
    """The path of the numbered block in which a module is: `model.layers.3` for `model.layers.3.mlp`."""
    numbered = re.match(r"(.*\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def parts_left(block: nn.Module) -> set[str]:
    """The names of the modules and parameters in a block, with "*" for numbers, but of layers with experts."""
    named = (*block.named_modules(), *block.named_parameters())
    replaced = [name for name, part in named if isinstance(part, MoEFeedForward | nn.Identity)]
    left = [name for name, _ in named if not any(f"{name}.".startswith(f"{other}.") for other in replaced)]
    return {generic(f".{name}")[1:] for name in left}


def share_batch(model: Any) -> None:
    """Make gates compute losses over the ranks that have other tokens, if `distributed_config` gave the model a mesh.

    Ranks of tensor parallelism have the same tokens: they count once.
    """
    mesh = mesh_of_data(model)
    if mesh is None or model.config.distributed_config.dp_size == 1:
        return
    group = (mesh["fsdp"] if mesh["dp_replicate"].size() == 1 else mesh._flatten()).get_group()
    for module in model.modules():
        if isinstance(module, Gate):
            module.process_group = group
