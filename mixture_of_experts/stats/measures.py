"""Reduces a `Routing` to a short row of numbers, on its device and without a host sync.

Axes: g routers of a gate (one, or one for each outer expert), b groups, n tokens of a group, e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_experts.dispatch.decision import plan_slots_of
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.balance_losses import load_of

# Sums for each router. Over tokens: their number, those that no expert computes ("unseen"), entropy and confidence.
# Over choices: "dropped", and "unavoidable", those beyond all slots of their group. Over groups: those that request any
# expert ("groups"), and their imbalance.
SUMS = ("tokens", "unseen", "dropped", "unavoidable", "entropy", "confidence", "groups", "imbalance")


def measure(routing: Routing, importance: Tensor | None = None) -> dict[str, Tensor]:
    """By name: "load" and "requested" of every expert, `g e` numbers; the `SUMS` and "worst_imbalance" of every router,
    `g` numbers."""
    *outer, b, n, e = routing.probs.shape
    load = load_of(routing.expert, routing.kept, e)
    seen = computed_tokens(routing)
    part = taking_part(routing, importance)
    probs = routing.probs.detach().float()
    # -p log p in the memory of the clamped p takes a third of the time of torch.special.entr
    entropy, top = -probs.clamp(min=1e-30).log_().mul_(probs).sum(dim=-1), probs.amax(dim=-1)
    if part is None:
        tokens = seen.new_full(tuple(outer), b * n, dtype=torch.int64)
        unseen = ~seen
    else:
        tokens = part.sum(dim=(-2, -1))
        unseen, entropy, top = part & ~seen, torch.where(part, entropy, 0.0), torch.where(part, top, 0.0)
    queued = routing.queued
    uneven = imbalance(queued)
    return {
        "load": load,
        "requested": queued.sum(dim=-2),
        "tokens": tokens,
        "unseen": unseen.sum(dim=(-2, -1)),
        "dropped": over_capacity(routing, queued).sum(dim=(-2, -1)),
        "unavoidable": over_capacity(routing, queued.sum(dim=-1, keepdim=True), e).sum(dim=(-2, -1)),
        "entropy": entropy.sum(dim=(-2, -1)),
        "confidence": top.sum(dim=(-2, -1)),
        "groups": (uneven > 0).sum(dim=-1),
        "imbalance": uneven.sum(dim=-1),
        "worst_imbalance": torch.nn.functional.pad(uneven, (1, 0)).amax(dim=-1),  # there may be no group
    }


def imbalance(queued: Tensor) -> Tensor:
    """`(..., b)` float32, requests of a group's most requested expert over the group's mean; 0 without requests.

    `queued` is `(..., b, e)`, the requests of each expert.
    """
    queued = queued.float()
    return queued.amax(dim=-1) * queued.shape[-1] / queued.sum(dim=-1).clamp(min=1)


def computed_tokens(routing: Routing) -> Tensor:
    """`(..., b, n)` bool, the tokens that an expert computes."""
    if routing.k is not None:
        return routing.kept.unflatten(-1, (routing.num_tokens, routing.k)).any(dim=-1)
    zeros = torch.zeros_like(routing.probs[..., 0], dtype=torch.int64)
    return zeros.scatter_add(-1, routing.token, routing.kept.to(torch.int64)) > 0


def taking_part(routing: Routing, importance: Tensor | None) -> Tensor | None:
    """`(..., b, n)` bool, the real tokens that make a choice; None if all do."""
    if importance is None:
        return routing.real
    return importance > 0 if routing.real is None else (importance > 0) & routing.real


def over_capacity(routing: Routing, queued: Tensor, experts: int = 1) -> Tensor:
    """`(..., b, q)`, the number of choices in each queue beyond the slots of so many experts.

    For one expert these are the drops; for the queue of all experts, the drops that no load avoids.
    """
    limit = routing.capacity if routing.limit is None else routing.limit.unsqueeze(-1)
    return torch.zeros_like(queued) if limit is None else (queued - experts * limit).clamp(min=0)


def lost_tokens(outer: Routing, inner: Routing) -> Tensor:
    """`(1,)` float32, the number of tokens that no expert of two levels computes."""
    assert outer.k is not None
    seen = computed_tokens(inner).flatten()
    seen = torch.cat([seen, seen.new_zeros(1)])  # for choices without a slot
    unseen = ~seen[plan_slots_of(outer).row].view(*outer.probs.shape[:-1], outer.k).any(dim=-1)
    if outer.real is not None:
        unseen = unseen & outer.real
    return unseen.sum().float().reshape(1)
