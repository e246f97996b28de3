"""A text whose tokens have the colours of their experts, as pictures and the report show it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mixture_of_experts.dispatch.decision import Decision, compose, decision_of, plan_slots_of
from mixture_of_experts.dispatch.routing import Routing

#: the colours of Okabe and Ito, which colour-blind readers can tell apart
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#4d4d4d")
DARK = ("#0072B2", "#4d4d4d")  # those of them on which letters are white
LINE_END = "↵"
OTHERS, NOBODY = "#cfcfcf", "#ffffff"  # experts beyond the palette; no expert


class Choice(NamedTuple):
    """A choice of a token; in expert choice, an expert that chose it."""

    kept: bool
    weight: float
    expert: int  # outer-major for two levels


class ShownToken(NamedTuple):
    """A token of a text, or an entry of the text's legend.

    Attributes:
        text: what is shown, in signs that can be printed.
        colour: that of the expert that computes the token with the largest weight; None for padding.
        mark: "underline" if its first choice was full and another expert computes it, "line-through" if none does.
        told: its choices in words; the computed ones first, by weight.
    """

    text: str
    colour: str | None
    mark: str = ""
    told: str = ""

    @property
    def ends_line(self) -> bool:
        return self.text.endswith(LINE_END)

    @property
    def ink(self) -> str:
        """The colour of its letters."""
        return "#767676" if self.mark == "line-through" else NOBODY if self.colour in DARK else "#1a1a1a"


def shown_text(
    tokens: str | bytes | Sequence[str], name: str, routing: Routing, outer: Routing | None = None
) -> tuple[list[ShownToken], list[ShownToken]]:
    """The tokens of a text, and its legend.

    Args:
        tokens: the texts of the tokens. In a string every character is a token, in bytes every byte.
        name: what errors call the routing.
        routing: that of one gate on one sequence, in any number of groups.
        outer: if it is of level two, the routing of level one.
    """
    texts = [chr(each) if isinstance(each, int) else each for each in tokens]
    level_one = routing if outer is None else outer
    if level_one.expert.ndim != 2:
        raise ValueError(
            f"{name} has a router for each outer expert, choices of shape {tuple(level_one.expert.shape)}: take a gate "
            "without outer experts"
        )
    decision = decision_of(routing) if outer is None else compose(outer, plan_slots_of(outer), routing)
    if len(texts) != decision.num_tokens:
        raise ValueError(
            f"there are {len(texts)} tokens, but {name} has {decision.num_tokens}: give the model one sequence, the "
            "text's tokens alone"
        )
    real = [True] * len(texts) if level_one.real is None else level_one.real.flatten().tolist()
    choices, first_kept = choices_of(decision, real)
    counts = Counter(of_token[0].expert for of_token in choices if of_token and of_token[0].kept)
    busiest = sorted(range(math.prod(decision.num_experts)), key=lambda expert: -counts[expert])[: len(PALETTE)]
    colours = dict(zip(sorted(busiest), PALETTE, strict=False))

    def name_of(expert: int) -> str:
        return f"expert {expert}" if outer is None else "expert {}.{}".format(*divmod(expert, routing.num_experts))

    shown = []
    for number, (text, of_token) in enumerate(zip(texts, choices, strict=True)):
        colour, mark = (NOBODY, "line-through") if real[number] else (None, "")
        if of_token and of_token[0].kept:
            colour, mark = colours.get(of_token[0].expert, OTHERS), "" if first_kept[number] else "underline"
        lines = [f"{name_of(expert)}  {f'{weight:.3f}' if kept else 'no room'}" for kept, weight, expert in of_token]
        told = "\n".join([f"token {number}: {visible(text)}", *lines])
        shown.append(ShownToken(visible(text), colour, mark, told))
    others = counts.total() - sum(counts[expert] for expert in colours)
    keys = [(name_of(expert), colour, "", counts[expert]) for expert, colour in colours.items()]
    keys += [("other experts", OTHERS, "", others)]
    for mark, name in (("underline", "first choice full"), ("line-through", "no expert")):
        keys.append((name, NOBODY, mark, sum(token.mark == mark for token in shown)))
    legend = [
        ShownToken(f" {name}: {count / sum(real):.0%} ", colour, mark) for name, colour, mark, count in keys if count
    ]
    return shown, legend


def choices_of(decision: Decision, real: Sequence[bool]) -> tuple[list[list[Choice]], Sequence[bool]]:
    """The choices of each real token, the kept ones first, by weight; and whether its first choice is kept."""
    first_kept, token = real, decision.token  # in expert choice there is no first choice
    if token is None:
        first_kept = decision.kept.view(len(real), -1)[:, 0].tolist()
        token = torch.arange(len(real)).repeat_interleave(decision.k or 1)
    choices: list[list[Choice]] = [[] for _ in real]
    fields = (token, decision.chosen, decision.kept, decision.weight.detach(), decision.expert)
    for number, chosen, *choice in zip(*(field.tolist() for field in fields), strict=True):
        if chosen and real[number]:
            choices[number].append(Choice(*choice))
    return [sorted(of_token, reverse=True) for of_token in choices], first_kept


def visible(text: str) -> str:
    """A text with signs for line ends and tabs, and dots for what cannot be printed."""
    text = text.replace("\n", LINE_END).replace("\t", "→")
    return "".join(sign if sign.isprintable() and not 127 <= ord(sign) < 161 else "·" for sign in text) or "·"
