"""Adds `MoE` layers to a model's parallel plans, and sets their gates' process groups from the model's device mesh.

`transformers` reads the plans in `from_pretrained(..., distributed_config=...)` before it loads the weights.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as generic

from mixture_of_experts.gating import Gate
from mixture_of_experts.huggingface.distributed.parallel_style import EXPERTS_STYLE
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, find_layers
from mixture_of_experts.huggingface.private_transformers import get_data_mesh
from mixture_of_experts.parallel.style import find_experts_to_shard


def update_parallel_plans(model: Any) -> None:
    """Update a model's parallel plans after its feed-forward networks were replaced with `MoE` layers.

    This function adds a rule for the experts to `ep_plan`, and removes the rules for replaced modules. A rule applies
    to all layers of a model, so the remaining dense networks are replicated on every rank under tensor parallelism.
    """
    layers = find_layers(model)
    for block in dict.fromkeys(get_block_path(name) for name in layers):
        start, left = f"{generic(block)}.", find_remaining_parts(model.get_submodule(block))
        for plan in (model.tp_plan, model.ep_plan):
            for rule in [rule for rule in plan if rule.startswith(start) and rule.removeprefix(start) not in left]:
                del plan[rule]
    for name, layer in layers.items():
        model.ep_plan[generic(f"{name}.moe.{find_experts_to_shard(layer.moe)[0]}")] = EXPERTS_STYLE


def get_block_path(name: str) -> str:
    """Return the path of the numbered block that contains a module, such as `model.layers.3` for
    `model.layers.3.mlp`."""
    numbered = re.match(r"(.*\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def find_remaining_parts(block: nn.Module) -> set[str]:
    """Return the names of a block's modules and parameters, except those inside `MoE` layers. Numbers in the names are
    replaced with "*"."""
    named = (*block.named_modules(), *block.named_parameters())
    replaced = [name for name, part in named if isinstance(part, MoEFeedForward | nn.Identity)]
    left = [name for name, _ in named if not any(f"{name}.".startswith(f"{other}.") for other in replaced)]
    return {generic(f".{name}")[1:] for name in left}


def set_gate_process_groups(model: Any) -> None:
    """Set the process groups of a model's gates, so that their losses cover all data-parallel ranks. This function has
    no effect if the model has no device mesh from `distributed_config`.

    Tensor-parallel ranks process the same tokens, so these tokens are counted only once.
    """
    mesh = get_data_mesh(model)
    if mesh is None or model.config.distributed_config.dp_size == 1:
        return
    group = (mesh["fsdp"] if mesh["dp_replicate"].size() == 1 else mesh._flatten()).get_group()
    for module in model.modules():
        if isinstance(module, Gate):
            module.process_group = group
