"""`python -m mixture_of_experts.huggingface upcycle IN OUT` and `export IN OUT`: saved models, folder to folder."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mixture_of_experts.huggingface.folders import export_folder, upcycle_folder

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """`5GB` in bytes."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?B?)", text.upper())
    unit = None if found is None else UNITS.get(found[2])
    if found is None or unit is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 500MB or 5GB")
    return int(found[1]) * unit


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mixture_of_experts.huggingface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (
        ("upcycle", "put experts that are copies of the dense networks into a saved model"),
        ("export", "write a model with experts as one of transformers: Mixtral, Qwen2-MoE, Qwen3-MoE"),
    ):
        command = commands.add_parser(name, help=does, description=does)
        command.add_argument("source", type=Path, metavar="IN", help="folder with config.json and safetensors")
        command.add_argument("target", type=Path, metavar="OUT", help="folder that is not there yet")
        command.add_argument("--max-shard-size", type=size, default="5GB", help="of a file of weights")
        if name == "upcycle":
            command.add_argument("--num-experts", type=int, default=8)
            command.add_argument("--k", type=int, default=2, help="experts of a token")
            command.add_argument("--layers", type=int, nargs="+", help="numbers of blocks; by default all")
            command.add_argument("--granularity", type=int, default=1, help="an expert is one of so many slices")
            command.add_argument("--shared-expert", type=int, help="hidden units that every token passes")
            command.add_argument("--noise", type=float, default=0.0, help="in deviations of the weights")
            command.add_argument("--redraw", type=float, default=0.0, help="share of hidden units drawn anew")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what is wrong with what was asked for goes to standard error, with status 1."""
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
