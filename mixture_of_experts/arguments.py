"""Resolves the constructor arguments of layers, and checks that gates and experts match the layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mixture_of_experts.dispatch.queues import Priority
from mixture_of_experts.dispatch.segments import SEGMENT_IDS
from mixture_of_experts.experts import ExpertList, StackedExperts
from mixture_of_experts.gating import get_side_inputs
from mixture_of_experts.gating.top2 import TOP2_SETTINGS
from mixture_of_experts.gating.topk import TopKGating
from mixture_of_experts.providers import ask_providers
from mixture_of_experts.support.checks import check_size
from mixture_of_experts.support.private_torch import unwrap_module
from mixture_of_experts.wrappers import reads_slots


def as_experts(experts: Any) -> nn.Module | None:
    """Convert experts to a single module. A list of modules is wrapped in an `ExpertList`."""
    if experts is None or (isinstance(experts, nn.Module) and has_forward(experts)):
        return experts
    if isinstance(experts, list | tuple | nn.ModuleList):
        return ExpertList(experts)
    raise TypeError(f"experts must be a module or a list of modules, got {type(experts).__name__}")


def has_forward(module: nn.Module) -> bool:
    """Return whether the module defines `forward`. A plain `nn.ModuleList` does not."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def check_shared_expert(shared_expert: Any) -> nn.Module | None:
    """Check that the shared expert is None or a callable module."""
    if shared_expert is None or (isinstance(shared_expert, nn.Module) and has_forward(shared_expert)):
        return shared_expert
    got = type(shared_expert).__name__ if isinstance(shared_expert, nn.Module) else repr(shared_expert)
    raise TypeError(
        f"shared_expert must be a module or None, got {got}. Instantiate the class first, or combine several "
        "modules in an nn.Sequential"
    )


def resolve_num_experts(num_experts: int | None, gate: nn.Module | None, experts: nn.Module | None) -> int:
    """Return `num_experts`. If it is None, infer it from the gate or the experts, and fall back to 16."""
    if num_experts is None:
        num_experts = getattr(gate, "num_experts", None) or getattr(experts, "num_experts", None) or 16
    return check_size("num_experts", num_experts)


def resolve_expert_grid(
    num_experts: object, gate_outer: nn.Module | None, gate_inner: nn.Module | None, experts: nn.Module | None
) -> tuple[int, int]:
    """Return `num_experts` as a pair (outer, inner). If it is None, infer it from the gates and experts, and fall back
    to (4, 4)."""
    if num_experts is None:
        default = getattr(experts, "num_experts", None)
        default = default if isinstance(default, tuple) and len(default) == 2 else (4, 4)
        num_experts = tuple(
            getattr(gate, "num_experts", None) or size
            for gate, size in zip((gate_outer, gate_inner), default, strict=True)
        )
    if not isinstance(num_experts, tuple | list) or len(num_experts) != 2:
        raise ValueError(f"num_experts must be a pair (outer, inner) for a two-level layer, got {num_experts!r}")
    return check_size("num_experts[0]", num_experts[0]), check_size("num_experts[1]", num_experts[1])


def reject_gate_arguments(name: str, settings: Mapping[str, Any]) -> None:
    """Raise an error if a gate is passed together with arguments that configure the default gate."""
    reject_unused_arguments(name, {key: value for key, value in settings.items() if value != TOP2_SETTINGS[key]})


def reject_expert_arguments(hidden_dim: int | None, activation: Any) -> None:
    """Raise an error if experts are passed together with arguments that configure the default experts."""
    given = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
    reject_unused_arguments("experts", given if activation is nn.GELU else {**given, "activation": activation})


def reject_unused_arguments(part: str, arguments: Mapping[str, Any]) -> None:
    """Raise an error if there are arguments that would be ignored because the caller also passed `part`."""
    if arguments:
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{written} cannot be combined with {part}; set it on {part} instead")


K_ALIASES = ("top_k", "topk", "num_experts_per_tok", "num_selects")  # names of `k` in other libraries


