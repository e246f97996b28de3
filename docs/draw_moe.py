"""Draws `moe.png`, the picture at the top of the README: how eight tokens pass through four experts.

    python docs/draw_moe.py [FILE]

Every number in it is computed by the package's own `Top2Gating`. Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from mixture_of_experts import Routing, Top2Gating

# What the router says of each token: its logit for every expert.
TOKENS = {
    "the": (3.1, 2.3, 0.2, 0.4),
    "quick": (0.3, 2.9, 1.7, 0.1),
    "brown": (0.5, 0.1, 2.6, 2.0),
    "fox": (2.6, 0.3, 2.1, 0.2),
    "jumps": (0.2, 2.5, 0.4, 1.4),
    "over": (2.4, 1.9, 0.1, 0.6),
    "lazy": (0.1, 0.4, 1.8, 2.5),
    "dogs": (2.2, 1.5, 0.5, 0.3),
}
FOLLOWED, DROPPED = "fox", "dogs"

# Okabe and Ito's palette, told apart by colour-blind readers: one hue an expert.
ORANGE = "#E69F00"
HUES = ("#0072B2", ORANGE, "#009E73", "#B8639A")
INK, FAINT, PALE = "#1a1a1a", "#6b6b6b", "#c9c9c9"

TOP, ROW = 50.0, 5.4  # of the token rows
SLOT_WIDTH, SLOT_HEIGHT, EXPERT_GAP = 8.6, 4.8, 11.4
CELL_WIDTH, BAR = 5.6, 17.0
X_TOKEN, X_GATE, X_ENTRY, X_SLOT_END, X_EXPERT, X_OUT = 0.0, 14.0, 47.5, 95.0, 98.5, 126.0


class Choice(NamedTuple):
    """One choice of one token, as the gate made it."""

    token: int
    rank: int  # 0 for the first choice, 1 for the second
    expert: int
    slot: int
    kept: bool
    weight: float


def route() -> tuple[torch.Tensor, list[Choice], int]:
    """Route the tokens: probabilities (n, e), the choices and the capacity."""
    gate = Top2Gating(dim=4, num_gates=4, second_policy_train="all", capacity_factor_train=1.5, min_expert_capacity=1)
    with torch.no_grad():
        gate.w_gating.copy_(torch.eye(4))  # so that the tokens are their own logits
        routing = gate(torch.tensor(list(TOKENS.values())).unsqueeze(0))
    return routing.probs[0], choices_of(routing), routing.capacity


def choices_of(routing: Routing) -> list[Choice]:
    """What a gate that sends two choices a token decided of its only group."""
    fields = (routing.token, routing.expert, routing.position, routing.kept, routing.weight)
    choices = []
    for token, expert, slot, kept, weight in zip(*(f[0].tolist() for f in fields), strict=True):
        rank = int(expert != routing.probs[0, token].argmax())
        choices.append(Choice(token, rank, expert, slot, kept, weight))
    return choices


def row_y(token: int) -> float:
    return TOP - ROW * token


def expert_y(expert: int) -> float:
    return TOP - 2.0 - EXPERT_GAP * expert


def tint(colour: str, amount: float = 0.72) -> tuple[float, ...]:
    """The colour mixed with white."""
    return tuple(c + (1 - c) * amount for c in to_rgb(colour))


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str = "", **style) -> None:
    """A rounded box with its left edge at x and its middle at y."""
    ink = style.pop("ink", INK)
    size = style.pop("size", 11)
    weight = style.pop("weight", "normal")
    shape = FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.7", **style)
    ax.add_patch(shape)
    ax.text(x + width / 2, y - 0.1, text, ha="center", va="center", color=ink, fontsize=size, weight=weight)


def style_of(choice: Choice) -> dict:
    """First choices are filled with their expert's hue, second ones tinted with it."""
    hue = HUES[choice.expert]
    if choice.rank == 0:
        ink = INK if hue == ORANGE else "white"  # white on orange is hard to read
        return {"facecolor": hue, "edgecolor": hue, "ink": ink, "linewidth": 1.2}
    return {"facecolor": tint(hue), "edgecolor": hue, "ink": INK, "linewidth": 1.2}


