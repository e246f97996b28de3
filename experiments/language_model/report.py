"""Reports the results of a run as a table for the terminal and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, without a display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.image import AxesImage

from .trainee import Trainee
from .training import Training

COLOURS = {"dense": "#0072B2", "moe": "#D55E00"}  # Okabe and Ito's palette, safe for color-blind readers
LABELS = {"dense": "dense", "moe": "mixture of experts"}
RESULT = "result.json"
STRETCHES = 100  # maximum number of columns that show the load


def table(summaries: list[dict[str, Any]]) -> str:
    """Return a table with one line for each model."""
    header = ("model", "parameters", "active", "step", "training", "held-out bits/byte")
    rows = [header] + [
        (
            LABELS[summary["model"]],
            f"{summary['total_parameters']:,}",
            f"{summary['active_parameters']:,}",
            f"{1000 * summary['step_seconds']:.0f} ms",
            f"{summary['training_seconds']:.1f} s",
            f"{summary['held_out_bits_per_byte']:.4f}",
        )
        for summary in summaries
    ]
    return format_rows(rows)


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as lines with aligned columns. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_result(training: Training) -> dict[str, Any]:
    """Write a finished run's settings, results and held-out curves to `result.json`, and return them."""
    result = {
        "settings": asdict(training.settings),
        "corpus": training.corpus.digest,
        "torch": torch.__version__,
        "results": [trainee.summary() for trainee in training.trainees],
        "held_out": {trainee.name: trainee.history.held_out for trainee in training.trainees},
    }
    (training.out / RESULT).write_text(json.dumps(result, indent=2))
    return result


def draw(trainees: list[Trainee], path: Path) -> None:
    """Draw the loss curves of all models, and the expert loads of each mixture layer over training."""
    loads = [torch.stack(trainee.history.loads).numpy() for trainee in trainees]
    loads = [load for load in loads if load.size]  # dense models have no loads
    figure = plt.figure(figsize=(13 if loads else 7, 6.5), layout="constrained")
    halves = figure.subfigures(1, 1 + len(loads), squeeze=False)[0]
    draw_curves(halves[0].subplots(), trainees)
    for half, load in zip(halves[1:], loads, strict=True):
        draw_loads(half, load)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(axes: Axes, trainees: list[Trainee]) -> None:
    """Draw training losses as lines, and held-out losses as points joined by dashed lines."""
    for trainee in trainees:
        colour, label = COLOURS[trainee.name], LABELS[trainee.name]
        smooth = moving_average(np.array(trainee.history.train))
        axes.plot(np.arange(1, len(smooth) + 1), smooth, color=colour, alpha=0.6, label=f"{label}, training")
        steps, bits = zip(*trainee.history.held_out, strict=True)
        axes.plot(steps, bits, "o--", color=colour, label=f"{label}, held out: {bits[-1]:.3f}")
    axes.set(title="Loss", xlabel="step", ylabel="bits per byte")
    best = min(min(bits for _, bits in trainee.history.held_out) for trainee in trainees)
    axes.set_ylim(0.85 * best, min(8.0, 2.5 * best))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_loads(figure: SubFigure, loads: np.ndarray) -> None:
    """Draw a heat map of loads (steps, layers, experts) for each layer, as multiples of a balanced load."""
    all_axes = figure.subplots(loads.shape[1], 1, sharex=True, squeeze=False)[:, 0]
    images = [draw_load(axes, loads[:, layer]) for layer, axes in enumerate(all_axes)]
    for layer, axes in enumerate(all_axes):
        axes.set_ylabel(f"layer {layer + 1}\nexpert")
    all_axes[0].set_title("Load of every expert over training")
    all_axes[-1].set_xlabel("step")
    bar = figure.colorbar(images[0], ax=list(all_axes), ticks=[-2, -1, 0, 1, 2], shrink=0.8)
    bar.ax.set_yticklabels(["¼ or less", "½", "balanced", "2×", "4× or more"])


def draw_load(axes: Axes, loads: np.ndarray) -> AxesImage:
    """Draw one layer's loads (steps, experts). The color is log2(load / balanced load), and white is balanced."""
    steps, experts = loads.shape
    stretches = np.array_split(loads, min(STRETCHES, steps))
    share = np.stack([part.sum(0) / max(part.sum(), 1) * experts for part in stretches], axis=1)
    colour = np.log2(np.maximum(share, 1e-3))
    axes.set_yticks([0, experts - 1], ["1", str(experts)])
    return axes.imshow(
        colour,
        cmap="PuOr_r",
        vmin=-2,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(0.5, steps + 0.5, -0.5, experts - 0.5),
    )


def moving_average(values: np.ndarray, window: int = 10) -> np.ndarray:
    """Return the mean of each value and up to `window - 1` previous values."""
    sums = np.concatenate(([0.0], values.cumsum()))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
