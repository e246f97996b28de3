"""Draws a text whose tokens have the colours of their experts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mixture_of_experts.dispatch.decision import decision_of
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats.drawing import figure_of, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: the colours of Okabe and Ito, which colour-blind readers can tell apart
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#4d4d4d")
DARK = ("#0072B2", "#4d4d4d")  # those of them on which letters are white
OTHERS, NOBODY = "#cfcfcf", "#ffffff"  # experts beyond the palette; no expert
STRIKE = "#b00020"
LINE_END = "↵"
CHARACTER, LINE = 0.1, 0.25  # inches of a character and of a line of text


class ShownToken(NamedTuple):
    """A token of a text, or an entry of the text's legend.

    Attributes:
        text: what is shown, in signs that can be printed.
        colour: that of the expert that computes the token with the largest weight.
        mark: "underline" if its first choice was full and another expert computes it, "line-through" if none does.
    """

    text: str
    colour: str
    mark: str


def plot_routing(
    tokens: str | bytes | Sequence[str], routing: Routing, *, width: int = 80, ax: Axes | None = None
) -> Figure:
    """Draw a text in which every token has the colour of its expert.

    The expert of a token is the one of largest weight among those that compute it. A token is underlined if its first
    choice was full and another expert computes it. A token that no expert computes is struck through on white. If there
    are more experts than colours, those with the fewest tokens share grey.

    Args:
        tokens: the texts of the tokens. In a string every character is a token, in bytes every byte.
        routing: the routing of one gate on one sequence, `routing = gate(x)`.
        width: characters of a line.
        ax: axes to draw in; by default those of a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: tokens and routing do not fit.

    Example:
        >>> import torch
        >>> from mixture_of_experts import Top2Gating
        >>> from mixture_of_experts.stats import plot_routing
        >>> gate = Top2Gating(dim=8, num_gates=4)
        >>> routing = gate(torch.randn(1, 5, 8))
        >>> plot_routing("hello", routing).savefig("hello.png")  # doctest: +SKIP
    """
    shown, legend = shown_text(tokens, routing)
    placed, x, y = [], 0, 0
    for token in (*shown, *legend):
        if x and (x + len(token.text) > width or token is legend[0]):
            x, y = 0, y + 1
        placed.append((token, x, y))
        x, y = (0, y + 1) if token.text.endswith(LINE_END) else (x + len(token.text), y)
    ax = new_axes(width * CHARACTER, (y + 1) * LINE) if ax is None else ax
    size = min(72 * ax.get_window_extent().width / figure_of(ax).dpi / width / 0.62, 12)  # of a monospaced font
    for token, left, top in placed:
        draw_token(ax, token, left, top, size)
    ax.set(xlim=(0, width), ylim=(y + 1, 0))
    ax.axis("off")
    return figure_of(ax)


def draw_token(ax: Axes, token: ShownToken, left: int, top: int, size: float) -> None:
    from matplotlib.patches import Rectangle

    (text, colour, mark), right = token, left + len(token.text)
    ink = "#767676" if mark == "line-through" else NOBODY if colour in DARK else "#1a1a1a"
    style: dict[str, Any] = {"family": "monospace", "ha": "center", "va": "center_baseline", "parse_math": False}
    ax.add_patch(Rectangle((left, top), len(text), 0.94, facecolor=colour, edgecolor="white", linewidth=0.5))
    for x, sign in enumerate(text, left):
        ax.text(x + 0.5, top + 0.5, sign, size=size, color=ink, **style)
    if mark:
        height, line = (0.86, ink) if mark == "underline" else (0.5, STRIKE)
        ax.hlines(top + height, left + 0.1, right - 0.1, color=line, linewidth=1.2)


def shown_text(
    tokens: str | bytes | Sequence[str], routing: Routing
) -> tuple[Sequence[ShownToken], Sequence[ShownToken]]:
    """The tokens of a text, and its legend; arguments as in `plot_routing`, the sequence in any number of groups."""
    texts = [visible(chr(each) if isinstance(each, int) else each) for each in tokens]
    decision = decision_of(routing)
    t, k = decision.num_tokens, decision.k
    if len(texts) != t:
        raise ValueError(
            f"there are {len(texts)} tokens, but the routing has {t}: give the model one sequence, the text's tokens "
            "alone, and take a gate without outer experts"
        )
    token = torch.arange(t).repeat_interleave(k or 1) if decision.token is None else decision.token
    best: dict[int, tuple[float, int]] = {}  # of each token that is computed, the largest weight and its expert
    fields = (token, decision.kept, decision.weight.detach(), decision.expert)
    for number, kept, weight, expert in zip(*(field.tolist() for field in fields), strict=True):
        if kept:
            best[number] = max(best.get(number, (-math.inf, 0)), (weight, expert))
    first_kept = decision.kept.view(t, k)[:, 0].tolist() if k else [True] * t  # expert choice has no first one
    load = Counter(expert for _, expert in best.values())
    busiest = sorted(range(routing.num_experts), key=lambda expert: -load[expert])[: len(PALETTE)]
    colours = dict(zip(sorted(busiest), PALETTE, strict=False))
    shown = []
    for number, text in enumerate(texts):
        colour, mark = NOBODY, "line-through"
        if number in best:
            colour, mark = colours.get(best[number][1], OTHERS), "" if first_kept[number] else "underline"
        shown.append(ShownToken(text, colour, mark))
    return shown, legend_of(shown, colours)


def legend_of(shown: Sequence[ShownToken], colours: Mapping[int, str]) -> list[ShownToken]:
    """What colours, by experts, and marks mean, and how many tokens have them."""
    keys = [(f"expert {expert}", colour, "") for expert, colour in colours.items()]
    keys.append(("other experts", OTHERS, ""))
    keys += [("first choice full", NOBODY, "underline"), ("no expert", NOBODY, "line-through")]
    found = Counter([*(token.colour for token in shown), *(token.mark for token in shown)])
    numbers = ((name, colour, mark, found[mark or colour]) for name, colour, mark in keys)
    return [ShownToken(f" {name}: {n / len(shown):.0%} ", colour, mark) for name, colour, mark, n in numbers if n]


def visible(text: str) -> str:
    """A text with signs for line ends and tabs, and dots for what cannot be printed."""
    text = text.replace("\n", LINE_END).replace("\t", "→")
    return "".join(sign if sign.isprintable() and not 127 <= ord(sign) < 161 else "·" for sign in text) or "·"
