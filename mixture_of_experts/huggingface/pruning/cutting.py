"""Cuts a layer down to some of its experts, in place: its gate, its experts, and what both know of their number.

Axes: e experts, d model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.around import EnclosedExperts, InputWeightedExperts, NormedExperts
from mixture_of_experts.experts import ExpertList, Experts, GatedExperts
from mixture_of_experts.gating import (
    ExpertChoiceGating,
    NoisyTopKGating,
    ReLUGating,
    SparseMixerGating,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.gating.steps import AlwaysChosen, LearnedScale, NormalizeBy, OpenGroups, named
from mixture_of_experts.huggingface.replacement.adapters import has_peft
from mixture_of_experts.moe import MoE
from mixture_of_experts.support.private_torch import is_wrapper_subclass, wrapped_class
from mixture_of_experts.whole_model.sites import Site, unwrapped

GATES = (TopKGating, TopPGating, ReLUGating, NoisyTopKGating, Top2Gating, SparseMixerGating, ExpertChoiceGating)
AROUND = (EnclosedExperts, NormedExperts, InputWeightedExperts)
#: the axis of the experts in the tensors of a gate, and those of its tensors that have none
GATE_AXES = {"w_gating": -1, "w_noise": -1, "b_gating": -1, "expert_bias": -1, "expert_counts": -1}
GATE_AXES |= {"expert_histogram": -2, "logits.weight": -1, "logits.bias": -1, "weigh.scale": -1}
NO_AXIS = ("logits.norm_weight", "l1_coef", "choice_counts")
STACKS = ("w1", "w2", "w3", "b1", "b2", "b3")
#: settings of a gate that may be functions, and the kinds that compute the same with fewer experts
STEPS = {"score": (), "select": (AlwaysChosen, OpenGroups), "group_score": (), "weigh": (LearnedScale,)}
STEPS |= {"normalize": (NormalizeBy,)}


def why_not_cut(site: Site) -> str | None:
    """Why the experts of a site cannot be fewer, whichever stay; None if they can."""
    if site.external:
        return "it is no gate of this package: make its block a layer by from_transformers"
    if not all(isinstance(stand.layer, nn.Module) for stand in site.stands):
        return "it stands in no layer"
    layers = {unwrapped(stand.layer) for stand in site.stands if stand.layer is not None}
    if len(layers) > 1:
        return f"it routes for several layers ({', '.join(site.names)})"
    layer: Any = layers.pop()
    if site.level_one is not None or site.outer or not isinstance(layer, MoE):
        return f"it is a level of a {wrapped_class(layer).__name__}"
    if has_peft(layer):
        return "its layer has adapters of PEFT: merge them first"
    return why_not_gate(site.gate) or why_not_experts(layer.experts)


def why_not_gate(gate: Any) -> str | None:
    if wrapped_class(gate) not in GATES:
        return "what it knows of each expert is not known"
    for name, kinds in STEPS.items():
        step, own = getattr(gate, name, None), isinstance(gate, ReLUGating) and name == "score"
        if callable(step) and not isinstance(step, kinds) and not own:
            return f"{name}={named(step)} may depend on the number of experts"
    if getattr(getattr(gate, "bias_rule", None), "shares", None) is not None:
        return "its bias_rule has a share for each expert: give it another rule first"
    tensors = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
    unknown = sorted(tensors.keys() - GATE_AXES.keys() - {*NO_AXIS})
    if unknown:
        return f"of {', '.join(unknown)} it is not known what belongs to which expert"
    return why_not_tensors(tensors.values())


def why_not_experts(experts: nn.Module) -> str | None:
    stack = innermost(experts)
    if isinstance(stack, ExpertList):
        return why_not_tensors(stack.parameters())
    if wrapped_class(stack) not in (Experts, GatedExperts):
        return f"its experts are {wrapped_class(stack).__name__}"
    tensors = {**dict(stack.named_parameters()), **dict(stack.named_buffers())}
    unknown = sorted(name for name in tensors if name not in STACKS and not name.startswith("act."))
    if unknown:
        return f"its experts also hold {', '.join(unknown)}: merge adapters, and remove parametrizations, first"
    return why_not_tensors(tensors.values())


def why_not_tensors(tensors: Any) -> str | None:
    wraps = any(is_wrapper_subclass(tensor) for tensor in tensors)
    return "its weights are sharded or quantised: prune before that" if wraps else None


def innermost(experts: nn.Module) -> Any:
    """The stacked experts, or the list of experts, inside others."""
    experts = unwrapped(experts)
    while isinstance(experts, AROUND):
        experts = unwrapped(experts.experts)
    return experts


class PrunableLayer:
    """The layer of a site, whose experts can be fewer."""

    def __init__(self, site: Site) -> None:
        assert site.stands[0].layer is not None
        self.name, self.gate, self.e = site.name, site.gate, site.num_experts
        self.moe: Any = unwrapped(site.stands[0].layer)

    @property
    def always(self) -> int:
        """The number of experts that every token takes, the last ones: they stay."""
        return getattr(self.gate, "always_chosen", 0)

    @property
    def groups(self) -> tuple[int, int]:
        """The number of expert groups, and how many of them a token may choose from."""
        gate: Any = self.gate
        holder = gate.select if isinstance(getattr(gate, "select", None), OpenGroups) else gate
        groups = getattr(holder, "num_groups", None)
        return (1, 1) if groups is None else (groups, holder.top_groups)

    @property
    def least(self) -> int:
        """The least number of experts with which the gate works."""
        k: Any = getattr(self.gate, "k", 1)
        return k + 1 if isinstance(self.gate, NoisyTopKGating) else k

    def check_number(self, number: int) -> None:
        """Raise ValueError if the layer cannot have so few experts, or has not so many."""
        groups, opened = self.groups
        of = f"prune cannot leave {number} of {self.e} experts to {self.name!r}"
        if not self.least <= number <= self.e:
            raise ValueError(f"{of}: keep from {self.least} (its k is {getattr(self.gate, 'k', 1)}) to {self.e}")
        if number % groups or (opened * (number // groups)) < self.least:
            raise ValueError(
                f"{of}: it has num_groups={groups} and top_groups={opened}, and keeps equally many of each group, of "
                f"which those open to a token hold at least {self.least}"
            )

    def best(self, scores: Tensor, number: int) -> list[int]:
        """The experts of the largest scores `(e,)`, equally many of each expert group; of equals the first."""
        groups, _ = self.groups
        free = scores[: self.e - self.always].view(groups, -1)
        order = free.argsort(dim=-1, descending=True, stable=True)[:, : (number - self.always) // groups]
        ids = (order + torch.arange(groups, device=order.device).unsqueeze(-1) * free.shape[-1]).flatten().tolist()
        return sorted([*ids, *range(self.e - self.always, self.e)])

    def check_ids(self, ids: list[int]) -> None:
        """Raise ValueError if not just these experts can stay."""
        self.check_number(len(ids))
        (groups, _), name = self.groups, self.name
        counts = [sum(i * groups // self.e == group for i in ids) for group in range(groups)]
        if len(set(counts)) > 1:
            raise ValueError(f"{name!r} keeps equally many experts of each of its {groups} groups, got {counts}: {ids}")
        if missing := {*range(self.e - self.always, self.e)} - {*ids}:
            raise ValueError(f"every token of {name!r} takes the experts {sorted(missing)}: they have to stay")

    def tensors(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Each tensor with an axis of experts: its module, its name there, and the axis."""
        for name, axis in GATE_AXES.items():
            path, _, leaf = name.rpartition(".")
            holder = getattr(self.gate, path, None) if path else self.gate
            tensor = getattr(holder, leaf, None) if isinstance(holder, nn.Module) else None
            if isinstance(tensor, Tensor) and not (leaf == "scale" and len(tensor) == 1):
                yield holder, leaf, axis  # pyright: ignore[reportReturnType]
        stack = innermost(self.moe.experts)
        for name in STACKS:
            if isinstance(getattr(stack, name, None), Tensor):
                yield stack, name, 0

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
        experts: Any = unwrapped(self.moe.experts)
        if isinstance(stack := innermost(experts), ExpertList):
            for i in sorted({*range(self.e)} - {*ids}, reverse=True):
                del stack[i]
        else:
            vars(stack)["expert_dims"] = (len(ids),)  # sizes, which a module otherwise sets once
        while isinstance(experts, AROUND):
            experts.num_experts, experts = len(ids), unwrapped(experts.experts)
        for module in (self.moe, self.gate, *(() if isinstance(stack, ExpertList) else (stack,))):
            vars(module)["num_experts"] = len(ids)
        if "num_experts" in vars(logits := getattr(self.gate, "logits", None) or nn.Module()):
            vars(logits)["num_experts"] = len(ids)
