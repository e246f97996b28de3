"""Command-line tools for saved models: `python -m mixture_of_experts.huggingface COMMAND IN OUT`, where COMMAND is
`convert`, `quantize`, `upcycle`, `prune`, `merge` or `export`."""

from __future__ import annotations

import argparse
import ast
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mixture_of_experts.huggingface.lora.folders import merge_folder
from mixture_of_experts.huggingface.pruning.folders import prune_folder, read_scores
from mixture_of_experts.huggingface.saving.converting import convert_folder, quantize_folder
from mixture_of_experts.huggingface.saving.folders import export_folder, upcycle_folder
from mixture_of_experts.huggingface.saving.layer_settings import GATE_CLASSES, GateFactory
from mixture_of_experts.ops.int4 import BLOCKS, GROUP_SIZES, PORTABLE_BLOCK

DTYPES = ("float32", "bfloat16", "float16")
BLOCK_HELP = (
    "layout of 4-bit weights: 64 is memory-mapped on CPUs with AVX-512, 32 on those with AVX2; others are rearranged "
    "in memory"
)
BYTES_PER_UNIT = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Parse a size such as `5GB` and return it in bytes."""
    found = re.fullmatch(r"(0*[1-9]\d*)\s*([KMG]B|)", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, but got {text!r}")
    return int(found[1]) * BYTES_PER_UNIT[found[2]]


def parse_gate(text: str) -> GateFactory:
    """Parse a gate expression such as `TopKGating(k=4, score="sigmoid")` and return a function that constructs the
    gate."""
    try:
        call: Any = ast.parse(text, mode="eval").body
        settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        kind = GATE_CLASSES[call.func.id]
        if call.args:
            raise ValueError("positional arguments are not supported")
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError):
        example = 'TopKGating(k=4, score="sigmoid")'
        raise argparse.ArgumentTypeError(
            f"expected a gate such as {example}, but got {text!r}; the available gates are {', '.join(GATE_CLASSES)}"
        ) from None
    return lambda dim, num_experts: kind(dim, num_experts, **settings)


def parse_dtype(text: str) -> torch.dtype:
    """Parse the name of a dtype, such as `bfloat16`."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected the dtype to be one of {', '.join(DTYPES)}, but got {text!r}")
    return getattr(torch, text)


def parse_scores(text: str) -> Any:
    """Return "random" unchanged. Treat any other text as a path, and read scores or expert ids, keyed by gate name,
    from this file."""
    if text == "random":
        return text
    try:
        return read_scores(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_upcycle_options(add: Any) -> None:
    """Add the options of the `upcycle` command."""
    add("--num-experts", type=int, default=8, help="experts of a layer")
    add("--k", type=int, default=2, help="experts of a token, for the default gate")
    add("--gate", type=parse_gate, help="such as 'TopKGating(k=4, score=\"sigmoid\")'")
    add("--layers", type=int, nargs="+", help="numbers of blocks; by default all")
    add("--granularity", type=int, default=1, help="cut each copy into so many experts")
    add("--shared-expert", type=int, help="hidden units of a shared expert")
    add("--noise", type=float, default=0.0, help="noise, in deviations of the weights")
    add("--redraw", type=float, default=0.0, help="share of hidden units to redraw")
    add("--loss-coef", type=float, default=1e-2, help="coefficient of the balancing loss")
    add("--z-loss-coef", type=float, default=0.0, help="coefficient of the z-loss")


def add_convert_options(add: Any) -> None:
    """Add the options of the `convert` command."""
    add("--bits", type=int, choices=(8, 4), help="bits per weight of experts; by default not quantized")
    add_rounding_options(add)
    add("--block", type=int, choices=BLOCKS, help=f"{BLOCK_HELP}; by default that of this machine")


def add_quantize_options(add: Any) -> None:
    """Add the options of the `quantize` command."""
    add("--bits", type=int, default=8, choices=(8, 4), help="bits per weight of experts")
    add_rounding_options(add)
    add("--block", type=int, default=PORTABLE_BLOCK, choices=BLOCKS, help=BLOCK_HELP)


def add_rounding_options(add: Any) -> None:
    """Add the options that the `convert` and `quantize` commands share."""
    add("--group", type=int, default=64, choices=GROUP_SIZES, help="with 4 bits, number of inputs that share a step")
    add("--dtype", type=parse_dtype, help=f"dtype of weights, {', '.join(DTYPES)}; by default as stored")
    add("--loss-coef", type=float, help="coefficient of each layer's balancing loss; by default as saved")


def add_prune_options(add: Any) -> None:
    """Add the options of the `prune` command."""
    scores = "safetensors with the scores that expert_scores returned, or JSON with the ids to keep, by names of gates"
    add("--by", type=parse_scores, required=True, help=f"'random', or a file: {scores}")
    add("--keep", type=int, help="experts that each layer keeps; not needed with ids")


#: maps each command name to its function, its description, and the function that adds its options
COMMANDS: dict[str, tuple[Callable[..., object], str, Callable[[Any], None]]] = {
    "convert": (
        convert_folder,
        "convert a saved model, or a stock model with experts, so that its experts can be memory-mapped",
        add_convert_options,
    ),
    "quantize": (
        quantize_folder,
        "round the experts of a saved model, also of a stock model with experts, to 8 or 4 bits",
        add_quantize_options,
    ),
    "upcycle": (
        upcycle_folder,
        "replace the feed-forward networks of a saved model by experts that are copies of them",
        add_upcycle_options,
    ),
    "prune": (prune_folder, "remove experts of a saved model with experts of this package", add_prune_options),
    "merge": (
        merge_folder,
        "merge LoRA adapters into a saved model with experts of this package",
        lambda add: add("--adapter", type=Path, required=True, help="folder to which PEFT saved the adapters"),
    ),
    "export": (
        export_folder,
        "write a saved model with experts as a stock model: what convert read, or Mixtral, Qwen2-MoE or Qwen3-MoE",
        lambda add: None,
    ),
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mixture_of_experts.huggingface", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (run, description, add_options) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=description,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            argument_default=argparse.SUPPRESS,  # options that are not passed keep the function's defaults
        )
        command.set_defaults(run=run)
        add = command.add_argument
        add("source", type=Path, metavar="IN", help="folder with config.json and safetensors")
        add("target", type=Path, metavar="OUT", help="new folder")
        default_size = "5GB" if name in ("upcycle", "prune", "export") else "1GB"
        add("--max-shard-size", type=parse_size, default=default_size, help="most bytes of a file of weights")
        add_options(add)
    return parser.parse_args(arguments)


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Context manager that turns SIGTERM into SystemExit(143), so that the unfinished output folder is removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
        yield
        return

    def exit_once(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, exit_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. If the command fails, the error is printed to standard error and the
    status is 1.

    While the command is running, SIGTERM raises SystemExit.
    """
    settings = vars(parse_arguments(arguments))
    run = settings.pop("run")
    try:
        with exiting_on_sigterm():
            run(**settings)
    except (ImportError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
