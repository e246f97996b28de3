"""More parameters at constant computation learn faster: mixtures of 8, 32 and 128 experts against a dense model.

    python -m experiments.scaling --processes 2             # hours; interrupted, the same command goes on
    python -m experiments.scaling --only dense moe32        # a part of it
    python -m experiments.scaling --report                  # tables and picture of what is finished

All models have equal active parameters and see the same batches; `wide` has as many in all as `moe32`. `upcycled` goes
on from the dense model's runs of half the length. Each is trained at its own best learning rate: half and double of it
are worse. A record of every finished run is appended to --records; unfinished ones, and those to be upcycled, leave
checkpoints in --out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from corpus import load_corpus
from settings import Settings, add_options, settings_from

from .scaling_picture import draw
from .scaling_plan import MODELS, Plan
from .scaling_report import tables
from .scaling_runs import Records, train_all

FIXED = ("models", "num_experts", "width", "seed", "learning_rate", "steps")  # the plan decides them
RECORDS = Path(__file__).parent / "records"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    base = settings_from(args)  # its learning rate is each run's own
    plan = Plan(args.steps, args.learning_rate, args.only)
    records = Records(args.records, base)
    if not args.report:
        corpus = load_corpus(args.text)
        print(corpus)
        records.check_text(corpus.digest)
        try:
            train_all(plan, records, corpus, args.out, args.processes)
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on from {args.records} and {args.out}")
            return 130
    report(plan, records, args)
    return 0


def report(plan: Plan, records: Records, args: argparse.Namespace) -> None:
    """Print the tables and draw the picture of what is finished."""
    times = json.loads(args.times.read_text()) if args.times.exists() else {}
    print(tables(plan, records.finished, times))
    picture = args.picture or args.out / "scaling.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(plan, records.finished, times, picture)
    print(f"wrote {picture}")


def base_settings() -> Settings:
    """The settings that all runs of the documented results share."""
    return settings_from(parse_arguments([]))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to learn from in place of Python's")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder of checkpoints and the picture")
    parser.add_argument("--records", type=Path, default=RECORDS / "scaling.jsonl", help="of the finished runs")
    parser.add_argument("--picture", type=Path, help="where the picture goes; by default into --out")
    parser.add_argument("--times", type=Path, default=RECORDS / "step_times.json", help="what step_times.py wrote")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="the models to train")
    parser.add_argument("--steps", type=int, default=12_500, help="of the dense runs; the mixtures' are shares of it")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="where the sweep of every model begins")
    add_options(parser, without=FIXED)
    parser.set_defaults(router="mixtral", dim=32, layers=3, heads=2, eval_every=250, checkpoint_every=250)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
