"""Settings of a run, which also define the programs' options, their help and the check for resumed runs."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from .routers import ROUTERS


def option(default: Any, help: str, *, free: bool = False, **argument: Any) -> Any:
    """Define a setting. `free` settings may change when a run is resumed. `argument` is passed to argparse."""
    return field(default=default, metadata={"free": free, "argument": {"help": help, **argument}})


@dataclass(frozen=True)
class Settings:
    """All settings that affect the results of a run."""

    models: tuple[str, ...] = option(
        ("dense", "moe"), "the models to train, on the same batches", nargs="+", choices=("dense", "moe"), type=str
    )
    router: str = option("mixtral", "the router of the mixture model", choices=tuple(ROUTERS))
    num_experts: int = option(32, "experts in each mixture layer")
    dim: int = option(32, "model dimension")
    width: int = option(128, "hidden units of a feed-forward layer that process each byte")
    layers: int = option(3, "transformer blocks")
    heads: int = option(2, "attention heads")
    context: int = option(256, "bytes per window")
    batch_size: int = option(8, "windows per step")
    steps: int = option(2000, "number of optimizer steps")
    learning_rate: float = option(0.01, "peak learning rate, after the warm-up")
    expert_rate: float = option(1.0, "experts' learning rate, relative to other parameters")
    balance: float | None = option(None, "load-balancing loss coefficient; default: the recipe's", type=float)
    seed: int = option(0, "seed of the initial parameters and the batch order")
    eval_every: int = option(250, "steps between evaluations on the held-out files")
    eval_windows: int = option(256, "number of fixed held-out windows to evaluate")
    dtype: str = option("float32", "bfloat16 runs the model under autocast", choices=("float32", "bfloat16"))
    device: str = option("cpu", "cpu or cuda", free=True)
    compile: bool = option(False, "compile the models with torch.compile", free=True)
    checkpoint_every: int = option(100, "steps between checkpoints", free=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and f.name not in ("seed", "balance") and value <= 0:
                raise ValueError(f"{f.name} is {value}: use a number above 0")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim is {self.dim}: use a multiple of {2 * self.heads}, twice the number of heads")


def add_options(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """Add an option for every setting, except those in `without`."""
    for f in fields(Settings):
        if f.name in without:
            continue
        flag = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", **f.metadata["argument"])
        else:
            argument = {"type": type(f.default), "default": f.default, **f.metadata["argument"]}
            parser.add_argument(flag, **argument)


def settings_from(args: argparse.Namespace, **more: Any) -> Settings:
    """Create settings from the command line and from `more`."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if "models" in given:
        given["models"] = tuple(given["models"])
    return Settings(**given, **more)
