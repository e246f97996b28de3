"""The settings of a run: one definition for the programs' options, their help and the check of a resumed run."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from .routers import ROUTERS


def option(default: Any, help: str, *, free: bool = False, **argument: Any) -> Any:
    """A setting with its help; a `free` one may change when a run is resumed. `argument` goes to argparse."""
    return field(default=default, metadata={"free": free, "argument": {"help": help, **argument}})


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of a run."""

    models: tuple[str, ...] = option(
        ("dense", "moe"), "the models to train, on the same batches", nargs="+", choices=("dense", "moe"), type=str
    )
    router: str = option("mixtral", "the router of the mixture model", choices=tuple(ROUTERS))
    num_experts: int = option(32, "experts in each mixture layer")
    dim: int = option(32, "features of a byte's representation")
    width: int = option(128, "hidden units of a feed-forward layer that work on one byte")
    layers: int = option(3, "transformer blocks")
    heads: int = option(2, "attention heads")
    context: int = option(256, "bytes in a window")
    batch_size: int = option(8, "windows in a step")
    steps: int = option(2000, "steps of the optimizer")
    learning_rate: float = option(0.01, "its peak, after the warm-up")
    expert_rate: float = option(1.0, "the experts' learning rate over that of the other parameters")
    balance: float | None = option(None, "weight of the balancing loss; by default the recipe says", type=float)
    seed: int = option(0, "decides the initial parameters and the order of the batches")
    eval_every: int = option(250, "steps between two evaluations on the held-out files")
    eval_windows: int = option(256, "windows of the held-out files that are evaluated, always the same ones")
    dtype: str = option("float32", "bfloat16 runs the model under autocast", choices=("float32", "bfloat16"))
    device: str = option("cpu", "cpu or cuda", free=True)
    compile: bool = option(False, "compile the models with torch.compile", free=True)
    checkpoint_every: int = option(100, "steps between two checkpoints", free=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and f.name not in ("seed", "balance") and value <= 0:
                raise ValueError(f"{f.name} is {value}: give a number above 0")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim is {self.dim}: give a multiple of {2 * self.heads}, twice the number of heads")


def add_options(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """One option for every setting but those in `without`."""
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
    """The settings that the command line gives, and `more` that it does not."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if "models" in given:
        given["models"] = tuple(given["models"])
    return Settings(**given, **more)
