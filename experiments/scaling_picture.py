"""The picture of what `scaling` found: held-out loss over seconds, and when it is equal to the dense model's."""

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .scaling_plan import MODELS, SWEEP_SEED, Plan, Record
from .scaling_report import (
    Finished,
    Times,
    at_best_rate,
    equal_shares,
    models_of,
    seconds_of,
    total_cost,
)

# Okabe and Ito's colours: told apart by all eyes
COLOURS = {
    "dense": "#0072B2",
    "moe8": "#E69F00",
    "moe32": "#D55E00",
    "moe128": "#CC79A7",
    "upcycled": "#009E73",
    "wide": "#000000",
}
MARKERS = {"dense": "o", "moe8": "D", "moe32": "s", "moe128": "^", "upcycled": "v", "wide": "X"}  # the same, in grey
FIRST_SHARE = 0.04  # of the long runs' steps: before, all curves are high and steep


def draw(plan: Plan, finished: Finished, times: Times, path: Path) -> None:
    """Draw what is finished to a file."""
    figure, (over_seconds, shares) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_losses(over_seconds, plan, finished, seconds_of(times))
    over_seconds.set(xlabel="steps × seconds of a step on one core", ylabel="held-out bits per byte")
    over_seconds.set_title("each mark is the end of a run; dotted: where the dense model ends", fontsize=9)
    over_seconds.legend(fontsize=9, loc="upper right")
    draw_shares(shares, plan, finished, times)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(axes: Axes, plan: Plan, finished: Finished, step_cost: dict[str, float]) -> None:
    """A mark where every run of a model at its best rate ends, and a line through the means of its lengths.

    A mean has all seeds of the dense model's long runs. A model without two means shows the curves of its runs.
    """
    groups = at_best_rate(plan, finished)
    target = groups.get(("dense", plan.steps), {})
    for model in models_of(plan):
        ends = {steps: bits for (name, steps), bits in groups.items() if name == model}
        if not ends or model not in step_cost:
            continue
        cost = partial(total_cost, plan, model, step_cost=step_cost)
        points = [(cost(steps), bits) for steps, seeds in ends.items() for bits in seeds.values()]
        whole = {steps: bits for steps, bits in ends.items() if bits.keys() == target.keys()}
        means = [(cost(steps), np.mean([*bits.values()])) for steps, bits in whole.items()]
        rate = plan.rate_so_far(model, finished)
        for run, record in finished.items() if len(means) < 2 else ():
            if (run.model, run.learning_rate, run.seed) == (model, rate, SWEEP_SEED):
                steps, bits = curve(record, plan.steps * FIRST_SHARE)
                axes.plot(cost(steps), bits, color=COLOURS[model], linewidth=1.3, alpha=0.7)
        line = zip(*means, strict=True) if means else ([], [])
        look = {"color": COLOURS[model], "marker": MARKERS[model], "markersize": 5.5}
        axes.plot(*line, **look, linewidth=2.2, label=MODELS[model].label)
        axes.plot(*zip(*points, strict=True), **look, linestyle="")
    if target:
        axes.axhline(float(np.mean(list(target.values()))), color=COLOURS["dense"], linestyle=":", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 1e6:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}" if low > 1 else "{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def curve(record: Record, first: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps and held-out bits of a run, from step `first` on."""
    steps, bits = np.array(record["held_out"]).T
    return steps[steps >= first], bits[steps >= first]


def draw_shares(axes: Axes, plan: Plan, finished: Finished, times: Times) -> None:
    """The share of the dense model's steps, and of its seconds, over the number of experts; a dot for every seed."""
    shares = {model: equal_shares(plan, finished, model) for model in MODELS if model.startswith("moe")}
    shares = {model: found for model, found in shares.items() if found}
    experts = {model: int(model.removeprefix("moe")) for model in shares}
    for label, colour, dashes, ratio in (
        ("steps", "#000000", "-", dict.fromkeys(shares, 1.0)),
        ("seconds", "#009E73", "--", {model: own["step"] / times["dense"]["step"] for model, own in times.items()}),
    ):
        means = [(1, 1.0)]
        for model, found in shares.items():
            if model not in ratio:
                continue
            values = {seed: equal.share * ratio[model] for seed, equal in found.items()}
            means.append((experts[model], float(np.mean(list(values.values())))))
            for seed, equal in found.items():
                marker = {"": "o", "<": "v", ">": "^"}[equal.sign]  # the share is below or above this one
                axes.plot(experts[model], values[seed], marker, color=colour, markersize=5)
        if len(means) > 1:
            line = {"color": colour, "linestyle": dashes, "label": f"share of the dense model's {label}"}
            axes.plot(*zip(*means, strict=True), **line)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([1, *experts.values()], ["dense", *map(str, experts.values())])
    axes.set_yticks([1, 1 / 2, 1 / 4, 1 / 8], ["1", "1/2", "1/4", "1/8"])
    axes.set(xlabel="experts in a layer, two a byte", ylabel="until the dense model's final loss")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)
