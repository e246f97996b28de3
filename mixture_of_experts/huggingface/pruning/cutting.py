"""Cuts a layer down to some of its experts, in place: its gate, its experts, and what both know of their number.

Axes: e experts, d model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixture_of_experts.around import with_inner
from mixture_of_experts.experts import ExpertList, Experts, GatedExperts
from mixture_of_experts.gating import (
    ExpertChoiceGating,
    NoisyTopKGating,
    ReLUGating,
    RouterLogits,
    SparseMixerGating,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.gating.steps import LearnedScale, NormalizeBy
from mixture_of_experts.huggingface.feed_forward import tensors_of
from mixture_of_experts.moe import MoE
from mixture_of_experts.support.private_peft import from_peft
from mixture_of_experts.support.private_torch import is_wrapper_subclass, unwrapped, wrapped_class
from mixture_of_experts.unstack import UnstackedExperts
from mixture_of_experts.whole_model.sites import Site

GATES = (TopKGating, TopPGating, ReLUGating, NoisyTopKGating, Top2Gating, SparseMixerGating, ExpertChoiceGating)
#: the axis of the experts in the tensors of a gate, and those of its tensors that have none
GATE_AXES: dict[str, int] = dict.fromkeys(("w_gating", "w_noise", "b_gating", "expert_bias", "expert_counts"), -1)
GATE_AXES |= {"expert_histogram": -2, "logits.weight": -1, "logits.bias": -1, "weigh.scale": -1}
NO_AXIS = ("logits.norm_weight", "l1_coef", "choice_counts")
STACK_AXES: dict[str, int] = dict.fromkeys(("w1", "w2", "w3", "b1", "b2", "b3"), 0)
#: settings of a gate that may be functions or modules, and those of them that know no number of experts, or are cut
STEPS = ("logits", "score", "select", "group_score", "weigh", "normalize")
KNOWN = (RouterLogits, LearnedScale, NormalizeBy)


def why_not_cut(site: Site) -> str | None:
    """Why the experts of a site cannot be fewer, whichever stay; None if they can."""
    if site.external:
        return "it is no gate of this package: make its block a layer by from_transformers"
    if not all(isinstance(location.layer, nn.Module) for location in site.locations):
        return "it stands in no layer"
    layers = {unwrapped(location.layer) for location in site.locations if location.layer is not None}
    if len(layers) > 1:
        return f"it routes for several layers ({', '.join(site.names)})"
    layer: Any = layers.pop()
    if site.level_one is not None or site.outer or not isinstance(layer, MoE):
        return f"it is a level of a {wrapped_class(layer).__name__}"
    if any(map(from_peft, layer.modules())):
        return "its layer has adapters of PEFT: merge them first"
    if any(map(is_wrapper_subclass, (*tensors_of(site.gate).values(), *tensors_of(layer.experts).values()))):
        return "its weights are sharded or quantised: prune before that"
    return why_not_gate(site.gate) or why_not_experts(layer.experts)


def why_not_gate(gate: Any) -> str | None:
    unknown = [] if wrapped_class(gate) in GATES else ["its class"]
    for name in STEPS:
        step = getattr(gate, name, None)
        if callable(step) and not isinstance(step, KNOWN) and step is not functional.relu:
            unknown.append(f"{name}={getattr(step, '__qualname__', type(step).__name__)}")
    if getattr(getattr(gate, "bias_rule", None), "shares", None) is not None:
        unknown.append("bias_rule.shares")
    unknown += sorted(tensors_of(gate).keys() - GATE_AXES.keys() - {*NO_AXIS})
    return f"it is not known what of {', '.join(unknown)} belongs to which expert" if unknown else None


def why_not_experts(experts: nn.Module) -> str | None:
    *around, stack = with_inner(experts)
    around = [each for each in around if each.works_on == "experts"]
    if around or not (isinstance(stack, ExpertList) or wrapped_class(stack) in (Experts, GatedExperts)):
        return f"its experts are {wrapped_class([*around, stack][0]).__name__}"
    unknown = sorted(name for name in tensors_of(stack) if name not in STACK_AXES and not name.startswith("act."))
    if unknown and not isinstance(stack, ExpertList):
        return f"its experts also hold {', '.join(unknown)}: merge adapters, and remove parametrizations, first"
    return None


class PrunableLayer:
    """The layer of a site, whose experts can be fewer."""

    name: str
    gate: nn.Module
    e: int

    def __init__(self, site: Site) -> None:
        assert site.locations[0].layer is not None
        self.name, self.gate, self.e = site.name, site.gate, site.num_experts
        self.moe: Any = unwrapped(site.locations[0].layer)
        self.stack: Any = with_inner(self.moe.experts)[-1]  # the experts, without what is around them
        k: Any = getattr(self.gate, "k", 1)
        self.least: int = k + isinstance(self.gate, NoisyTopKGating)  # experts with which the gate works
        self.groups: int = getattr(self.gate, "num_groups", None) or 1
        self.open_groups: int = getattr(self.gate, "top_groups", None) or 1

    def check_number(self, number: int) -> None:
        """Raise ValueError if the layer cannot have so few experts, or has not so many."""
        of = f"prune cannot leave {number} of {self.e} experts to {self.name!r}"
        if not self.least <= number <= self.e:
            raise ValueError(f"{of}: keep from {self.least}, because of its k, to {self.e}")
        each, by_two = number // self.groups, getattr(self.gate, "group_score", None) == "two_best"
        if number % self.groups or self.open_groups * each < self.least or (each == 1 < self.groups and by_two):
            raise ValueError(
                f"{of}: its num_groups={self.groups} keep equally many, two at least if their two best score them, and "
                f"top_groups={self.open_groups} of them, which are open to a token, hold at least {self.least}"
            )

    def best(self, scores: Tensor, number: int) -> list[int]:
        """The experts of the largest scores `(e,)`, equally many of each expert group; of equals the first."""
        by_group = scores.view(self.groups, -1).argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(0, self.e, self.e // self.groups).unsqueeze(-1)
        return sorted((first + by_group[:, : number // self.groups]).flatten().tolist())

    def check_ids(self, ids: list[int]) -> None:
        """Raise ValueError if not just these experts can stay."""
        self.check_number(len(ids))
        counts = [sum(i * self.groups // self.e == group for i in ids) for group in range(self.groups)]
        if len({*counts}) > 1:
            raise ValueError(f"{self.name!r} keeps equally many experts of each of its groups, got {counts}: {ids}")

    def tensors(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Each tensor with an axis of experts: its module, its name there, and the axis."""
        for module, axes in ((self.gate, GATE_AXES), (self.stack, STACK_AXES)):
            for name, tensor in tensors_of(module).items():
                if name in axes and tensor.shape[axes[name]] == self.e:
                    path, _, leaf = name.rpartition(".")
                    yield module.get_submodule(path), leaf, axes[name]

    @torch.inference_mode(False)  # what is made in that mode cannot be trained
    @torch.no_grad()
    def cut(self, ids: list[int]) -> None:
        """Keep these experts alone, in place."""
        for module, name, axis in list(self.tensors()):
            old = getattr(module, name)
            new = old.detach().index_select(axis, torch.tensor(ids, device=old.device))
            if isinstance(old, nn.Parameter):
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
            else:
                module._buffers[name] = new
        if isinstance(self.stack, ExpertList):
            for i in sorted({*range(self.e)} - {*ids}, reverse=True):
                del self.stack[i]
        stacked: Any = vars(self.stack)["empty"] if isinstance(self.stack, UnstackedExperts) else self.stack
        if not isinstance(stacked, ExpertList):
            vars(stacked).update(expert_dims=(len(ids),), num_experts=len(ids))
        for module in (self.moe, *self.moe.gate.modules(), *with_inner(self.moe.experts)):
            if vars(module).get("num_experts") == self.e:  # a size, which a module otherwise sets once
                vars(module)["num_experts"] = len(ids)