def reject_router_arguments(layer: type, arguments: Mapping[str, Any]) -> None:
    """Raise an error if an argument belongs to the router rather than the layer, and suggest where to pass it."""
    parameters = inspect.signature(layer.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    of_router = {*inspect.signature(TopKGating.__init__).parameters, *K_ALIASES}
    for name, value in arguments.items():
        if name not in parameters and name in of_router:
            setting = "k" if name in K_ALIASES else name
            where = "gate=" if "gate" in parameters else "gate_outer= and gate_inner="
            raise TypeError(
                f"{layer.__name__} does not accept {name!r}, a router argument; pass {where}TopKGating(dim, "
                f"num_experts, {setting}={value!r})"
            )


def check_same_priority(name: str, gate: nn.Module | None, priority: Priority) -> None:
    """Raise an error if a gate and the layer have different priorities. Both levels must use the same priority.

    The priority of a dropless gate has no effect and is not checked.
    """
    own = getattr(gate, "priority", priority)
    drops = any(getattr(gate, f"capacity_factor_{mode}", None) is not None for mode in ("train", "eval"))
    if own != priority and priority != TOP2_SETTINGS["priority"] and drops:
        raise ValueError(
            f"the layer requires priority={priority!r}, but {name} has priority={own!r} and a limited capacity; "
            f"construct {name} with priority={priority!r}"
        )


def check_gate(name: str, gate: nn.Module, dim: int, num_experts: int, outer: tuple[int, ...], is_level: bool) -> None:
    """Check that a gate is callable and matches the layer's dimensions. The gates of a two-level layer must use token
    choice."""
    if not isinstance(gate, nn.Module):
        raise TypeError(f"{name} must be a gate such as TopKGating(...), got {type(gate).__name__}")
    given = ["mask", "importance"] if outer else ["mask"]
    if not accepts_keywords(gate, given):
        raise TypeError(
            f"{name} must be a gate such as TopKGating(...) that accepts (x, {', '.join(f'{n}=...' for n in given)}), "
            f"but {type(gate).__name__}.forward has the signature {inspect.signature(gate.forward)}"
        )
    if is_level and not hasattr(gate, "k"):
        raise ValueError(
            f"{name} must be a token-choice router (a subclass of TokenChoiceGate), got {type(gate).__name__}"
        )
    for what, wanted in (("dim", dim), ("num_experts", num_experts), ("outer_expert_dims", outer)):
        got = getattr(gate, what, wanted)
        if got != wanted:
            remedy = ask_providers(gate, lambda provider: provider.gate_remedy) or "construct both with the same value"
            raise ValueError(f"{name} has {what}={got}, but the layer has {what}={wanted}; {remedy}")


def accepts_keywords(module: nn.Module, keywords: list[str]) -> bool:
    """Return whether the module can be called with one positional tensor and the given keyword arguments."""
    try:
        inspect.signature(module.forward).bind(None, **dict.fromkeys(keywords))
    except TypeError:
        return False
    except ValueError:  # the signature of `forward` cannot be inspected, so any argument may be accepted
        return True
    return True


def check_experts(experts: nn.Module, dim: int, num_experts: tuple[int, ...]) -> None:
    """Check that the experts' `num_experts` and `dim`, where defined, match those of the layer."""
    experts = unwrap_module(experts)  # a wrapper that adapts a bias may have num_experts=1
    got = getattr(experts, "num_experts", None)
    count = num_experts[0] if len(num_experts) == 1 else num_experts
    allowed = (None, count, num_experts)
    if isinstance(experts, ExpertList):
        allowed = (torch.Size(num_experts).numel(),)
    if got not in allowed:
        raise ValueError(
            f"experts have num_experts={got}, but the layer has num_experts={count}; construct both with the same value"
        )
    if isinstance(experts, StackedExperts) and experts.dim != dim:
        raise ValueError(
            f"experts have dim={experts.dim}, but the layer has dim={dim}; construct both with the same value"
        )


def check_packed_call(
    side: Mapping[str, Any], group_size: int | None, gates: Sequence[nn.Module], experts: nn.Module
) -> None:
    """Check that the layer supports packed rows if `segment_ids` are passed. Each document in a packed row forms its
    own group."""
    if side.get(SEGMENT_IDS) is None:
        return
    if (reason := packing_unsupported_reason(group_size, gates, experts)) is not None:
        raise ValueError(
            f"the layer does not support packed rows ({SEGMENT_IDS}): {reason}. Alternatively, pass each document as a "
            "separate padded row with mask="
        )


def packing_unsupported_reason(group_size: int | None, gates: Sequence[nn.Module], experts: nn.Module) -> str | None:
    """Return the reason why the layer does not support packed rows, including a remedy, or None if it supports them."""
    if group_size is not None:
        return f"group_size={group_size} does not make each document a group; set it to None"
    if len(gates) > 1:
        return "a layer with two levels does not support packing; use MoE"
    if SEGMENT_IDS not in get_side_inputs(gates[0]):
        return f"{type(gates[0]).__name__} does not support packing; use a TokenChoiceGate such as TopKGating"
    if getattr(unwrap_module(gates[0]), "capacity_factor", None) is not None and reads_slots(experts):
        return (
            f"{type(experts).__name__} reads slots, which are not supported for documents with a limited capacity; set "
            "the gate's capacity factors to None, or make the experts a subclass of RoutedExperts"
        )
    return None
