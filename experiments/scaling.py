"""Compare mixtures of 8, 32 and 128 experts with a dense model: more parameters learn faster at equal computation.

    python -m experiments.scaling --processes 2             # hours; run it again to resume after an interruption
    python -m experiments.scaling --only dense moe32        # train only some models
    python -m experiments.scaling --size 0.3m               # a larger transformer, with more text
    python -m experiments.scaling --report                  # report finished runs, with tables and a picture

All models see the same batches. Their active parameters are equal, except those of `wide`, which has as many parameters
as `moe32` in total. `upcycled` continues the dense model's runs of half the length. Each model is trained at its best
learning rate, for which half and double are both worse. A record of every finished run is appended to --records.
Unfinished runs, and runs that will be upcycled, keep checkpoints in --out.
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

FIXED = ("models", "num_experts", "width", "seed", "learning_rate", "steps")  # set by the plan
RECORDS = Path(__file__).parent / "records"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    base = settings_from(args)  # each run sets its own learning rate
    plan = Plan(SIZES[args.size].stages, args.steps, args.learning_rate, args.only)
    records = Records(args.records, base)
    if not args.report:
        text = load_text(args.text, SIZES[args.size].packages)
        print(text)
        records.check_text(text.digest)
        try:
            train_all(plan, records, text, args.out, args.processes)
        except KeyboardInterrupt:
            print(f"\nstopped; run the same command again to resume from {args.records} and {args.out}")
            return 130
    report(plan, records, args)
    return 0


def report(plan: Plan, records: Records, args: argparse.Namespace) -> None:
    """Print the tables and draw the picture of the finished runs."""
    times = json.loads(args.times.read_text()) if args.times.exists() else {}
    print(tables(plan, records.finished, times))
    picture = args.picture or args.out / "scaling.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(plan, records.finished, times, picture)
    print(f"wrote {picture}")


def base_settings(size: str) -> Settings:
    """Return the settings that all documented runs of a size share."""
    return settings_from(parse_arguments(["--size", size]))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. Their defaults depend on the size."""
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
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to train on, instead of Python's")
    parser.add_argument(
        "--out", type=Path, default=Path(f"runs/scaling_{name}"), help="folder for checkpoints and the picture"
    )
    parser.add_argument("--records", type=Path, default=RECORDS / f"scaling_{name}.jsonl", help="file of finished runs")
    parser.add_argument("--picture", type=Path, help="file to draw; by default in --out")
    parser.add_argument(
        "--times", type=Path, default=RECORDS / f"step_times_{name}.json", help="file that step_times.py wrote"
    )
    parser.add_argument("--report", action="store_true", help="report finished runs without training")
    parser.add_argument("--processes", type=int, default=1, help="number of parallel runs, one core each")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="the models to train")
    parser.add_argument("--steps", type=int, default=size.steps, help="of the dense runs; mixtures take a share")
    parser.add_argument("--learning-rate", type=float, default=size.learning_rate, help="where each sweep starts")
    add_options(parser, without=FIXED)
    parser.set_defaults(router="mixtral", **size.settings)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
