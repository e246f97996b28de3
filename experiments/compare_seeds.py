"""Compare dense and mixture models over several seeds and the same sweep of learning rates for both.

    python -m experiments.compare_seeds                     # 9 runs; interrupted, the same command goes on
    python -m experiments.compare_seeds --seeds 0 1 --learning-rates 2e-3 4e-3 --steps 300

Each run trains both models on the same batches, as `train_lm.py` does, and leaves its numbers in a folder of its own;
finished runs are not repeated, an interrupted one is resumed. At the end `compare_seeds.json` holds every run, and two
tables show every seed: the held-out bits per byte at each learning rate, and the difference at each model's best one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .language_model.corpus import Corpus, load_corpus
from .language_model.report import LABELS, format_rows, write_result
from .language_model.settings import Settings, add_options, settings_from
from .language_model.training import CHECKPOINT, Training

Results = dict[tuple[str, float], list[float]]  # (model, learning rate) -> held-out bits per byte of every seed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    corpus = load_corpus(args.text)
    print(corpus)
    runs = []
    try:
        for seed in args.seeds:
            for learning_rate in args.learning_rates:
                settings = settings_from(args, seed=seed, learning_rate=learning_rate)
                runs.append(finished_run(settings, corpus, args.out / f"seed{seed}_lr{learning_rate:g}"))
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from what is in {args.out}")
        return 130
    (args.out / "compare_seeds.json").write_text(json.dumps(runs, indent=2))
    results = collect(runs)
    print(f"\n{sweep_table(results, args.seeds)}\n\n{best_table(results, args.seeds)}")
    print(f"wrote {args.out / 'compare_seeds.json'}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to learn from in place of Python's")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_seeds"), help="folder of all runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[5e-3, 1e-2, 2e-2])
    add_options(parser, without=("seed", "learning_rate"))
    return parser.parse_args(argv)


def finished_run(settings: Settings, corpus: Corpus, out: Path) -> dict[str, Any]:
    """The numbers of one run: those of its folder if it has them, else trained now, from its checkpoint if any."""
    print(f"\nseed {settings.seed}, learning rate {settings.learning_rate:g}: {out}")
    training = Training(settings, corpus, out)
    if (out / CHECKPOINT).exists():
        training.load()
    training.run()
    return write_result(training)


def collect(runs: Sequence[dict[str, Any]]) -> Results:
    """Held-out bits per byte by model and learning rate, seeds in the order of the runs."""
    results: Results = {}
    for run in runs:
        for result in run["results"]:
            key = (result["model"], run["settings"]["learning_rate"])
            results.setdefault(key, []).append(result["held_out_bits_per_byte"])
    return results


def sweep_table(results: Results, seeds: Sequence[int]) -> str:
    """Every model and learning rate in a line, every seed in a column."""
    header = ("model", "learning rate", *(f"seed {seed}" for seed in seeds), "mean")
    rows = [
        (LABELS[model], f"{rate:g}", *(f"{value:.4f}" for value in values), f"{mean(values):.4f}")
        for (model, rate), values in sorted(results.items())
    ]
    return f"Held-out bits per byte\n{format_rows([header, *rows])}"


def best_table(results: Results, seeds: Sequence[int]) -> str:
    """Each model at the learning rate of its best mean, and mixture minus dense for every seed."""
    header = ("at its best rate", "learning rate", *(f"seed {seed}" for seed in seeds), "mean", "deviation")
    rows: list[tuple[str, ...]] = [header]
    best: dict[str, list[float]] = {}
    for model in sorted({model for model, _ in results}):
        rate = min((rate for name, rate in results if name == model), key=lambda rate: mean(results[model, rate]))
        values = results[model, rate]
        rows.append(best_row(LABELS[model], f"{rate:g}", values))
        best[model] = values
    if len(best) == 2:
        pairs = zip(best["moe"], best["dense"], strict=True)
        rows.append(best_row("difference", "", [moe - dense for moe, dense in pairs]))
    return format_rows(rows)


def best_row(label: str, rate: str, values: Sequence[float]) -> tuple[str, ...]:
    deviation = f"{stdev(values):.4f}" if len(values) > 1 else "-"
    return (label, rate, *(f"{value:.4f}" for value in values), f"{mean(values):.4f}", deviation)


if __name__ == "__main__":
    sys.exit(main())
