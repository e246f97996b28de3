"""A function that draws text with each token in its expert's color.

It needs Matplotlib. `mixture_of_experts.stats.routing_of(model, ids)` returns the routing of each token-choice gate.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixture_of_experts import Routing


def draw_text(tokens: Sequence[str], routing: Routing, width: int = 100) -> Figure:
    """Draw a text in which each token has the color of the expert with the largest weight among those that compute it.

    A token that no expert computes is white.
    """
    if routing.k is None:
        raise ValueError("tokens make no choices in expert choice: pass the `routing` of another gate")
    weight, expert = (each.view(len(tokens), routing.k) for each in (routing.weight, routing.expert))
    largest, choice = weight.max(dim=1, keepdim=True)
    computed = zip(largest.flatten().tolist(), expert.gather(1, choice).flatten().tolist(), strict=True)
    colors = [f"C{number % 10}" if share else "white" for share, number in computed]
    placed, x, y = [], 0, 0
    for token, color in zip(tokens, colors, strict=True):
        for sign in token:
            placed.append((x, y, sign, color))
            x, y = (0, y + 1) if sign == "\n" or x + 1 == width else (x + 1, y)
    figure = Figure(figsize=(width / 10, (y + 1) / 5))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(y + 1, 0))
    ax.axis("off")
    for x, y, sign, color in placed:
        ax.add_patch(Rectangle((x, y), 1, 0.94, color=color, alpha=0.6, linewidth=0))
        shown = sign if sign.isprintable() else "·"
        ax.text(x + 0.5, y + 0.5, shown, family="monospace", ha="center", va="center", parse_math=False)
    return figure