def wire(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    """A smooth line that leaves and arrives horizontally."""
    middle = (start[0] + end[0]) / 2
    points = [start, (middle, start[1]), (middle, end[1]), end]
    ax.add_patch(PathPatch(Curve(points, [Curve.MOVETO] + [Curve.CURVE4] * 3), facecolor="none", **style))


def draw_tokens(ax: Axes) -> None:
    for token, word in enumerate(TOKENS):
        marked = word in (FOLLOWED, DROPPED)
        look = (
            {"edgecolor": INK, "linewidth": 1.6, "weight": "bold"} if marked else {"edgecolor": FAINT, "linewidth": 0.9}
        )
        box(ax, X_TOKEN, row_y(token), 9.5, 3.9, word, facecolor="#f2f2f2", **look)
        arrow(ax, (9.7, row_y(token)), (X_GATE - 0.4, row_y(token)), color=PALE)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    style = {"linewidth": 1.2, "arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, **style}
    ax.add_patch(FancyArrowPatch(start, end, **style))


def number(value: torch.Tensor | float) -> str:
    return f"{float(value):.2f}".lstrip("0")


def draw_gate(ax: Axes, probs: torch.Tensor, choices: list[Choice]) -> None:
    """The table of probabilities, the two chosen of each row in their expert's colour."""
    chosen = {(choice.token, choice.expert): choice for choice in choices}
    for expert, hue in enumerate(HUES):
        x = X_GATE + (expert + 0.5) * CELL_WIDTH
        ax.text(x, TOP + 3.6, f"E{expert + 1}", ha="center", va="center", color=hue, fontsize=11, weight="bold")
    for token in range(len(TOKENS)):
        for expert in range(len(HUES)):
            cell = chosen.get((token, expert))
            look = style_of(cell) if cell else {"facecolor": "white", "edgecolor": "white", "ink": FAINT}
            left = X_GATE + expert * CELL_WIDTH + 0.25
            box(ax, left, row_y(token), CELL_WIDTH - 0.5, 3.9, number(probs[token, expert]), size=10.5, **look)


def queue_x(position: int, capacity: int) -> float:
    """Left edge of a place in the queue: slot 0 is next to the expert, what does not fit stands behind the line."""
    gap = 1.8 if position >= capacity else 0.0
    return X_SLOT_END - (position + 1) * SLOT_WIDTH - gap


def draw_queues(ax: Axes, choices: list[Choice], capacity: int) -> None:
    words = list(TOKENS)
    line = X_SLOT_END - capacity * SLOT_WIDTH - 0.9
    for expert, hue in enumerate(HUES):
        y = expert_y(expert)
        ax.plot([line, line], [y - 3.8, y + 3.8], color=INK, linewidth=2.4, solid_capstyle="butt")
        queue = [choice for choice in choices if choice.expert == expert]
        for choice in queue:
            place = (queue_x(choice.slot, capacity) + 0.2, y, SLOT_WIDTH - 0.4, SLOT_HEIGHT, words[choice.token])
            if choice.kept:
                box(ax, *place, **style_of(choice))
            else:
                box(ax, *place, facecolor="white", edgecolor=FAINT, ink=FAINT, linestyle=(0, (3, 2)))
                cross(ax, place[0] + 0.3, y + SLOT_HEIGHT / 2 - 0.3)
        last = max(choice.slot for choice in queue)
        tail = queue_x(last, capacity) if last >= capacity else line
        arrow(ax, (X_ENTRY, y), (tail - 0.3, y), color=hue)
    y = expert_y(0) + 5.6
    ax.text(line - 0.2, y, f"capacity {capacity}", ha="left", va="center", fontsize=10.5, color=INK)
    ax.text(line - 1.2 - SLOT_WIDTH / 2, y, "dropped", ha="center", va="center", fontsize=10.5, color=FAINT)


def cross(ax: Axes, x: float, y: float) -> None:
    ax.plot([x], [y], marker="X", markersize=8, color=INK, markeredgecolor="white", zorder=5)


def draw_experts(ax: Axes) -> None:
    for expert, hue in enumerate(HUES):
        y = expert_y(expert)
        look = {"facecolor": "white", "edgecolor": hue, "ink": hue, "linewidth": 2.0, "weight": "bold"}
        box(ax, X_EXPERT, y, 9.0, 7.4, f"E{expert + 1}", size=12, **look)
        arrow(ax, (X_SLOT_END + 0.2, y), (X_EXPERT - 0.2, y), color=hue)


def draw_wires(ax: Axes, choices: list[Choice]) -> None:
    """From the gate to the queues and from the experts to the outputs; the followed token's stand out."""
    for choice in choices:
        word, hue, y = list(TOKENS)[choice.token], HUES[choice.expert], row_y(choice.token)
        look = {"edgecolor": tint(hue, 0.5), "linewidth": 1.0, "zorder": 0}
        if word == FOLLOWED:
            look = {"edgecolor": hue, "linewidth": 2.8, "zorder": 3}
        if word == DROPPED:
            look = {"edgecolor": INK, "linewidth": 1.3, "zorder": 2, "linestyle": (0, (4, 2.5))}
        wire(ax, (X_GATE + 4 * CELL_WIDTH + 0.3, y), (X_ENTRY, expert_y(choice.expert)), **look)
        if choice.kept:
            wire(ax, (X_EXPERT + 9.2, expert_y(choice.expert)), (X_OUT - 0.4, y), **look)


def draw_outputs(ax: Axes, choices: list[Choice]) -> None:
    """Each output as a bar of length 1: the two weighted results, and what is missing where a choice was dropped."""
    for token in range(len(TOKENS)):
        x, low = X_OUT, row_y(token) - 1.95
        ax.add_patch(Rectangle((x, low), BAR, 3.9, facecolor="white", edgecolor=PALE, linewidth=0.9))
        for choice in sorted((c for c in choices if c.token == token and c.kept), key=lambda c: c.rank):
            look = style_of(choice)
            ink = look.pop("ink")
            width = choice.weight * BAR
            ax.add_patch(Rectangle((x, low), width, 3.9, **look))
            middle = (x + width / 2, row_y(token) - 0.1)
            ax.text(*middle, number(choice.weight), ha="center", va="center", color=ink, fontsize=10.5)
            x += width


def draw_sum(ax: Axes, choices: list[Choice]) -> None:
    """The followed token's weighted sum, in its experts' colours."""
    first, second = sorted((c for c in choices if list(TOKENS)[c.token] == FOLLOWED), key=lambda c: c.rank)
    pieces = [(f"{number(c.weight)} E{c.expert + 1}({FOLLOWED})", HUES[c.expert]) for c in (first, second)]
    x, y = X_OUT + BAR / 2 + 1.5, TOP + 6.9
    ax.text(x - 12.6, y, f"{FOLLOWED}:", ha="right", va="center", color=INK, fontsize=10.5)
    ax.text(x - 1.2, y, pieces[0][0], ha="right", va="center", color=pieces[0][1], fontsize=10.5, weight="bold")
    ax.text(x, y, "+", ha="center", va="center", color=INK, fontsize=10.5)
    ax.text(x + 1.2, y, pieces[1][0], ha="left", va="center", color=pieces[1][1], fontsize=10.5, weight="bold")


def draw_dropped(ax: Axes) -> None:
    """The residual path: all that is left of a token whose choices both overflowed."""
    y = row_y(list(TOKENS).index(DROPPED))
    low, plus = y - 5.4, X_OUT + BAR + 4.0
    ax.text(X_OUT + BAR / 2, y - 0.1, "0", ha="center", va="center", fontsize=11, color=INK)
    ax.plot([4.7, 4.7, plus], [y - 2.0, low, low], color=INK, linewidth=1.6, solid_joinstyle="round")
    arrow(ax, (plus, low), (plus, y - 1.5), color=INK, linewidth=1.6)
    arrow(ax, (X_OUT + BAR + 0.3, y), (plus - 1.5, y), color=INK)
    ax.add_patch(Circle((plus, y), 1.4, facecolor="white", edgecolor=INK, linewidth=1.4))
    ax.text(plus, y - 0.1, "+", ha="center", va="center", fontsize=12, color=INK)
    text = f"residual path around the layer: both experts of “{DROPPED}” are full, so 0 is added and x passes unchanged"
    ax.text(X_OUT / 2 + 9, low - 0.9, text, ha="center", va="top", fontsize=11, color=INK)


def draw_headings(ax: Axes, capacity: int) -> None:
    columns = [
        (4.7, "tokens", ""),
        (X_GATE + 2 * CELL_WIDTH, "gate", "softmax: the best two of a row"),
        (X_SLOT_END - capacity * SLOT_WIDTH / 2, "slots", "first choices before second"),
        (X_EXPERT + 4.5, "experts", ""),
        (X_OUT + BAR / 2, "combine", ""),
    ]
    for x, title, subtitle in columns:
        ax.text(x, TOP + 10.0, title, ha="center", va="center", fontsize=14, weight="bold", color=INK)
        ax.text(x, TOP + 6.9, subtitle, ha="center", va="center", fontsize=10.5, color=FAINT)


def draw(file: Path) -> None:
    probs, choices, capacity = route()
    figure, ax = plt.subplots(figsize=(12.5, 5.6))
    draw_wires(ax, choices)
    draw_tokens(ax)
    draw_gate(ax, probs, choices)
    draw_queues(ax, choices, capacity)
    draw_experts(ax)
    draw_outputs(ax, choices)
    draw_sum(ax, choices)
    draw_dropped(ax)
    draw_headings(ax, capacity)
    ax.set(xlim=(-1, X_OUT + BAR + 7), ylim=(row_y(len(TOKENS) - 1) - 10, TOP + 12), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(file, dpi=160, bbox_inches="tight", pad_inches=0.1, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "moe.png"
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
