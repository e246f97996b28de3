"""Reduces a layer to a subset of its experts in place. The tensors of the gate and the experts are sliced, and the
number of experts stored in each module is updated.

Axes: e (experts), d (model dimension).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mixture_of_experts.experts import ExpertList, Experts, GatedExperts
from mixture_of_experts.gating import NoisyTopKGating, RouterLogits
from mixture_of_experts.gating.steps import STEPS, LearnedScale, NormalizeBy
from mixture_of_experts.huggingface.feed_forward import get_named_tensors
from mixture_of_experts.huggingface.private_peft import is_peft_wrapper
from mixture_of_experts.moe import MoE
from mixture_of_experts.support.private_torch import get_original_class, is_wrapper_subclass, unwrap_module
from mixture_of_experts.support.subclassing import is_unchanged
from mixture_of_experts.whole_model.router_discovery import RouterHandle
from mixture_of_experts.wrappers import list_nested_experts

#: expert axis of each gate tensor
GATE_EXPERT_AXES: dict[str, int] = {"expert_histogram": -2}
GATE_EXPERT_AXES |= dict.fromkeys(("w_gating", "w_noise", "b_gating", "expert_bias", "expert_counts"), -1)
GATE_EXPERT_AXES |= dict.fromkeys(("logits.weight", "logits.bias", "weigh.scale"), -1)
#: gate tensors without an expert axis
GATE_TENSORS_WITHOUT_EXPERTS = ("logits.norm_weight", "l1_coef", "choice_counts")
STACK_EXPERT_AXES: dict[str, int] = dict.fromkeys(("w1", "w2", "w3", "b1", "b2", "b3"), 0)
#: gate components that do not depend on the number of experts or can be sliced
SUPPORTED_GATE_PARTS = (RouterLogits, LearnedScale, NormalizeBy)


def get_layer(router: RouterHandle) -> Any:
    """Return the layer that contains a router's gate."""
    return unwrap_module(router.locations[0].layer)  # type: ignore[arg-type]


def get_expert_stack(router: RouterHandle) -> Any:
    """Return a router's experts without the modules that wrap them."""
    return list_nested_experts(get_layer(router).experts)[-1]


def pruning_unsupported_reason(router: RouterHandle) -> str | None:
    """Return the reason why a router's experts cannot be pruned, or None if pruning is supported."""
    if router.is_external:
        return "it is not a gate of this package; convert its block to a layer with from_transformers"
    layers = {location.layer for location in router.locations}
    if len(layers) > 1:
        return f"it routes for several layers ({', '.join(router.names)})"
    if None in layers:
        return "it is not part of a layer"
    layer = get_layer(router)
    if router.outer_expert_dims or not isinstance(layer, MoE):
        return f"it is a level of a {get_original_class(layer).__name__}"
    if any(map(is_peft_wrapper, layer.modules())):
        return "its layer has PEFT adapters; merge them first"
    if any(
        map(is_wrapper_subclass, (*get_named_tensors(router.gate).values(), *get_named_tensors(layer.experts).values()))
    ):
        return "its weights are sharded or quantized; prune before that"
    return gate_pruning_unsupported_reason(router.gate) or experts_pruning_unsupported_reason(layer.experts)


def gate_pruning_unsupported_reason(gate: Any) -> str | None:
    unknown = [] if is_unchanged(gate) else ["its class"]
    for name in ("logits", "normalize", *STEPS):
        step = getattr(gate, name, None)
        if callable(step) and not isinstance(step, SUPPORTED_GATE_PARTS) and step is not functional.relu:
            unknown.append(f"{name}={getattr(step, '__qualname__', type(step).__name__)}")
    if getattr(getattr(gate, "bias_rule", None), "shares", None) is not None:
        unknown.append("bias_rule.shares")
    unknown += sorted(get_named_tensors(gate).keys() - GATE_EXPERT_AXES.keys() - {*GATE_TENSORS_WITHOUT_EXPERTS})
    return f"pruning does not know which parts of {', '.join(unknown)} belong to which expert" if unknown else None


def experts_pruning_unsupported_reason(experts: nn.Module) -> str | None:
    *wrappers, stack = list_nested_experts(experts)
    wrappers = [each for each in wrappers if each.works_on == "experts"]
    if wrappers or not (isinstance(stack, ExpertList) or get_original_class(stack) in (Experts, GatedExperts)):
        return f"its experts are {get_original_class([*wrappers, stack][0]).__name__}"
    unknown = sorted(
        name for name in get_named_tensors(stack) if name not in STACK_EXPERT_AXES and not name.startswith("act.")
    )
    if unknown and not isinstance(stack, ExpertList):
        return f"its experts also hold {', '.join(unknown)}; merge adapters and remove parametrizations first"
    return None


def check_num_kept(router: RouterHandle, number: int) -> None:
    """Raise ValueError if a router cannot keep `number` experts, because it has fewer or requires more."""
    gate: Any = router.gate
    k, groups = getattr(gate, "k", 1), getattr(gate, "num_groups", None) or 1
    minimum = k + isinstance(gate, NoisyTopKGating)  # minimum number of experts that the gate supports
    prefix = f"prune cannot keep {number} of {router.num_experts} experts of {router.name!r}"
    if not minimum <= number <= router.num_experts:
        raise ValueError(f"{prefix}; keep at least {minimum} (required by its router) and at most {router.num_experts}")
    minimum = 2 if getattr(gate, "group_score", None) == "two_best" else 1  # minimum number of experts per group
    if number % groups or (groups > 1 and (gate.top_groups * number // groups < k or number // groups < minimum)):
        raise ValueError(
            f"{prefix}; each of the num_groups={groups} groups must keep the same number of experts (at least two if "
            f"group_score is 'two_best'), and top_groups={gate.top_groups} groups must contain at least k={k} experts"
        )


def iter_expert_tensors(router: RouterHandle) -> Iterator[tuple[nn.Module, str, int]]:
    """Iterate over the tensors that have an expert axis. The items are tuples (module, name in the module, expert
    axis)."""
    for module, axes in ((router.gate, GATE_EXPERT_AXES), (get_expert_stack(router), STACK_EXPERT_AXES)):
        for name, tensor in get_named_tensors(module).items():
            if name in axes and tensor.shape[axes[name]] == router.num_experts:
                path, _, leaf = name.rpartition(".")
                yield module.get_submodule(path), leaf, axes[name]


@torch.inference_mode(False)  # tensors created in inference mode cannot be trained
@torch.no_grad()
def slice_experts(router: RouterHandle, ids: list[int]) -> None:
    """Remove all experts except `ids` from a router's layer, in place."""
    for module, name, axis in list(iter_expert_tensors(router)):
        old = getattr(module, name)
        new = old.detach().index_select(axis, torch.tensor(ids, device=old.device))
        if isinstance(old, nn.Parameter):
            module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            module._buffers[name] = new
    layer, stack = get_layer(router), get_expert_stack(router)
    parts = [layer, *router.gate.modules(), *list_nested_experts(layer.experts)]
    if isinstance(stack, ExpertList):
        for i in sorted({*range(router.num_experts)} - {*ids}, reverse=True):
            del stack[i]
        parts.append(vars(stack).get("template", stack))  # `UnstackedExperts` keeps these settings there
    for part in parts:
        for name, size in (("num_experts", len(ids)), ("expert_dims", (len(ids),))):
            if name in vars(part):  # bypasses the check that a size is set only once
                vars(part)[name] = size
