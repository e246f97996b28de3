"""Draws the charts of a report by Matplotlib, as `data:` addresses: strips of load, and one gate over its steps.

A strip has few pixels for each expert; the page stretches it. A chart of steps is `WIDTH` pixels wide, for a phone.
`HEAT_MAP` says where its heat map lies, so that the page knows what is under the pointer.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixture_of_experts.stats.colours import FAINT, INK, clipped, load_colours
from mixture_of_experts.stats.record import Record, relative

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, MORE = 360, 196, 88  # pixels of a chart; MORE is added to the height for drops
LEFT, RIGHT, TOP, BOTTOM, GAP = 44, 8, 6, 36, 12
HEAT_MAP = (LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)  # left, top, width, height in a chart
MOST_CELLS = 48  # a strip of at most so many experts has edges between cells
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#777777",
    "xtick.color": INK,
    "ytick.color": INK,
}
EDGE = 0.85  # grey of the edges, so that balanced cells show on a white page
DROPPED, UNAVOIDABLE, UNSEEN = "#D55E00", "#B4B4B4", "#0072B2"


def strip(load: Tensor) -> str:
    """A cell for each expert in the colour of its load `(e,)`; a cross or a notch marks an expert without a token."""
    apart = len(load) <= MOST_CELLS
    rows = 9
    columns = max(300 // len(load), rows) if apart else 3
    cells = colours_of(relative(load))[:, None].repeat(1, columns, 1)
    image = cells.repeat(rows, 1, 1, 1)  # (rows, e, columns, 3)
    mark = torch.zeros(rows, columns, dtype=torch.bool)
    if apart:
        image[:, :-1, -1] = EDGE
        cross = torch.eye(rows - 2, dtype=torch.bool)
        left = (columns - rows) // 2
        mark[1:-1, left + 1 : left + rows - 1] = cross | cross.flip(0)
    else:
        mark[rows // 3 : -(rows // 3)] = True
    image[mark[:, None] & (load == 0)[None, :, None]] = 1.0
    return image_address(image.flatten(1, 2))


def colours_of(load: Tensor) -> Tensor:
    """The colours `(..., 3)` of relative loads."""
    import matplotlib as mpl

    colours = load_colours()
    return torch.from_numpy(mpl.colormaps[colours["cmap"]](colours["norm"](clipped(load).numpy())))[..., :3]


def image_address(image: Tensor) -> str:
    """Colours `(rows, columns, 3)` as a PNG."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image.numpy(), format="png")
    return address("image/png", file.getvalue())


def scale() -> str:
    """The colours of loads, from the least to the most."""
    return image_address(colours_of(2 ** torch.linspace(-2, 2, 65, dtype=torch.float64)).unsqueeze(0))


def over_steps(stretches: Sequence[Record], end: int, most_dropped: float) -> str:
    """A chart of what a gate asks of each expert over its steps; below it what is lost, if any gate loses something.

    Args:
        stretches: records, each of one step or several, oldest first.
        end: one more than the last step.
        most_dropped: the largest share that is drawn in any chart of the report.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        height = HEIGHT + (MORE if most_dropped else 0)
        figure = Figure(figsize=(WIDTH / 72, height / 72))  # an SVG has 72 pixels an inch
        heat_map = place(figure, TOP, HEIGHT - TOP - BOTTOM, height)
        steps = (stretches[0].step - 0.5, end - 0.5)
        draw_load(heat_map, stretches, steps)
        lowest = heat_map
        if most_dropped:
            lowest = place(figure, HEIGHT - BOTTOM + GAP, MORE - GAP, height)
            draw_lost(lowest, stretches, steps, most_dropped)
            heat_map.tick_params(labelbottom=False)
        lowest.set_xlabel("step", labelpad=2)
        lowest.locator_params(axis="x", integer=True, nbins=6, min_n_ticks=1)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return address("image/svg+xml", file.getvalue())


def curves(steps: Sequence[Sequence[int]], values: Sequence[Sequence[float]]) -> str:
    """A chart with a line for each sequence of values; the colours go from dark to light."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, MORE * 1.5 / 72), layout="constrained")
        ax = figure.add_subplot()
        for i, (x, y) in enumerate(zip(steps, values, strict=True)):
            colour = mpl.colormaps["viridis"](0.85 * i / max(len(values) - 1, 1))
            ax.plot(x, y, color=colour, linewidth=1.2, marker="." if len(x) == 1 else "")
        ax.set_xlabel("step", labelpad=2)
        ax.locator_params(axis="x", integer=True, nbins=6, min_n_ticks=1)
        ax.locator_params(axis="y", nbins=4)
        ax.tick_params(length=2, pad=2)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return address("image/svg+xml", file.getvalue())


def place(figure: Figure, top: int, high: int, height: int) -> Axes:
    """Axes of `high` pixels, `top` pixels below the top of a figure of `height` pixels."""
    ax = figure.add_axes((LEFT / WIDTH, 1 - (top + high) / height, HEAT_MAP[2] / WIDTH, high / height))
    ax.tick_params(length=2, pad=2)
    return ax


def draw_load(ax: Axes, stretches: Sequence[Record], steps: tuple[float, float]) -> None:
    """Draw a row for each expert and a column for each stretch."""
    load = torch.stack([relative(record.requested.flatten()) for record in stretches], dim=1)
    num_experts, shape = len(load), stretches[0].load.shape
    extent = (*steps, num_experts - 0.5, -0.5)
    ax.imshow(clipped(load).numpy(), aspect="auto", interpolation="none", extent=extent, **load_colours())
    ax.set_ylabel("expert", labelpad=1)
    ax.locator_params(axis="y", integer=True, nbins=9, min_n_ticks=1)
    for outer in range(1, shape[0] if len(shape) == 2 else 1):
        ax.axhline(outer * shape[1] - 0.5, color=INK, linewidth=0.7)


def draw_lost(ax: Axes, stretches: Sequence[Record], steps: tuple[float, float], most: float) -> None:
    """Draw the shares of dropped choices, of unavoidable drops, and of tokens that no expert computes."""
    edges = torch.linspace(*steps, len(stretches) + 1).numpy()

    def stairs(name: str, **style: Any) -> None:
        ax.stairs([100 * getattr(record, name) for record in stretches], edges, **style)

    stairs("dropped", fill=True, color=DROPPED)
    stairs("unavoidable", fill=True, color=UNAVOIDABLE)
    stairs("unseen", color=UNSEEN, linewidth=1.3, baseline=None)
    ax.set(xlim=steps, ylim=(0, 105 * most), ylabel="%")
    ax.locator_params(axis="y", nbins=3)
    if not any(record.dropped or record.unseen for record in stretches):
        ax.text(0.5, 0.5, "nothing lost", transform=ax.transAxes, ha="center", va="center", color=FAINT)


def address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
