"""Plots the routing decisions of a model's gates. Matplotlib (the `plot` extra) is imported only when a plot is drawn.

The load colormap ranges from purple (underloaded) through white (balanced) to orange (overloaded). The colormap is
colorblind-safe and print-friendly.

Axes: e (experts, in outer-major order on the second level of a hierarchy), s (steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORBAR_TICKS: dict[float, str] = {1 / 4: "¼ or less", 1 / 2: "½", 1: "balanced", 2: "2×", 4: "4× or more"}
# relative loads at the ends of the colormap
MIN_RELATIVE_LOAD, MAX_RELATIVE_LOAD = min(COLORBAR_TICKS), max(COLORBAR_TICKS)
MIN_NUMBER_WIDTH = 24  # minimum cell width in points for showing a number


def make_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure, given its size in inches. Raises ImportError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots require matplotlib; install matplotlib, or install mixture_of_experts with its 'plot' extra"
        ) from error
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def get_figure(ax: Axes) -> Figure:
    figure: Any = ax.get_figure(root=True)
    return figure


def make_load_colormap() -> dict[str, Any]:
    """Return the colormap and normalization for relative loads. A balanced load is white, and half and twice that load
    are equally far from white."""
    from matplotlib.colors import LogNorm

    return {"cmap": "PuOr_r", "norm": LogNorm(MIN_RELATIVE_LOAD, MAX_RELATIVE_LOAD)}


def add_colorbar(ax: Axes) -> Figure:
    """Add a colorbar for the load next to the axes, and return the figure."""
    from matplotlib.cm import ScalarMappable

    bar = get_figure(ax).colorbar(ScalarMappable(**make_load_colormap()), ax=ax, pad=0.02, aspect=15)
    bar.set_ticks(list(COLORBAR_TICKS), labels=list(COLORBAR_TICKS.values()), minor=False)
    bar.minorticks_off()
    return get_figure(ax)


def plot_gates(ax: Axes, loads: Mapping[str, Tensor]) -> Figure:
    """Draw one row per gate, divided into cells that show the relative loads `(e,)` of its experts.

    Cells show numbers if they are wide enough. A cross marks an expert without tokens.
    """
    max_experts = max(map(len, loads.values()))
    for y, load in enumerate(loads.values()):
        width = 72 * ax.get_window_extent().width / get_figure(ax).dpi / len(load)  # cell width in points
        edges, cells = (
            torch.linspace(0, max_experts, len(load) + 1),
            load.clamp(MIN_RELATIVE_LOAD, MAX_RELATIVE_LOAD).unsqueeze(0),
        )
        style = {"edgecolor": "white", "linewidth": min(width / 8, 1.5), **make_load_colormap()}
        ax.pcolormesh(edges.numpy(), [y - 0.5, y + 0.5], cells.numpy(), **style)
        for left, value in zip(edges.tolist(), load.tolist(), strict=False):
            text, size = (f"{value:.2f}", 8) if value else ("×", min(width, 14))
            if width > MIN_NUMBER_WIDTH or not value:
                color = "black" if 0.4 < value < 2.5 else "white"
                middle = left + max_experts / len(load) / 2
                ax.text(middle, y, text, size=size, color=color, ha="center", va="center")
    ax.set(ylim=(len(loads) - 0.5, -0.5), xlabel="expert")
    ticks = range(0, max_experts, max(max_experts // 16, 1))
    ax.set_xticks([tick + 0.5 for tick in ticks], map(str, ticks))
    ax.set_yticks(range(len(loads)), [layer.removesuffix(".gate") for layer in loads], parse_math=False)
    return add_colorbar(ax)


def plot_steps(ax: Axes, edges: Sequence[float], loads: Tensor, num_inner: int) -> Figure:
    """Draw the relative loads `(e, s)` of one gate over its steps. `edges` contains the step boundaries. Horizontal
    lines separate blocks of `num_inner` experts."""
    y = [expert - 0.5 for expert in range(len(loads) + 1)]
    ax.pcolormesh(
        edges, y, loads.clamp(MIN_RELATIVE_LOAD, MAX_RELATIVE_LOAD).numpy(), rasterized=True, **make_load_colormap()
    )
    ax.set(ylim=(y[-1], y[0]), xlabel="step", ylabel="expert")
    ax.hlines(y[num_inner:-1:num_inner], edges[0], edges[-1], color="black", linewidth=0.8)
    ax.locator_params(integer=True, min_n_ticks=1, nbins=10)
    return add_colorbar(ax)
