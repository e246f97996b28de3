"""Draws the pictures of `docs/concepts.md`, one for each concept.

    python docs/draw_concepts.py [--out docs/images]

Every number in them is computed by the package's own gates. Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixture_of_experts import Routing, Top2Gating, TopKGating

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from draw_moe import FAINT, HUES, INK, PALE, TOKENS, Choice, arrow, box, choices_of, cross, number, style_of  # noqa: E402

WIDTH, INCHES = 100.0, 7.0  # of a picture, in its own units and on paper
SLOT, ROW = 11.6, 8.0
WORDS = [word for word in TOKENS if word != "lazy"]  # seven, so that one slot stays empty


def canvas(height: float) -> tuple[Figure, Axes]:
    figure = plt.figure(figsize=(INCHES, INCHES * height / WIDTH))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax


def route(words: Sequence[str], factor: float | None, mask: torch.Tensor | None = None, **settings) -> Routing:
    """How the default router sends these tokens, both choices of each."""
    gate = Top2Gating(4, 4, second_policy_train="all", capacity_factor_train=factor, min_expert_capacity=1, **settings)
    with torch.no_grad():
        gate.w_gating.copy_(torch.eye(4))  # so that the tokens are their own logits
        logits = [TOKENS.get(word, (0.0,) * 4) for word in words]
        return gate(torch.tensor([logits]), mask=mask)


def say(ax: Axes, x: float, y: float, text: str, **style) -> None:
    ax.text(x, y, text, **{"ha": "left", "va": "center", "fontsize": 11, "color": INK, **style})


def draw_expert(ax: Axes, expert: int, x: float, y: float) -> None:
    look = {"facecolor": "white", "edgecolor": HUES[expert], "ink": HUES[expert], "linewidth": 1.8, "weight": "bold"}
    box(ax, x, y, 7.0, 5.8, f"E{expert + 1}", size=11.5, **look)


def draw_queue(
    ax: Axes, y: float, queue: list[Choice], words: Sequence[str], slots: int | None, bold: str = ""
) -> None:
    """One expert and those who queue for it, the first one next to it; a line where its slots end."""
    expert, left = queue[0].expert, 11.0
    draw_expert(ax, expert, 2.0, y)
    for empty in range(len(queue), slots or 0):
        box(ax, left + empty * SLOT, y, SLOT - 0.6, 5.0, "empty", facecolor="white", edgecolor=PALE, ink=FAINT, size=10)
    for choice in sorted(queue, key=lambda choice: choice.slot):
        out = slots is not None and choice.slot >= slots
        place = (left + choice.slot * SLOT + 2.4 * out, y, SLOT - 0.6, 5.0, words[choice.token])
        weight = "bold" if words[choice.token] == bold else "normal"
        if not out:
            box(ax, *place, weight=weight, **style_of(choice))
        else:
            box(ax, *place, weight=weight, facecolor="white", edgecolor=FAINT, ink=FAINT, linestyle=(0, (3, 2)))
            cross(ax, place[0] + 0.4, y + 2.3)
    if slots is not None:
        end = left + slots * SLOT + 0.9
        ax.plot([end, end], [y - 3.6, y + 3.6], color=INK, linewidth=2.4, solid_capstyle="butt")


def queues_of(routing: Routing) -> list[list[Choice]]:
    choices = choices_of(routing)
    return [[choice for choice in choices if choice.expert == expert] for expert in range(routing.num_experts)]


def draw_routing() -> Figure:
    """Probabilities of each token, and the two assignments that the gate makes of them."""
    words = list(TOKENS)[:4]
    routing = route(words, factor=None)
    choices = {(choice.token, choice.rank): choice for choice in choices_of(routing)}
    figure, ax = canvas(42)
    for expert, hue in enumerate(HUES):
        say(ax, 20.6 + 8 * expert, 34.5, f"E{expert + 1}", ha="center", color=hue, weight="bold")
    for x, text in ((6.5, "token"), (32.6, "probability of each expert"), (78, "assignments: expert, weight")):
        say(ax, x, 39, text, ha="center", weight="bold")
    for token, word in enumerate(words):
        y = 29 - ROW * token
        box(ax, 1.0, y, 11.0, 5.0, word, facecolor="#f2f2f2", edgecolor=FAINT)
        arrow(ax, (12.4, y), (16.0, y), color=FAINT)
        chosen = {choices[token, rank].expert: choices[token, rank] for rank in (0, 1)}
        for expert in range(len(HUES)):
            look = (
                style_of(chosen[expert])
                if expert in chosen
                else {"facecolor": "white", "edgecolor": "white", "ink": FAINT}
            )
            box(ax, 17.0 + 8 * expert, y, 7.2, 5.0, number(routing.probs[0, token, expert]), **look)
        arrow(ax, (50.0, y), (55.0, y), color=FAINT)
        for rank in (0, 1):
            choice = choices[token, rank]
            text = f"E{choice.expert + 1}   × {number(choice.weight)}"
            box(ax, 57.0 + 21.5 * rank, y, 20.5, 5.0, text, **style_of(choice))
    return figure


def draw_capacity() -> Figure:
    """Three slots an expert: who comes too late is dropped, who is not needed stays empty."""
    routing = route(WORDS, factor=1.75)
    slots = int(routing.capacity or 0)
    figure, ax = canvas(42)
    say(ax, 11.0, 39, f"{slots} slots each", weight="bold")
    say(ax, 11.0 + slots * SLOT + 2.6, 39, "dropped", color=FAINT, weight="bold")
    for expert, queue in enumerate(queues_of(routing)):
        draw_queue(ax, 32 - 8.6 * expert, queue, WORDS, slots)
    key(ax, 76.0, 14.0)
    return figure


def draw_dropless() -> Figure:
    """The same tokens without capacity: as many rows as choices."""
    figure, ax = canvas(42)
    say(ax, 11.0, 39, "rows of each expert: all who chose it", weight="bold")
    for expert, queue in enumerate(queues_of(route(WORDS, factor=None))):
        y = 32 - 8.6 * expert
        for position, choice in enumerate(sorted(queue, key=lambda choice: choice.token)):
            box(ax, 11.0 + position * SLOT, y, SLOT - 0.6, 5.0, WORDS[choice.token], **style_of(choice))
        draw_expert(ax, expert, 2.0, y)
        say(ax, 12.0 + len(queue) * SLOT, y, f"{len(queue)} rows", color=FAINT)
    key(ax, 76.0, 14.0)
    return figure


def key(ax: Axes, x: float, y: float) -> None:
    for rank, text in enumerate(("first choice", "second choice")):
        look = {"facecolor": FAINT, "edgecolor": FAINT} if rank == 0 else {"facecolor": "#e3e3e3", "edgecolor": FAINT}
        box(ax, x, y - 5 * rank, 4.0, 3.0, **look)
        say(ax, x + 5.2, y - 5 * rank, text, fontsize=10)


def draw_causality() -> Figure:
    """One queue in both orders: by choices, a later word pushes the first one out."""
    words, expert = list(TOKENS), 1
    figure, ax = canvas(38)
    lines = (
        ("choice", "first choices before second: “the” waits behind tokens that come after it"),
        ("token", "left to right: no token waits behind a later one"),
    )
    for line, (priority, text) in enumerate(lines):
        y = 34.5 - 18.5 * line
        say(ax, 2.0, y, f'priority="{priority}"', weight="bold", family="monospace")
        say(ax, 2.0, y - 4.3, text, color=FAINT, fontsize=10.5)
        routing = route(words, factor=1.0, priority=priority)
        draw_queue(ax, y - 11.0, queues_of(routing)[expert], words, int(routing.capacity or 0), bold="the")
    return figure


def draw_padding() -> Figure:
    """Eight tokens of which three are padding: no choice is made of those, and their output is 0."""
    words = [*list(TOKENS)[:5], "pad", "pad", "pad"]
    mask = torch.tensor([[word != "pad" for word in words]])
    routing = route(words, factor=None, mask=mask)
    choices, left, step = [c for c in choices_of(routing) if mask[0, c.token]], 12.0, 11.0
    assert int(routing.sent.sum()) == len(choices) == 2 * int(mask.sum())
    figure, ax = canvas(35)
    for text, y in (("tokens", 31.5), ("mask", 25.5), ("experts", 16.6), ("output", 5.0)):
        say(ax, 10.4, y, text, ha="right", weight="bold", fontsize=10.5)
    for token, word in enumerate(words):
        x, real = left + step * token, bool(mask[0, token])
        plain = {"facecolor": "#f2f2f2" if real else "white", "edgecolor": FAINT if real else PALE}
        hatch = {} if real else {"hatch": "////"}
        box(ax, x, 31.5, step - 0.8, 5.0, word if real else "", **plain, **hatch)
        say(ax, x + step / 2 - 0.4, 25.5, str(real), ha="center", fontsize=10, color=INK if real else FAINT)
        for choice in (choice for choice in choices if choice.token == token):
            box(ax, x, 19.2 - 5.2 * choice.rank, step - 0.8, 4.6, f"E{choice.expert + 1}", **style_of(choice))
        if real:
            arrow(ax, (x + step / 2 - 0.4, 11.2), (x + step / 2 - 0.4, 7.8), color=FAINT)
        box(ax, x, 5.0, step - 0.8, 5.0, f"{word}′" if real else "0", **plain)
    return figure


def draw_balance() -> Figure:
    """Loads of eight experts under routers that favour some of them more and more, and the loss of each."""
    torch.manual_seed(0)
    e, k = 8, 2
    gate = TopKGating(e, e, k=k)
    figure, panels = plt.subplots(1, 3, figsize=(INCHES, 2.5), sharey=True, layout="constrained")
    favour = torch.linspace(1, 0, e)
    for ax, strength, title in zip(panels, (0.0, 3.0, 60.0), ("balanced", "skewed", "collapsed"), strict=True):
        with torch.no_grad():
            gate.w_gating.copy_(torch.eye(e))
            routing = gate(strength * favour + torch.randn(1, 4096, e))
        load = (routing.queue_length[0] / (4096 * k / e)).tolist()
        ax.bar(range(1, e + 1), load, color=HUES[0], width=0.8)
        ax.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.set_title(f"{title}: loss {routing.balance_loss.item():.2f}", fontsize=11, color=INK)
        ax.set_xticks(range(1, e + 1), [f"E{expert}" for expert in range(1, e + 1)], fontsize=8.5)
        ax.tick_params(length=0)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("load ÷ mean load", fontsize=10.5)
    return figure


PICTURES = {
    "routing": draw_routing,
    "capacity": draw_capacity,
    "dropless": draw_dropless,
    "causality": draw_causality,
    "padding": draw_padding,
    "balance": draw_balance,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "images")
    folder = parser.parse_args(arguments).out
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main()
