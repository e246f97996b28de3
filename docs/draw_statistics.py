"""Trains the experiments' language model for about a minute and draws the pictures of `docs/statistics.md`.

    python docs/draw_statistics.py [--steps 250] [--router switch] [--out docs/images] [--report routing.html]

`report.png` is a browser's picture of the report:

    chromium --headless --hide-scrollbars --force-device-scale-factor=0.75 --window-size=1240,1400 \\
        --screenshot=docs/images/report.png routing.html

Needs matplotlib and tqdm (the extra `examples`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tqdm import trange

from mixture_of_experts.stats import RoutingStats, track_routing

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from experiments.language_model.corpus import Batches, load_corpus  # noqa: E402
from experiments.language_model.routers import ROUTERS  # noqa: E402
from experiments.language_model.settings import Settings  # noqa: E402
from experiments.language_model.trainee import make_trainee  # noqa: E402
from experiments.language_model.training import learning_rate_at  # noqa: E402


def train(settings: Settings) -> RoutingStats:
    """What the routers of the example's mixture model did in some steps."""
    batches = Batches(load_corpus().train, settings.context, settings.batch_size, settings.seed)
    trainee = make_trainee("moe", settings)
    with track_routing(trainee.model, keep=settings.steps) as stats:
        for step in trange(settings.steps, disable=None):
            trainee.train_step(batches.next(), learning_rate_at(step, settings))
            stats.step()
    return stats


def draw_layers(stats: RoutingStats) -> Figure:
    """What the routers ask for over what the experts compute."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 5.4), layout="constrained")
    stats.plot(requested=True, ax=above)
    stats.plot(ax=below)
    above.set_title("Requested of the experts, before capacity")
    below.set_title("Load of the experts")
    return figure


def draw_training(stats: RoutingStats) -> Figure:
    """The first and the last layer over training."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, layout="constrained")
    for layer, ax in zip((stats.layers[0], stats.layers[-1]), axes, strict=True):
        stats.plot(layer, requested=True, ax=ax)
        ax.set_title(f"{layer}: requested of the experts")
    axes[0].set_xlabel("")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--router", default="switch", choices=tuple(ROUTERS))
    parser.add_argument("--out", type=Path, default=DOCS / "images")
    parser.add_argument("--report", type=Path, help="write the report here")
    args = parser.parse_args()
    few = {"num_experts": 8, "dim": 64, "width": 256, "layers": 4, "heads": 4}  # that a picture can tell apart
    training = {"steps": args.steps, "context": 512, "batch_size": 4, "learning_rate": 3e-3}
    settings = Settings(models=("moe",), router=args.router, **few, **training)
    stats = train(settings)
    print(stats.summary())

    figures = {"load_layers": draw_layers(stats), "load_training": draw_training(stats)}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = args.out / f"{name}.png"
        figure.savefig(path, dpi=130, facecolor="white")
        print(f"wrote {path}")
    if args.report is not None:
        name = f"{args.router}, {settings.num_experts} experts, learns Python"
        stats.report(args.report, name=name)
        print(f"wrote {args.report}")


if __name__ == "__main__":
    main()
