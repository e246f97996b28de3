"""Arguments of the layers' constructors: fills in defaults, and checks that gates, experts and layer agree."""

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
    """One module for all experts: the module itself, or an `ExpertList` of a plain list of modules."""
    if experts is None or (isinstance(experts, nn.Module) and has_forward(experts)):
        return experts
    if isinstance(experts, list | tuple | nn.ModuleList):
        return ExpertList(experts)
    raise TypeError(f"experts must be a module or a list of modules, got {type(experts).__name__}")


def has_forward(module: nn.Module) -> bool:
    """Whether the module can be called. A plain `nn.ModuleList` cannot."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def check_shared_expert(shared_expert: Any) -> nn.Module | None:
    """Check that the shared expert is a module that can be called, or None."""
    if shared_expert is None or (isinstance(shared_expert, nn.Module) and has_forward(shared_expert)):
        return shared_expert
    got = type(shared_expert).__name__ if isinstance(shared_expert, nn.Module) else repr(shared_expert)
    raise TypeError(
        f"shared_expert must be a module or None, got {got}: make an instance of a class, or put several modules into "
        "one nn.Sequential"
    )


def resolve_num_experts(num_experts: int | None, gate: nn.Module | None, experts: nn.Module | None) -> int:
    """`num_experts` if it is given, else the gate's number, else the experts', else 16."""
    if num_experts is None:
        num_experts = getattr(gate, "num_experts", None) or getattr(experts, "num_experts", None) or 16
    return check_size("num_experts", num_experts)


def resolve_expert_grid(
    num_experts: object, gate_outer: nn.Module | None, gate_inner: nn.Module | None, experts: nn.Module | None
) -> tuple[int, int]:
    """The pair (outer, inner): `num_experts` if it is given, else the gates', else the experts', else (4, 4)."""
    if num_experts is None:
        default = getattr(experts, "num_experts", None)
        default = default if isinstance(default, tuple) and len(default) == 2 else (4, 4)
        num_experts = tuple(
            getattr(gate, "num_experts", None) or size
            for gate, size in zip((gate_outer, gate_inner), default, strict=True)
        )
    if not isinstance(num_experts, tuple | list) or len(num_experts) != 2:
        raise ValueError(f"num_experts must be a pair (outer, inner) for two levels, got {num_experts!r}")
    return check_size("num_experts[0]", num_experts[0]), check_size("num_experts[1]", num_experts[1])


def reject_gate_arguments(name: str, settings: Mapping[str, Any]) -> None:
    """Raise an error for arguments that describe the default gate if a gate is passed."""
    reject_unused_arguments(name, {key: value for key, value in settings.items() if value != TOP2_SETTINGS[key]})


def reject_expert_arguments(hidden_dim: int | None, activation: Any) -> None:
    """Raise an error for arguments that describe the default experts if experts are passed."""
    given = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
    reject_unused_arguments("experts", given if activation is nn.GELU else {**given, "activation": activation})


def reject_unused_arguments(part: str, arguments: Mapping[str, Any]) -> None:
    """Raise an error for arguments that describe a part which is passed itself: they would have no effect."""
    if arguments:
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{part} is given, so {written} would do nothing: set it on the given {part} instead")


K_ALIASES = ("top_k", "topk", "num_experts_per_tok", "num_selects")  # in other libraries


def reject_router_arguments(layer: type, arguments: Mapping[str, Any]) -> None:
    """Raise an error for an argument that belongs to a router, not to a layer: the error says where to pass it."""
    parameters = inspect.signature(layer.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    of_router = {*inspect.signature(TopKGating.__init__).parameters, *K_ALIASES}
    for name, value in arguments.items():
        if name not in parameters and name in of_router:
            setting = "k" if name in K_ALIASES else name
            where = "gate=" if "gate" in parameters else "gate_outer= and gate_inner="
            raise TypeError(
                f"{layer.__name__} has no argument {name!r}, its router has it: give "
                f"{where}TopKGating(dim, num_experts, {setting}={value!r})"
            )


def check_same_priority(name: str, gate: nn.Module | None, priority: Priority) -> None:
    """Raise an error for a gate of one level whose priority differs from the layer's: both levels need the same.

    The priority of a dropless gate is not compared, because it has no effect.
    """
    own = getattr(gate, "priority", priority)
    drops = any(getattr(gate, f"capacity_factor_{mode}", None) is not None for mode in ("train", "eval"))
    if own != priority and priority != TOP2_SETTINGS["priority"] and drops:
        raise ValueError(
            f"priority={priority!r} is asked for, but {name} has priority={own!r} and a capacity: give that gate "
            f"priority={priority!r} too"
        )


def check_gate(
    name: str, gate: nn.Module, dim: int, num_experts: int, outer: tuple[int, ...] = (), is_level: bool = False
) -> None:
    """Check that a gate can be called and has the layer's sizes, and that the gate of a level uses token choice."""
    if not isinstance(gate, nn.Module):
        raise TypeError(f"{name} must be a gate such as TopKGating(...), got {type(gate).__name__}")
    given = ["mask", "importance"] if outer else ["mask"]
    if not accepts_keywords(gate, given):
        raise TypeError(
            f"{name} must be a gate such as TopKGating(...), called with (x, {', '.join(f'{n}=...' for n in given)}), "
            f"but {type(gate).__name__} has forward{inspect.signature(gate.forward)}"
        )
    if is_level and not hasattr(gate, "k"):
        raise ValueError(
            f"{name} must be a router of token choice, a subclass of TokenChoiceGate, got {type(gate).__name__}"
        )
    for what, wanted in (("dim", dim), ("num_experts", num_experts), ("outer_expert_dims", outer)):
        got = getattr(gate, what, wanted)
        if got != wanted:
            remedy = ask_providers(gate, lambda provider: provider.gate_remedy) or "give both the same"
            raise ValueError(f"{name} has {what}={got}, the layer {what}={wanted}: {remedy}")


