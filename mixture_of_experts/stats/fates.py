"""The fate of every token of a text: which experts compute it, and how a picture shows that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from mixture_of_experts.dispatch.decision import plan_slots_of
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats.colours import PALETTE


class Choice(NamedTuple):
    """One choice of a token; in expert choice, one expert that chose the token."""

    expert: int  # outer-major for two levels
    kept: bool
    weight: float
    name: str  # name of the expert, for readers


class Fate(NamedTuple):
    """The fate of a token."""

    kind: Literal["first", "other", "unseen", "padding"]  # computed by its first choice, by another one, by none
    expert: int  # the one of largest weight that computes the token; for an unseen token its first choice


def choices_of(routing: Routing, group: int) -> list[list[Choice]]:
    """The choices that every token of a group makes, from the routing of one gate."""
    choices: list[list[Choice]] = [[] for _ in range(routing.num_tokens)]
    fields = (routing.token, routing.expert, routing.chosen, routing.kept, routing.weight.detach())
    for token, expert, chosen, kept, weight in zip(*(field[group].tolist() for field in fields), strict=True):
        if chosen:
            choices[token].append(Choice(expert, kept, weight, str(expert)))
    return choices


def composed_choices(outer: Routing, inner: Routing) -> list[list[Choice]]:
    """The choices of every token of a call on two levels: the choices of level two in each slot of level one."""
    assert outer.k is not None
    assert inner.k is not None
    slot = plan_slots_of(outer).row.view(-1, outer.k).tolist()  # (t, k1); number of slots for a choice without one
    experts, weights = outer.expert.view(-1, outer.k).tolist(), outer.weight.detach().view(-1, outer.k).tolist()
    made = outer.chosen.view(-1, outer.k).tolist()
    fields = (inner.expert, inner.chosen, inner.kept, inner.weight.detach())
    behind = list(zip(*(field.reshape(-1, inner.k).tolist() for field in fields), strict=True))
    choices: list[list[Choice]] = []
    for firsts in zip(slot, experts, made, weights, strict=True):
        of_token: list[Choice] = []
        for row, o, chosen, weight in zip(*firsts, strict=True):
            if row < len(behind):
                for i, inner_chosen, kept, share in zip(*behind[row], strict=True):
                    if inner_chosen:
                        of_token.append(Choice(o * inner.num_experts + i, kept, weight * share, f"{o}.{i}"))
            elif chosen:
                of_token.append(Choice(o * inner.num_experts, False, 0.0, f"{o}.?"))
        choices.append(of_token)
    return choices


def fates_of(routing: Routing, group: int | None) -> list[Fate]:
    """The fate of every token of a group, from the routing of one gate; None is the only group."""
    if routing.expert.ndim != 2:
        raise ValueError(
            f"plot_routing draws one level of routing, (groups, assignments), got {tuple(routing.expert.shape)}: "
            "give it the routing of a gate without outer experts"
        )
    groups, n = routing.expert.shape[0], routing.num_tokens
    if group is None and groups == 1:
        group = 0
    if group is None or not 0 <= group < groups:
        raise ValueError(
            f"the routing has {groups} groups of {n} tokens, and group={group} is none of them: give the group of "
            f"these tokens, group=0 to {groups - 1}"
        )
    real = torch.ones(n, dtype=torch.bool) if routing.real is None else routing.real[group]
    best = routing.probs[group].argmax(dim=-1).tolist()
    chooses = routing.k is not None  # in expert choice there is no first choice
    choices = choices_of(routing, group)
    return [fate_of(choices[t], best[t], is_real, chooses) for t, is_real in enumerate(real.tolist())]


def fate_of(choices: Sequence[Choice], best: int, real: bool, chooses: bool) -> Fate:
    """The fate of a token with these choices, best choice first."""
    if not real:
        return Fate("padding", best)
    computed = [choice for choice in choices if choice.kept]
    if not computed:
        return Fate("unseen", choices[0].expert if chooses and choices else best)
    expert = max(computed, key=lambda choice: choice.weight).expert
    return Fate("first" if choices[0].kept or not chooses else "other", expert)


def visible(text: str) -> str:
    """A text with signs for line ends and tabs, and dots for what cannot be printed."""
    text = text.replace("\n", "↵").replace("\t", "→")
    return "".join(sign if sign.isprintable() and not 127 <= ord(sign) < 161 else "·" for sign in text) or "·"


def texts_of(tokens: str | bytes | Sequence[str]) -> list[str]:
    """The texts of tokens: the characters of a string, the bytes of bytes, or the texts that are given."""
    return [chr(byte) for byte in tokens] if isinstance(tokens, bytes) else list(tokens)


def expert_colours(fates: Sequence[Fate], num_experts: int) -> dict[int, str]:
    """A colour for each expert; if there are more experts than colours, for those with the most tokens."""
    computed = [fate.expert for fate in fates if fate.kind in ("first", "other")]
    busiest = sorted(range(num_experts), key=computed.count, reverse=True)[: len(PALETTE)]
    return dict(zip(sorted(busiest), PALETTE, strict=False))


def share(name: str, count: int, tokens: Sequence[Fate]) -> str:
    """A legend's entry: the name, and the count's share of the tokens."""
    return f"{name}: {count / max(len(tokens), 1):.0%}"
