"""Draws the pictures of CONTRIBUTING.md: the rooms of the package, and the way of one token through it.

    python docs/draw_package.py [--out docs/images]

The rooms and what they import are read from the code, as `tests/test_imports.py` does. Needs matplotlib (the extra
`plot`) and pytest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "tests")]

from draw_concepts import WIDTH, canvas, say  # noqa: E402
from draw_moe import FAINT, HUES, INK, PALE, arrow, box, tint  # noqa: E402
from test_imports import group_by_layer, read_sources  # noqa: E402

BLUE, ORANGE, GREEN, PINK = (tint(hue, 0.75) for hue in HUES)
GREY = "#f2f2f2"
COLOURS = {"dispatch": PINK, "gating": ORANGE, "ops": GREEN, "experts": GREEN, "moe": BLUE}
FLOOR, LEFT, RIGHT = 6.4, 8.0, 98.0  # the height of a floor, and where its rooms begin and end


def draw_package() -> Figure:
    """The rooms by floors: each imports from floors below its own."""
    house = group_by_layer(read_sources())
    height = FLOOR * len(house) + 3.0
    figure, ax = canvas(height)
    for floor, rooms in enumerate(house):
        width = (RIGHT - LEFT - len(rooms) + 1.0) / len(rooms)
        for i, room in enumerate(rooms):
            look = {"facecolor": COLOURS.get(room, GREY), "edgecolor": FAINT, "linewidth": 0.8}
            left, y = LEFT + i * (width + 1.0), 4.0 + FLOOR * floor
            box(ax, left, y, width, FLOOR - 1.4, room or "__init__", size=9, **look)
    top = 4.0 + FLOOR * (len(house) - 1)
    arrow(ax, (4.0, top), (4.0, 4.0), color=INK)
    say(ax, 2.2, (top + 4.0) / 2, "imports run down", rotation=90, ha="center", fontsize=8.5)
    return figure


# Of a token's way: what is there, of which shape, and the function that makes the next of it
WAY = (
    ("inputs", "(..., n, d)", "mask_and_group, Gate.read", GREY),
    ("Tokens", "groups (b, n, d), mask", "the gate: decide(tokens)", ORANGE),
    ("Choices", "expert, weight, probs: k of a token", "route: masks, capacity", ORANGE),
    ("Routing", "assignments of each group, losses", "join_groups; join_levels for two levels", PINK),
    ("Assignments", "assignments of the call, (t k,)", "routed_ffn selects by unsupported_reason(call)", PINK),
    ("Call", "tokens, Assignments, Network", "the implementation lays out rows, and gathers", GREEN),
    ("Permutation, rows", "(r, d), sorted by expert", "the experts' products", GREEN),
    ("rows", "(r, d)", "combine: each token's weighted sum", GREEN),
    ("outputs of tokens", "(t, d)", "ungroup_and_add_shared", GREY),
    ("out, aux_loss", "(..., n, d), a scalar", "", BLUE),
)
READERS = ("aux_loss", "statistics and pictures", "the papers' dense tensors")


def draw_way() -> Figure:
    """Objects in boxes, from above to below; functions beside the arrows between them."""
    step = 10.4
    height = step * len(WAY) + 1.0
    figure, ax = canvas(height)
    left, width = 8.0, 46.0
    for i, (name, what, function, colour) in enumerate(WAY):
        y = height - 4.0 - step * i
        box(ax, left, y, width, 5.8, facecolor=colour, edgecolor=FAINT, linewidth=0.8)
        say(ax, left + 2.0, y, name, weight="bold", fontsize=9.5)
        say(ax, left + width - 2.0, y, what, ha="right", fontsize=7.5)
        if function:
            arrow(ax, (left + width / 2, y - 3.1), (left + width / 2, y - step + 3.1), color=INK)
            say(ax, left + width / 2 + 2.0, y - step / 2, function, fontsize=8.5, color=FAINT)
        if name == "Routing":
            draw_readers(ax, left + width, y)
    return figure


def draw_readers(ax: Axes, x: float, y: float) -> None:
    """Who else reads what a gate tells."""
    for i, reader in enumerate(READERS):
        at = y + 6.0 * (2 - i)
        box(ax, x + 14.0, at, WIDTH - x - 16.0, 4.6, reader, size=8, facecolor="white", edgecolor=PALE, linewidth=1.0)
        arrow(ax, (x + 0.4, y), (x + 13.4, at), color=FAINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in {"package": draw_package(), "token": draw_way()}.items():
        figure.savefig(args.out / f"{name}.png", dpi=200, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main()