def accepts_keywords(module: nn.Module, keywords: list[str]) -> bool:
    """Whether the module's signature allows a call with one tensor and these keywords."""
    try:
        inspect.signature(module.forward).bind(None, **dict.fromkeys(keywords))
    except TypeError:
        return False
    except ValueError:  # a forward without a signature may accept anything
        return True
    return True


def check_experts(experts: nn.Module, dim: int, num_experts: tuple[int, ...]) -> None:
    """Check that the experts have the layer's sizes, as far as they have attributes for them."""
    experts = unwrap_module(experts)  # an adapter of a bias may have num_experts=1
    got = getattr(experts, "num_experts", None)
    count = num_experts[0] if len(num_experts) == 1 else num_experts
    allowed = (None, count, num_experts)
    if isinstance(experts, ExpertList):
        allowed = (torch.Size(num_experts).numel(),)
    if got not in allowed:
        raise ValueError(f"experts has num_experts={got}, the layer num_experts={count}: give both the same")
    if isinstance(experts, StackedExperts) and experts.dim != dim:
        raise ValueError(f"experts has dim={experts.dim}, the layer dim={dim}: give both the same")


def check_packed_call(
    side: Mapping[str, Any], group_size: int | None, gates: Sequence[nn.Module], experts: nn.Module
) -> None:
    """Check that a layer supports packed rows, if the call has `segment_ids`: groups are then documents."""
    if side.get(SEGMENT_IDS) is None:
        return
    if (reason := packing_unsupported_reason(group_size, gates, experts)) is not None:
        raise ValueError(
            f"{SEGMENT_IDS} makes each document of a packed row a group, but {reason}; or pass each document as a row "
            "of its own, padded, with mask="
        )


def packing_unsupported_reason(group_size: int | None, gates: Sequence[nn.Module], experts: nn.Module) -> str | None:
    """Why a layer does not support packed rows, with the remedy; None if it does."""
    if group_size is not None:
        return f"group_size={group_size} makes other groups of the tokens: set it to None"
    if len(gates) > 1:
        return "a layer of two levels does not take them: use MoE"
    if SEGMENT_IDS not in get_side_inputs(gates[0]):
        return f"its gate, a {type(gates[0]).__name__}, does not read them: use a TokenChoiceGate such as TopKGating"
    if getattr(unwrap_module(gates[0]), "capacity_factor", None) is not None and reads_slots(experts):
        return (
            f"its experts, {type(experts).__name__}, read slots, of which documents with a limited capacity have none: "
            "set the gate's capacity factors to None, or derive the experts from RoutedExperts"
        )
    return None
