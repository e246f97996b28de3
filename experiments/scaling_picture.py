"""Draws the results of `scaling`: held-out loss over seconds of training."""

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .scaling_plan import MODELS, Plan
from .scaling_report import (
    Finished,
    Times,
    at_best_rate,
    models_of,
    seconds_of,
    total_cost,
)

# Okabe and Ito's palette, which is safe for color-blind readers
COLOURS = {
    "dense": "#0072B2",
    "moe8": "#E69F00",
    "moe32": "#D55E00",
    "moe128": "#CC79A7",
}
MARKERS = {"dense": "o", "moe8": "D", "moe32": "s", "moe128": "^"}  # also distinguish the models in grayscale


def draw(plan: Plan, finished: Finished, times: Times, path: Path) -> None:
    """Draw the finished runs of the dense model and the mixtures to a file."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    draw_losses(axes, plan, finished, seconds_of(times))
    axes.set(xlabel="seconds of training on one core", ylabel="held-out bits per byte")
    axes.legend(fontsize=9, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_losses(axes: Axes, plan: Plan, finished: Finished, step_cost: dict[str, float]) -> None:
    """Draw a marker for the end of each run at its model's best rate, and a line through the mean of each length.

    A length has a mean only if all seeds of the dense model's long runs have finished.
    """
    groups = at_best_rate(plan, finished)
    target = groups.get(("dense", plan.steps), {})
    for model in models_of(plan):
        ends = {steps: bits for (name, steps), bits in groups.items() if name == model}
        if not ends or model not in step_cost or model not in COLOURS:
            continue
        cost = partial(total_cost, plan, model, step_cost=step_cost)
        points = [(cost(steps), bits) for steps, seeds in ends.items() for bits in seeds.values()]
        whole = {steps: bits for steps, bits in ends.items() if bits.keys() == target.keys()}
        means = [(cost(steps), np.mean([*bits.values()])) for steps, bits in whole.items()]
        line = zip(*means, strict=True) if means else ([], [])
        look = {"color": COLOURS[model], "marker": MARKERS[model], "markersize": 5}
        axes.plot(*line, **look, linewidth=2, label=MODELS[model].label)
        axes.plot(*zip(*points, strict=True), **look, linestyle="")
    if target:
        axes.axhline(float(np.mean(list(target.values()))), color=COLOURS["dense"], linestyle=":", linewidth=1)
        note = dict(transform=axes.get_yaxis_transform(), color=COLOURS["dense"], fontsize=9)
        axes.text(0.01, np.mean(list(target.values())), "the dense model's final loss", va="bottom", **note)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 1e6:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}" if low > 1 else "{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
