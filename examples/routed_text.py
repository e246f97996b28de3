"""Which expert computes which token: a text in which each token has the colour of its expert. A function to import.

It needs Matplotlib. The routing is what `mixture_of_experts.stats.routing_of(model, ids)` has of a gate.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixture_of_experts import Routing


def draw_text(tokens: Sequence[str], routing: Routing, width: int = 100) -> Figure:
    """A text in which each token has the colour of the expert that computes it with the largest weight."""
    weight, expert = (each.view(len(tokens), -1) for each in (routing.weight, routing.expert))
    largest = expert.gather(1, weight.argmax(dim=1, keepdim=True)).flatten().tolist()
    placed, x, y = [], 0, 0
    for token, number in zip(tokens, largest, strict=True):
        for sign in token:
            placed.append((x, y, sign, f"C{number % 10}"))
            x, y = (0, y + 1) if sign == "\n" or x + 1 == width else (x + 1, y)
    figure = Figure(figsize=(width / 10, (y + 1) / 5))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(y + 1, 0))
    ax.axis("off")
    for x, y, sign, colour in placed:
        ax.add_patch(Rectangle((x, y), 1, 0.94, color=colour, alpha=0.6, linewidth=0))
        shown = sign if sign.isprintable() else "·"
        ax.text(x + 0.5, y + 0.5, shown, family="monospace", ha="center", va="center", parse_math=False)
    return figure
