"""Pictures of routing: the load of experts over layers or over training, and a text coloured by expert.

They need matplotlib, the extra `plot`. `RoutingStats.report` shows both on one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats import Record, RoutingStats, relative
from mixture_of_experts.stats.colours import (
    FAINT,
    INK,
    OTHERS,
    STRIKE,
    TICKS,
    clipped,
    ink_on,
    load_colours,
    need_matplotlib,
)
from mixture_of_experts.stats.fates import Fate, expert_colours, fates_of, share, texts_of, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOM_FOR_NUMBERS = 24  # cells have numbers if a gate has at most so many experts
STRETCHES = 120  # most columns of load over training
CELL_WIDTH, LINE_HEIGHT = 0.105, 0.25  # inches of a character in a new figure
LEGEND_WIDTH = 1.4  # inches of an entry of the legend


def plot_load(
    stats: RoutingStats, layer: str | None = None, *, requested: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw a heat map of the experts' load relative to a balanced one: of all gates, or of one gate over training.

    Without `layer` there is a row for each gate and a cell for each expert, over all remembered steps; a cross marks an
    expert without a token. With `layer` there is a row for each expert and a column for each step or stretch of steps.

    Args:
        stats: what `track_routing` recorded.
        layer: one of `stats.layers`.
        requested: show the load that the router asked for, before capacity, instead of what the experts computed.
        ax: axes to draw in; by default those of a new figure.

    Returns:
        The axes; their `.figure` is the figure.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: nothing was recorded.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.stats import track_routing
        >>> moe = MoE(dim=8, num_experts=4)
        >>> with track_routing(moe) as stats:
        ...     out, aux_loss = moe(torch.randn(2, 16, 8))
        >>> plot_load(stats).figure.savefig("load.png")  # doctest: +SKIP
    """
    need_matplotlib()
    title = "Load requested of the experts, before capacity" if requested else "Load of the experts"
    if layer is None:
        ax = _draw_gates(stats, requested, ax)
    else:
        stats.last(layer)  # raises an error if there is no such gate
        ax = _draw_training(stats.records(layer), requested, ax)
        title = f"{short(layer)}: {title[0].lower()}{title[1:]}"
    ax.set_title(title, parse_math=False)  # a name may have a $
    return ax


