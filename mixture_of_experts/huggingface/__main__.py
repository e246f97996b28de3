"""`python -m mixture_of_experts.huggingface upcycle IN OUT` and `export IN OUT`: change saved models."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mixture_of_experts.huggingface.folders import export_folder, upcycle_folder

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """A size such as `5GB` in bytes."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?B?)", text.upper())
    unit = None if found is None else UNITS.get(found[2])
    if found is None or unit is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 500MB or 5GB")
    return int(found[1]) * unit


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mixture_of_experts.huggingface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (
        ("upcycle", "replace the feed-forward networks of a saved model by experts that are copies of them"),
        ("export", "write a saved model with experts as Mixtral, Qwen2-MoE or Qwen3-MoE of transformers"),
    ):
        command = commands.add_parser(name, help=does, description=does)
        command.add_argument("source", type=Path, metavar="IN", help="folder with config.json and safetensors")
        command.add_argument("target", type=Path, metavar="OUT", help="new folder")
        command.add_argument("--max-shard-size", type=size, default="5GB", help="most bytes of a file of weights")
        if name == "upcycle":
            command.add_argument("--num-experts", type=int, default=8)
            command.add_argument("--k", type=int, default=2, help="experts of a token")
            command.add_argument("--layers", type=int, nargs="+", help="numbers of blocks; by default all")
            command.add_argument("--granularity", type=int, default=1, help="cut each copy into so many experts")
            command.add_argument("--shared-expert", type=int, help="hidden units of a shared expert")
            command.add_argument("--noise", type=float, default=0.0, help="noise, in deviations of the weights")
            command.add_argument("--redraw", type=float, default=0.0, help="share of hidden units to redraw")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; after an error, printed to standard error, it is 1."""
    settings = vars(read(arguments))
    run = {"upcycle": upcycle_folder, "export": export_folder}[settings.pop("command")]
    try:
        run(**settings)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
