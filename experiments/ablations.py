"""Ablations of the mixture with 32 experts: each variant changes one setting, and all variants use the same seeds.

    python -m experiments.ablations --processes 2           # run it again to resume after an interruption
    python -m experiments.ablations --report                # report finished runs only
    python -m experiments.ablations --of balance            # compare balancing methods, in full-length runs

The model is the smallest of `scaling`, with a single learning rate. The table shows each variant's difference from the
baseline for each seed. A difference that is smaller than its deviation over the seeds is not evidence of an effect.
"""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from .language_model.report import format_rows
from .scaling import RECORDS, base_settings
from .scaling_plan import VARIANTS, Record, Run, final_bits
from .scaling_runs import Records, train_all
from .text import load_text

AS_IT_IS = next(iter(VARIANTS))


class Question(NamedTuple):
    """Variants to compare, of which the first is the baseline, and the settings of their runs."""

    variants: tuple[str, ...]
    learning_rate: float
    steps: int
    records: str


QUESTIONS = {
    "changes": Question(
        (AS_IT_IS, "balance0", "balance0.1", "capacity", "shared", "slow_experts", "fast_experts"),
        learning_rate=0.01,
        steps=500,
        records="ablations.jsonl",
    ),
    # `scaling` has already run the baseline and recorded it in this file.
    "balance": Question(
        (AS_IT_IS, "balance0", "bias", "quantile"), learning_rate=0.02, steps=3000, records="scaling_0.07m.jsonl"
    ),
}


class Plan:
    """Runs every variant with one seed before the next seed."""

    def __init__(self, variants: Collection[str], seeds: Collection[int], learning_rate: float, steps: int):
        self.variants, self.seeds = variants, seeds
        self.all_runs = [Run(variant, seed, learning_rate, steps) for seed in seeds for variant in variants]

    def runs(self, finished: Mapping[Run, Record]) -> list[Run]:
        """Return all runs, regardless of which are finished."""
        return self.all_runs


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    records = Records(args.records, base_settings("0.07m"))
    plan = Plan(QUESTIONS[args.of].variants, args.seeds, args.learning_rate, args.steps)
    if not args.report:
        text = load_text()
        records.check_text(text.digest)
        try:
            train_all(plan, records, text, args.out, args.processes)
        except KeyboardInterrupt:
            print(f"\nstopped; run the same command again to resume from {args.records} and {args.out}")
            return 130
    print(table(plan, records.finished))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. Their defaults depend on the question, `--of`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--of", choices=tuple(QUESTIONS), default="changes", help="the comparison to run")
    question = QUESTIONS[first.parse_known_args(argv)[0].of]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[first],
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of checkpoints")
    parser.add_argument("--records", type=Path, default=RECORDS / question.records)
    parser.add_argument("--report", action="store_true", help="report finished runs without training")
    parser.add_argument("--processes", type=int, default=1, help="number of parallel runs, one core each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=question.learning_rate)
    parser.add_argument("--steps", type=int, default=question.steps)
    return parser.parse_args(argv)


def table(plan: Plan, finished: Mapping[Run, Record]) -> str:
    """Tabulate the baseline's held-out bits and each variant's difference, by seed, with mean and deviation."""
    header = ("variant", *(f"seed {seed}" for seed in plan.seeds), "mean", "deviation", "busiest ÷ mean", "dropped")
    rows: list[tuple[str, ...]] = [header]
    bits = {(run.model, run.seed): final_bits(finished[run]) for run in plan.all_runs if run in finished}
    for variant in plan.variants:
        values = {seed: bits[variant, seed] for seed in plan.seeds if (variant, seed) in bits}
        if variant != AS_IT_IS:
            values = {seed: value - bits[AS_IT_IS, seed] for seed, value in values.items() if (AS_IT_IS, seed) in bits}
        if values:
            rows.append((VARIANTS[variant].label, *row(plan, variant, values, finished)))
    return format_rows(rows)


def row(plan: Plan, variant: str, values: Mapping[int, float], finished: Mapping[Run, Record]) -> tuple[str, ...]:
    sign = "" if variant == AS_IT_IS else "+"
    cells = (f"{values[seed]:{sign}.4f}" if seed in values else "" for seed in plan.seeds)
    deviation = f"{stdev(values.values()):.4f}" if len(values) > 1 else ""
    own = [finished[run] for run in plan.all_runs if run.model == variant and run in finished]
    busiest, dropped = (mean(record[name] for record in own) for name in ("busiest", "dropped"))
    return (*cells, f"{mean(values.values()):{sign}.4f}", deviation, f"{busiest:.2f}", f"{dropped:.1%}")


if __name__ == "__main__":
    sys.exit(main())
