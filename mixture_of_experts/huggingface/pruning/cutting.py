"""Cuts a layer down to some of its experts, in place: its gate, its experts, and what both know of their number.

Axes: e experts, d model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mixture_of_experts.around import with_inner
from mixture_of_experts.experts import ExpertList, Experts, GatedExperts
from mixture_of_experts.gating import NoisyTopKGating, RouterLogits
from mixture_of_experts.gating.steps import STEPS, LearnedScale, NormalizeBy
from mixture_of_experts.huggingface.feed_forward import tensors_of
from mixture_of_experts.moe import MoE
from mixture_of_experts.support.overriding import is_unchanged
from mixture_of_experts.support.private_peft import from_peft
from mixture_of_experts.support.private_torch import is_wrapper_subclass, unwrapped, wrapped_class
from mixture_of_experts.whole_model.sites import Site

#: the axis of the experts in the tensors of a gate, and those of its tensors that have none
GATE_AXES: dict[str, int] = {"expert_histogram": -2}
GATE_AXES |= dict.fromkeys(("w_gating", "w_noise", "b_gating", "expert_bias", "expert_counts"), -1)
GATE_AXES |= dict.fromkeys(("logits.weight", "logits.bias", "weigh.scale"), -1)
NO_AXIS = ("logits.norm_weight", "l1_coef", "choice_counts")
STACK_AXES: dict[str, int] = dict.fromkeys(("w1", "w2", "w3", "b1", "b2", "b3"), 0)
#: modules and functions of this package in a gate that know no number of experts, or are cut
KNOWN = (RouterLogits, LearnedScale, NormalizeBy)


def layer_of(site: Site) -> Any:
    """The layer in which a gate stands."""
    return unwrapped(site.locations[0].layer)  # type: ignore[arg-type]


def stack_of(site: Site) -> Any:
    """The experts of a gate, without what is around them."""
    return with_inner(layer_of(site).experts)[-1]


def why_not_cut(site: Site) -> str | None:
    """Why the experts of a site cannot be fewer, whichever stay; None if they can."""
    if site.external:
        return "it is no gate of this package: make its block a layer by from_transformers"
    layers = {location.layer for location in site.locations}
    if len(layers) > 1:
        return f"it routes for several layers ({', '.join(site.names)})"
    if None in layers:
        return "it stands in no layer"
    layer = layer_of(site)
    if site.outer or not isinstance(layer, MoE):
        return f"it is a level of a {wrapped_class(layer).__name__}"
    if any(map(from_peft, layer.modules())):
        return "its layer has adapters of PEFT: merge them first"
    if any(map(is_wrapper_subclass, (*tensors_of(site.gate).values(), *tensors_of(layer.experts).values()))):
        return "its weights are sharded or quantised: prune before that"
    return why_not_gate(site.gate) or why_not_experts(layer.experts)


def why_not_gate(gate: Any) -> str | None:
    unknown = [] if is_unchanged(gate) else ["its class"]
    for name in ("logits", "normalize", *STEPS):
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


def check_number(site: Site, number: int) -> None:
    """Raise ValueError if the layer of a gate cannot have so few experts, or has not so many."""
    gate: Any = site.gate
    k, groups = getattr(gate, "k", 1), getattr(gate, "num_groups", None) or 1
    least = k + isinstance(gate, NoisyTopKGating)  # experts with which the gate works
    of = f"prune cannot leave {number} of {site.num_experts} experts to {site.name!r}"
    if not least <= number <= site.num_experts:
        raise ValueError(f"{of}: keep from {least}, because of its k, to {site.num_experts}")
    least = 2 if getattr(gate, "group_score", None) == "two_best" else 1  # of a group
    if number % groups or (groups > 1 and (gate.top_groups * number // groups < k or number // groups < least)):
        raise ValueError(
            f"{of}: its num_groups={groups} keep equally many, two at least if their two best score them, and "
            f"top_groups={gate.top_groups} of them, which are open to a token, hold at least {k}"
        )


def tensors_to_cut(site: Site) -> Iterator[tuple[nn.Module, str, int]]:
    """Each tensor with an axis of experts: its module, its name there, and the axis."""
    for module, axes in ((site.gate, GATE_AXES), (stack_of(site), STACK_AXES)):
        for name, tensor in tensors_of(module).items():
            if name in axes and tensor.shape[axes[name]] == site.num_experts:
                path, _, leaf = name.rpartition(".")
                yield module.get_submodule(path), leaf, axes[name]


@torch.inference_mode(False)  # what is made in that mode cannot be trained
@torch.no_grad()
def cut(site: Site, ids: list[int]) -> None:
    """Keep these experts alone, in place."""
    for module, name, axis in list(tensors_to_cut(site)):
        old = getattr(module, name)
        new = old.detach().index_select(axis, torch.tensor(ids, device=old.device))
        if isinstance(old, nn.Parameter):
            module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            module._buffers[name] = new
    layer, stack = layer_of(site), stack_of(site)
    parts = [layer, *site.gate.modules(), *with_inner(layer.experts)]
    if isinstance(stack, ExpertList):
        for i in sorted({*range(site.num_experts)} - {*ids}, reverse=True):
            del stack[i]
        parts.append(vars(stack).get("empty", stack))  # of `UnstackedExperts`
    for part in parts:
        for name, size in (("num_experts", len(ids)), ("expert_dims", (len(ids),))):
            if name in vars(part):  # a size, which a module otherwise sets once
                vars(part)[name] = size
