"""More parameters at constant computation learn faster: mixtures of 8, 32 and 128 experts against a dense model.

    python -m experiments.scaling --processes 2             # hours; interrupted, the same command goes on
    python -m experiments.scaling --only dense moe32        # a part of it
    python -m experiments.scaling --size 0.3m               # a larger transformer, more text
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

from .language_model.settings import Settings, add_options, settings_from
from .scaling_picture import draw
from .scaling_plan import MODELS, Plan
from .scaling_report import tables
from .scaling_runs import Records, train_all
from .sizes import SIZES
from .text import load_text

FIXED = ("models", "num_experts", "width", "seed", "learning_rate", "steps")  # the plan decides them
RECORDS = Path(__file__).parent / "records"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    base = settings_from(args)  # its learning rate is each run's own
    plan = Plan(SIZES[args.size].stages, args.steps, args.learning_rate, args.only)
    records = Records(args.records, base)
    if not args.report:
        text = load_text(args.text, SIZES[args.size].packages)
        print(text)
        records.check_text(text.digest)
        try:
            train_all(plan, records, text, args.out, args.processes)
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


def base_settings(size: str) -> Settings:
    """The settings that all runs of the documented results share, at a size."""
    return settings_from(parse_arguments(["--size", size]))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; what is not given is the size's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--size", choices=tuple(SIZES), default="0.07m", help="millions of active parameters")
    name = first.parse_known_args(argv)[0].size
    size = SIZES[name]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[first],
    )
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to learn from in place of Python's")
    parser.add_argument(
        "--out", type=Path, default=Path(f"runs/scaling_{name}"), help="folder of checkpoints and the picture"
    )
    parser.add_argument("--records", type=Path, default=RECORDS / f"scaling_{name}.jsonl", help="of the finished runs")
    parser.add_argument("--picture", type=Path, help="where the picture goes; by default into --out")
    parser.add_argument(
        "--times", type=Path, default=RECORDS / f"step_times_{name}.json", help="what step_times.py wrote"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="the models to train")
    parser.add_argument("--steps", type=int, default=size.steps, help="of the dense runs: the mixtures' are shares")
    parser.add_argument("--learning-rate", type=float, default=size.learning_rate, help="where every sweep begins")
    add_options(parser, without=FIXED)
    parser.set_defaults(router="mixtral", **size.settings)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
