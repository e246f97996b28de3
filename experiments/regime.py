"""Where a mixture wins and where it loses: its share of the dense model's training time, for runs of various lengths.

    python -m experiments.regime --picture docs/images/regime.png    # table and picture in docs/experiments.md

For each model size in `scaling` and each length of the dense runs, this program computes the share of the dense model's
steps that a mixture needs to reach the same final loss. It reports the share for each seed, in steps and in seconds.
The number of steps is interpolated between the runs, linearly in the logarithm of the steps. The length of a run is
expressed in bytes read per active parameter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws to files, without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .scaling import RECORDS, base_settings
from .scaling_picture import COLOURS
from .scaling_plan import MODELS, Plan
from .scaling_report import Equal, Times, at_best_rate, equal_shares
from .scaling_runs import Records
from .sizes import SIZES

MIXTURES = ("moe8", "moe32", "moe128")
ASIDE = {"moe8": 0.955, "moe32": 1.0, "moe128": 1.045}  # shifts markers so that they do not overlap
STYLES = {"0.07m": ("o", "-"), "0.3m": ("s", "--"), "1m": ("D", ":")}


class Point(NamedTuple):
    """A mixture, compared with dense runs of one length. `ratio` compares their seconds per step, if measured."""

    size: str
    model: str
    dense_steps: int
    active: int  # active parameters of the dense model
    bytes_per_parameter: float
    shares: dict[int, Equal]
    ratio: float | None

    @property
    def exact(self) -> bool:
        """Whether the share is known exactly for all seeds, by interpolation between finished runs."""
        return not any(share.sign for share in self.shares.values())

    @property
    def share(self) -> float:
        """The share of steps, averaged over the seeds."""
        return mean(share.share for share in self.shares.values())


def points(size: str, records: Path) -> list[Point]:
    """Return the points of all finished runs of a size, by mixture and length."""
    settings = base_settings(size)
    finished = Records(records / f"scaling_{size}.jsonl", settings).finished
    plan = Plan(SIZES[size].stages, SIZES[size].steps, SIZES[size].learning_rate)
    times_file = records / f"step_times_{size}.json"
    times: Times = json.loads(times_file.read_text()) if times_file.exists() else {}
    active = {run.model: record["active_parameters"] for run, record in finished.items()}
    lengths = sorted(steps for model, steps in at_best_rate(plan, finished) if model == "dense")
    found = []
    for model in MIXTURES:
        ratio = times[model]["step"] / times["dense"]["step"] if model in times else None
        for steps in lengths:
            shares = equal_shares(plan, finished, model, steps)
            read = steps * settings.batch_size * settings.context / active["dense"]
            if shares:
                found.append(Point(size, model, steps, active["dense"], read, shares, ratio))
    return found


def markdown(found: Sequence[Point]) -> list[str]:
    """Return the lines of the table in docs/experiments.md, for points whose share is exactly known."""
    lines = []
    for point in found:
        if point.exact and point.ratio:
            values = sorted(share.share for share in point.shares.values())
            seeds = f"{values[0]:.2f} to {values[-1]:.2f}" if len(values) > 1 else "one seed"
            experts, active = MODELS[point.model].num_experts, f"{round(point.active, -3):,}"
            length = f"{point.dense_steps:,} | {point.bytes_per_parameter:.0f}"
            shares = f"{point.share:.2f} | {seeds} | {point.ratio:.2f} | {point.share * point.ratio:.2f}"
            lines.append(f"| {active} | {experts} | {length} | {shares} |")
    return lines


def draw(found: Sequence[Point], path: Path) -> None:
    """Draw the share of seconds over the length, with a dot for each seed and a line through the means."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for size in SIZES:
        for model in MIXTURES:
            draw_line(axes, [point for point in found if (point.size, point.model) == (size, model) and point.ratio])
    axes.axhline(1, color=COLOURS["dense"], linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1 / 8), max(high, 2.2))
    axes.set_yticks([1 / 8, 1 / 4, 1 / 2, 1, 2], ["1/8", "1/4", "1/2", "1", "2"])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    note = dict(transform=axes.get_yaxis_transform(), color=COLOURS["dense"], ha="right")
    axes.text(0.99, 1.04, "above: the mixture loses", va="bottom", **note)
    axes.text(0.99, 0.96, "below: it wins", va="top", **note)
    axes.set(
        xlabel="how long the dense model is trained: bytes read for each parameter in use",
        ylabel="seconds until the dense model's final loss:\nmixture ÷ dense model",
    )
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_line(axes: Axes, line: Sequence[Point]) -> None:
    """Draw the points of one mixture of one size. A triangle points up if the share is only known to be larger.

    No point is drawn if the mixture's shortest run already has a lower loss, because this says little.
    """
    if all(share.sign == "<" for point in line for share in point.shares.values()):
        return
    colour, (marker, style) = COLOURS[line[0].model], STYLES[line[0].size]
    aside = ASIDE[line[0].model]
    means = [(point.bytes_per_parameter * aside, point.share * (point.ratio or 0)) for point in line if point.exact]
    label = f"{MODELS[line[0].model].label}, {line[0].size.removesuffix('m')} million parameters in use"
    form = f"{marker}{style}" if len(means) > 1 else marker
    axes.plot(*zip(*means, strict=True) if means else ([], []), form, color=colour, linewidth=2, label=label)
    for point in line:
        for share in point.shares.values():
            if share.sign != "<":
                shape = "^" if share.sign else marker
                place = point.bytes_per_parameter * aside
                axes.plot(place, share.share * (point.ratio or 0), shape, color=colour, markersize=4)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    found = [point for size in SIZES for point in points(size, args.records)]
    print("\n".join(markdown(found)))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(found, args.picture)
    print(f"wrote {args.picture}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of scaling's and step_times' output")
    parser.add_argument("--picture", type=Path, default=Path("runs/regime.png"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
