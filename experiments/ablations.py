"""What makes the mixture of 32 experts train well: one thing changed at a time, the same seeds for all.

    python -m experiments.ablations --processes 2           # interrupted, the same command goes on
    python -m experiments.ablations --report                # the table of what is finished
    python -m experiments.ablations --of balance            # how experts are kept balanced, in runs of full length

The model is the smallest of `scaling`, at one learning rate. The table has each variant's difference from the model as
it is, seed by seed: what is smaller than its deviation over the seeds is not shown to be there.
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
    """Variants that are compared, the first of them the model as it is, and in which runs."""

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
    # The model as it is has run there for `scaling`.
    "balance": Question(
        (AS_IT_IS, "balance0", "bias", "quantile"), learning_rate=0.02, steps=3000, records="scaling_0.07m.jsonl"
    ),
}


class Plan:
    """Every variant with a seed, then with the next."""

    def __init__(self, variants: Collection[str], seeds: Collection[int], learning_rate: float, steps: int):
        self.variants, self.seeds = variants, seeds
        self.all_runs = [Run(variant, seed, learning_rate, steps) for seed in seeds for variant in variants]

    def runs(self, finished: Mapping[Run, Record]) -> list[Run]:
        """All runs, whatever is finished."""
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
            print(f"\nstopped; the same command goes on from {args.records} and {args.out}")
            return 130
    print(table(plan, records.finished))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; what is not given is the question's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--of", choices=tuple(QUESTIONS), default="changes", help="what is compared")
    question = QUESTIONS[first.parse_known_args(argv)[0].of]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[first],
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of checkpoints")
    parser.add_argument("--records", type=Path, default=RECORDS / question.records)
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=question.learning_rate)
    parser.add_argument("--steps", type=int, default=question.steps)
    return parser.parse_args(argv)


def table(plan: Plan, finished: Mapping[Run, Record]) -> str:
    """Held-out bits as it is, and the difference of each variant for each seed, with mean and deviation."""
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
