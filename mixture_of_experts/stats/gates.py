"""Finds the gates of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from mixture_of_experts.gating import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.stats.foreign import Reader, find_readers


class GateSite(NamedTuple):
    """A gate in a model, with its path and sizes."""

    name: str
    gate: nn.Module
    outer: tuple[int, ...]  # leading dimensions of its weights, a router for each index
    num_experts: int
    outer_gate: str | None = None  # for level two: the gate of level one
    reader: Reader | None = None  # for a router of transformers, which is no gate


def find_gates(model: nn.Module) -> list[GateSite]:
    """All gates of a model, in its order: gates of `MoE` and `HeirarchicalMoE`, of any class; other `Gate`s; routers of
    MoE models in `transformers`."""
    # paths of gates are the same with and without the wrapper of a compiled module
    names = {module: name.replace("_orig_mod.", "") or "gate" for name, module in model.named_modules()}
    found: dict[nn.Module, GateSite] = {}
    readers = find_readers(model)
    copies: set[nn.Module] = set()
    for module, name in names.items():
        if isinstance(module, HeirarchicalMoE):
            outer, inner = module.gate_outer, module.gate_inner
            eo, ei = module.num_experts_outer, module.num_experts_inner
            found[outer] = GateSite(names[outer], outer, (), eo)
            found[inner] = GateSite(names[inner], inner, (eo,), ei, names[outer])
        elif isinstance(module, MoE):
            assert isinstance(module.num_experts, int)
            found.setdefault(module.gate, GateSite(names[module.gate], module.gate, (), module.num_experts))
            if hasattr(module.gate, "original_module"):  # PEFT's `modules_to_save`: the gate and a trained copy
                copies.update(module.gate.modules())
        elif isinstance(module, Gate) and module not in copies:
            found.setdefault(module, GateSite(name, module, module.outer_expert_dims, module.num_experts))
        elif module in readers:
            reader = readers[module]
            found[module] = GateSite(name, module, (), reader.num_experts(module), reader=reader)
    return list(found.values())


def device_of(gate: nn.Module, model: nn.Module) -> torch.device:
    """The device of the gate's parameters; if it has none, that of the model's."""
    for module in (gate, model):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.get_default_device()
