"""Compare routers: the same model, batches and seed, one mixture after the other.

    python -m experiments.compare_routers                                   # top2, switch and mixtral
    python -m experiments.compare_routers --routers mixtral deepseek_v3 --steps 200

Every run leaves its numbers in a folder of its own. The table shows what a router costs and how it spreads the tokens:
load and dropped choices are of the last quarter of the steps, averaged over the layers.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mixture_of_experts.stats import RoutingStats, track_routing

from .language_model.corpus import Corpus, load_corpus
from .language_model.report import format_rows, write_result
from .language_model.routers import ROUTERS
from .language_model.settings import Settings, add_options, settings_from
from .language_model.training import Training


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    corpus = load_corpus(args.text)
    print(corpus)
    runs = []
    for router in args.routers:
        settings = settings_from(args, models=("moe",), router=router)
        runs.append(run_router(settings, corpus, args.out / router))
    print(f"\n{table(runs)}")
    (args.out / "compare_routers.json").write_text(json.dumps(runs, indent=2))
    print(f"wrote {args.out / 'compare_routers.json'}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to learn from in place of Python's")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_routers"), help="folder of all runs")
    parser.add_argument("--routers", nargs="+", choices=tuple(ROUTERS), default=["top2", "switch", "mixtral"])
    add_options(parser, without=("models", "router"))
    return parser.parse_args(argv)


def run_router(settings: Settings, corpus: Corpus, out: Path) -> dict[str, Any]:
    """Train the mixture with one router and say what came out."""
    print(f"\n{settings.router}: {out}")
    training = Training(settings, corpus, out)
    training.run(settings.steps - settings.steps // 4)
    with track_routing(training.trainees[0].model, when="training") as stats:
        training.run()
    result = write_result(training)
    return {"router": settings.router, **result["results"][0], **spread(stats)}


def spread(stats: RoutingStats) -> dict[str, float]:
    """Load of the busiest expert over the mean, and the shares dropped and unseen: means over the layers."""
    records = [stats.total(layer) for layer in stats.layers]
    return {
        "busiest_expert": mean(float(record.relative_load.max()) for record in records),
        "dropped": mean(record.dropped for record in records),
        "unseen": mean(record.unseen for record in records),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One line for each router."""
    header = ("router", "parameters", "active", "step", "busiest/mean", "dropped", "unseen", "held-out bits/byte")
    rows = [header] + [
        (
            run["router"],
            f"{run['total_parameters']:,}",
            f"{run['active_parameters']:,}",
            f"{1000 * run['step_seconds']:.0f} ms",
            f"{run['busiest_expert']:.2f}",
            f"{run['dropped']:.1%}",
            f"{run['unseen']:.1%}",
            f"{run['held_out_bits_per_byte']:.4f}",
        )
        for run in runs
    ]
    return format_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