def plot_routing(
    tokens: str | bytes | Sequence[str],
    routing: Routing,
    *,
    group: int | None = None,
    width: int = 80,
    ax: Axes | None = None,
) -> Axes:
    """Draw a text in which every token has the colour of its expert.

    The expert of a token is the one of largest weight among those that compute it. A token is underlined if its first
    choice was full and another expert computes it. A token that no expert computes is struck through on white. If there
    are more experts than colours, those with the fewest tokens share grey.

    Args:
        tokens: the texts of the tokens. In a string every character is a token, in bytes every byte.
        routing: the routing of one gate, `routing = gate(x)`.
        group: the group of the routing that has these tokens, an index (in a layer without a `group_size` a group is
            one sequence). A routing of one group needs none.
        width: characters of a line.
        ax: axes to draw in; by default those of a new figure.

    Returns:
        The axes; their `.figure` is the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: tokens and routing do not fit.

    Example:
        >>> import torch
        >>> from mixture_of_experts import Top2Gating
        >>> gate = Top2Gating(dim=8, num_gates=4)
        >>> routing = gate(torch.randn(1, 5, 8))
        >>> plot_routing("hello", routing).figure.savefig("hello.png")  # doctest: +SKIP
    """
    need_matplotlib()
    texts = texts_of(tokens)
    fates = fates_of(routing, group)
    if len(texts) != len(fates):
        raise ValueError(f"there are {len(texts)} tokens, but the routing has {len(fates)} in a group: give one each")
    spans, lines = lay_out([visible(text) for text in texts], [text.endswith("\n") for text in texts], width)
    colours = expert_colours(fates, routing.num_experts)
    legend = [*legend_of_experts(fates, colours), *legend_of_marks(fates)]
    if ax is None:
        inches = max(width * CELL_WIDTH, 2 * LEGEND_WIDTH)
        rows = -(-len(legend) // int(inches / LEGEND_WIDTH))
        ax = new_axes(inches + 0.3, lines * LINE_HEIGHT + 0.2 * rows + 0.3)
        size = font_size(width * CELL_WIDTH, width)
    else:
        inches = ax.get_window_extent().width / ax.figure.dpi
        size = font_size(inches, width)
    for span, fate in zip(spans, fates, strict=True):
        if fate.kind != "padding":
            _draw_token(ax, span, fate, colours, size)
    ax.set(xlim=(-0.2, width + 0.2), ylim=(lines, -0.1))
    ax.axis("off")
    _add_legend(ax, legend, int(inches / LEGEND_WIDTH))
    return ax


# Load


def relative_load(record: Record, requested: bool) -> Tensor:
    """`(e,)` load relative to a balanced one; outer-major for a second level."""
    return (record.relative_requested if requested else record.relative_load).flatten()


def short(layer: str) -> str:
    return layer.removesuffix(".gate")


def _draw_gates(stats: RoutingStats, requested: bool, ax: Axes | None) -> Axes:
    """Draw a row for each gate. An outer expert is as wide as all its inner experts."""
    records = [record for record in map(stats.total, stats.layers) if record.forwards]
    behind = {stats.level_one(record.layer): record.load.shape[-1] for record in records}
    width = max(record.load.numel() for record in records)
    if ax is None:
        ax = new_axes(2.6 + max(0.5 * min(width, ROOM_FOR_NUMBERS), 3.0), 1.3 + 0.42 * len(records))
    for y, record in enumerate(records):
        _draw_experts(ax, y, relative_load(record, requested), behind.get(record.layer, 1))
    ax.set(xlim=(-0.5, width - 0.5), ylim=(len(records) - 0.5, -0.5), xlabel="expert")
    ax.set_yticks(range(len(records)), [short(record.layer) for record in records], parse_math=False)
    ax.set_xticks(range(0, width, 1 if width <= ROOM_FOR_NUMBERS else 8))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _add_colour_bar(ax)
    return ax


def _draw_experts(ax: Axes, y: int, load: Tensor, cell: int) -> None:
    """Draw one gate's experts as cells, with numbers if there is room for them."""
    edges = [cell * expert - 0.5 for expert in range(len(load) + 1)]
    mesh = ax.pcolormesh(edges, [y - 0.5, y + 0.5], clipped(load).unsqueeze(0).numpy(), **load_colours())
    mesh.set(edgecolor="white", linewidth=1.5)
    for expert, value in enumerate(load.tolist()):
        x = cell * (expert + 0.5) - 0.5
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": INK if 0.4 < value < 2.5 else "white"}
        if value == 0:
            ax.text(x, y, "×", fontsize=14, weight="bold", **style)
        elif len(load) <= ROOM_FOR_NUMBERS:
            ax.text(x, y, f"{value:.2f}", fontsize=8, **style)


def _draw_training(records: Sequence[Record], requested: bool, ax: Axes | None) -> Axes:
    """Draw one gate over its steps."""
    counts = torch.stack([(record.requested if requested else record.load).flatten() for record in records])
    stretches = counts.tensor_split(min(STRETCHES, len(counts)))
    load = torch.stack([clipped(relative(stretch.sum(dim=0))) for stretch in stretches], dim=1)  # (e, stretches)
    num_experts = len(load)
    begins = torch.tensor([0, *map(len, stretches)]).cumsum(0) + records[0].step - 0.5
    if ax is None:
        ax = new_axes(8.0, 1.3 + max(0.22 * min(num_experts, 32), 1.3))
    ax.pcolormesh(begins.numpy(), torch.arange(num_experts + 1).numpy() - 0.5, load.numpy(), **load_colours())
    ax.set(xlabel="step", ylabel="expert", ylim=(num_experts - 0.5, -0.5))
    ax.set_yticks(range(0, num_experts, 1 if num_experts <= 16 else 8))
    shape = records[0].load.shape
    for outer in range(1, shape[0] if len(shape) == 2 else 1):
        ax.axhline(outer * shape[1] - 0.5, color=INK, linewidth=0.8)
    _add_colour_bar(ax)
    return ax


def _add_colour_bar(ax: Axes) -> None:
    from matplotlib.cm import ScalarMappable

    bar = ax.figure.colorbar(ScalarMappable(**load_colours()), ax=ax, ticks=list(TICKS), pad=0.02, aspect=15)
    bar.ax.set_yticklabels(list(TICKS.values()))
    bar.minorticks_off()
    bar.ax.axhline(1, color=INK, linewidth=1.2)
    bar.outline.set_visible(False)


# Text


class Span(NamedTuple):
    """A token's place: its first character and its line."""

    text: str
    x: int
    y: int


def lay_out(texts: Sequence[str], ends_line: Sequence[bool], width: int) -> tuple[list[Span], int]:
    """Place the tokens in lines of at most `width` characters; return their places and the number of lines."""
    spans, x, y = [], 0, 0
    for text, ends in zip(texts, ends_line, strict=True):
        if x and x + len(text) > width:
            x, y = 0, y + 1
        spans.append(Span(text, x, y))
        x, y = (0, y + 1) if ends else (x + len(text), y)
    return spans, y + (x > 0)


def font_size(inches: float, width: int) -> float:
    """The size at which `width` characters of a monospaced font fill so many inches; at most 12 points."""
    return min(72 * inches / width / 0.66, 12)


def _draw_token(ax: Axes, span: Span, fate: Fate, colours: dict[int, str], size: float) -> None:
    from matplotlib.patches import Rectangle

    unseen = fate.kind == "unseen"
    colour = "white" if unseen else colours.get(fate.expert, OTHERS)
    length, low = len(span.text), span.y + 0.86
    ax.add_patch(Rectangle((span.x, span.y + 0.04), length, 0.92, facecolor=colour, linewidth=0))
    if length > 1:  # a hair of white between tokens
        ax.plot([span.x] * 2, [span.y + 0.04, span.y + 0.96], color="white", linewidth=0.8, zorder=2)
    ink = FAINT if unseen else ink_on(colour)
    for i, sign in enumerate(span.text):
        ax.text(span.x + i + 0.5, span.y + 0.54, sign, family="monospace", fontsize=size, color=ink,
                ha="center", va="center_baseline", parse_math=False)  # fmt: skip
    if unseen:
        ax.plot([span.x + 0.1, span.x + length - 0.1], [span.y + 0.5] * 2, color=STRIKE, linewidth=1.1)
    if fate.kind == "other":
        ax.plot([span.x + 0.12, span.x + length - 0.12], [low] * 2, color=ink, linewidth=1.3)


def legend_of_experts(fates: Sequence[Fate], colours: dict[int, str]) -> list[Any]:
    """Entries for the experts that have a colour, with their shares of the tokens."""
    from matplotlib.patches import Patch

    tokens = [fate for fate in fates if fate.kind != "padding"]
    computed = [fate.expert for fate in tokens if fate.kind != "unseen"]
    handles = [
        Patch(color=colour, label=share(f"expert {expert}", computed.count(expert), tokens))
        for expert, colour in colours.items()
    ]
    others = sum(expert not in colours for expert in computed)
    return [*handles, Patch(color=OTHERS, label=share("others", others, tokens))] if others else handles


def legend_of_marks(fates: Sequence[Fate]) -> list[Any]:
    """Entries for the marks that occur, with their shares of the tokens."""
    from matplotlib.lines import Line2D

    tokens = [fate for fate in fates if fate.kind != "padding"]
    marks = {"other": (INK, "first full"), "unseen": (STRIKE, "no expert")}
    counts = {kind: sum(fate.kind == kind for fate in tokens) for kind in marks}
    return [
        Line2D([], [], color=colour, linewidth=1.5, label=share(name, counts[kind], tokens))
        for kind, (colour, name) in marks.items()
        if counts[kind]
    ]


def _add_legend(ax: Axes, handles: list[Any], columns: int) -> None:
    style = {"frameon": False, "fontsize": 8, "handlelength": 1.2, "columnspacing": 1.2}
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=max(columns, 1), **style)


def new_axes(width: float, height: float) -> Axes:
    """Axes of a new figure of so many inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]
