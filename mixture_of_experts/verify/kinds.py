"""Describes failures that are expected for a kind of layer because they follow from its definition."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mixture_of_experts.gating import ExpertChoiceGating, SparseMixerGating, Top2Gating
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.whole_model.router_discovery import RouterHandle, find_all_routers

CROSS_SEQUENCE_PROPERTIES = ("padding", "nan_padding", "order", "batch", "causal", "decoding", "loss_mean")


def expected_failures(module: nn.Module) -> dict[str, str]:
    """Return the reasons why properties may fail even though there is no bug, keyed by property name."""
    found: dict[str, str] = {}
    for layer in module.modules():
        if isinstance(layer, MoE | HeirarchicalMoE) and layer.group_size is not None:
            found |= dict.fromkeys(CROSS_SEQUENCE_PROPERTIES, "group_size forms groups across the whole batch")
    for router in find_all_routers(module):
        for names, reason in iter_reasons(router):
            found |= dict.fromkeys(names, reason)
    return found


def iter_reasons(router: RouterHandle) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the names of properties that a router may lack, paired with the reason."""
    gate = router.gate
    if router.external is not None:
        yield ("router_bfloat16", "router_autocast"), "the router computes in the dtype of its weights"
    factors = [getattr(gate, f"capacity_factor_{mode}", None) for mode in ("train", "eval")]
    if any(factor is not None for factor in factors) or (
        router.external is not None and router.external.capacity is not None
    ):
        yield ("causal", "decoding"), "capacity drops choices depending on the other tokens of a group"
    if isinstance(gate, ExpertChoiceGating):
        yield ("causal", "decoding"), "in expert choice, all tokens of a group compete, including later ones"
    if isinstance(gate, Top2Gating) and gate.second_policy_train != gate.second_policy_eval:
        yield ("output_eval",), "Top2Gating has a different second_policy in eval"
    if isinstance(gate, SparseMixerGating):
        yield ("gradients",), "SparseMixer estimates the gradient of a random choice"
