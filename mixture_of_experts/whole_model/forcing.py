"""Forces routing for benchmarks: every gate in a model chooses experts without regard to their scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from mixture_of_experts.gating import TokenChoiceGate, get_side_inputs
from mixture_of_experts.gating.overrides import FORCED, Forced, forced_experts
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.whole_model.external_routers import read_router_output, replace_result
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle, check_supported, find_routers


@contextmanager
def force_routing(model: nn.Module, how: Forced = "balanced", *, gates: GateSelection | None = None) -> Iterator[None]:
    """Context manager that makes every gate in `model` send tokens to forced experts.

    The time and memory use of a layer then depend only on shapes. Every real token chooses k different experts. With
    `ReLUGating`, only choices with positive logits count. Each gate still computes the forced experts' weights from
    their scores, and gradients flow through these weights. A router from another library assigns the weights of its own
    choices to the forced experts, and also routes padding.

    Args:
        model: a model whose gates accept `given_experts`. To force a single gate, set its `forced` attribute instead.
        how: "balanced" cycles through the experts, so that the number of real tokens differs by at most one between
            experts. The cycle starts with expert 0 in every call, so every decoding step uses the same experts.
            "random" draws k different experts for each token from torch's random generator, like a router that is
            balanced on average.
        gates: the gates to force, specified as gate names, gate modules, or layers that contain gates. Default: all.

    Raises:
        ValueError: `how` is neither "balanced" nor "random", or the model has no gate.
        TypeError: a gate does not accept `given_experts`, or a router from another library does not return its experts.
            This error is also raised during a forward pass if such a router does not return what its provider
            describes.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating, force_routing
        >>> moe = MoE(dim=8, gate=TopKGating(8, num_experts=4))
        >>> with force_routing(moe, "balanced"):
        ...     routing = moe.gate(torch.randn(1, 4, 8))
        >>> routing.expert.tolist()
        [[0, 1, 2, 3, 0, 1, 2, 3]]
    """
    check_choice("how", how, tuple(FORCED))
    routers = check_supported(find_routers(model, "force_routing", gates), "force_routing", forcing_unsupported_reason)
    with Attachments() as attached:
        for router in routers:
            if router.is_external:
                attached.add_forward_hook(router.hook_target, partial(replace_router_choices, router, how))
            else:
                attached.set_attribute(router.gate, "forced", how)
        yield


def forcing_unsupported_reason(router: RouterHandle) -> str | None:
    """Return the reason why a router cannot be forced, or None if it can."""
    if (external := router.external) is not None:
        returns = "experts" in external.returns
        return None if returns else f"it does not return the experts of tokens; {external.remedy}"
    if not isinstance(router.gate, TokenChoiceGate):
        return "its tokens make no choices"
    if "given_experts" not in get_side_inputs(router.gate):
        return (
            "it does not read given_experts, which forces experts; add it to `side_inputs`, and let "
            "`decide` choose "
            'tokens.side["given_experts"]'
        )
    return None


def replace_router_choices(router: RouterHandle, how: Forced, gate: nn.Module, args: object, output: Any) -> Any:
    """Forward hook that replaces the experts `(t, k)` returned by a router from another library."""
    logits, _, expert = read_router_output(router, output)
    forced = forced_experts(how, (1, *expert.shape), logits.shape[-1], expert.device).view(expert.shape)
    return replace_result(router, output, "experts", forced.to(expert.dtype))
