"""Defines the models that `scaling` trains, which have equal active parameters, and the order of their runs.

The plan depends on the finished runs: a model's runs at its best learning rate start when its sweep is complete.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .language_model.settings import Settings

Record = dict[str, Any]  # the result of a finished run: see scaling_runs.py
SWEEP_SEED = 0


class Model(NamedTuple):
    """A model in the comparison. `width` maps a dim to the number of hidden units that process each byte.

    For upcycled models, `dense_share` is the length of the initial dense run, divided by that of the dense model's long
    runs. If it is 0, the model is trained from scratch.
    """

    label: str
    kind: str  # "dense" or "moe"
    num_experts: int
    width: Callable[[int], int]
    dense_share: float = 0

    def options(self, dim: int) -> dict[str, Any]:
        """Return the `Settings` that define this model, in a transformer of dimension `dim`."""
        return dict(models=(self.kind,), num_experts=self.num_experts, width=self.width(dim))


# A feed-forward layer has 13 dim² active parameters, including its router. With more experts, the router is larger and
# the two experts that each byte uses are narrower. At dim 32, a layer has 13,312 active parameters. The dense layer has
# 139 hidden units and 13,344 parameters. The wide layer has 2,059 hidden units, and as many parameters as 32 experts
# and their router. It is the dense twin of a layer with two wide experts, both of which are always chosen.
# The upcycled mixture contains 16 copies of the dense layer, each split into two experts. Two experts have one hidden
# unit more than the dense layer, and the router adds parameters. A step takes 1.05x the operations of a dense step.
MODELS = {
    "dense": Model("dense", "dense", 32, lambda dim: 4 * dim),
    "moe8": Model("8 experts", "moe", 8, lambda dim: 4 * dim + 8),
    "moe32": Model("32 experts", "moe", 32, lambda dim: 4 * dim),
    "moe128": Model("128 experts", "moe", 128, lambda dim: 4 * dim - 32),
    "upcycled": Model("32 experts, upcycled", "moe", 32, lambda dim: 4 * dim + 12, dense_share=0.5),
    "wide": Model("dense, 15 times as wide", "dense", 2, lambda dim: 64 * dim + 10),
}


class Variant(NamedTuple):
    """A model with 32 experts and one changed setting: see ablations.py."""

    label: str
    options: dict[str, Any]


VARIANTS = {
    "moe32": Variant("balance 0.01, dropless", {}),
    "balance0": Variant("balance 0", dict(balance=0.0)),
    "balance0.1": Variant("balance 0.1", dict(balance=0.1)),
    "capacity": Variant("capacity 1.0 in training", dict(router="mixtral_capacity")),
    "shared": Variant("one of the two experts shared", dict(router="mixtral_shared")),
    "slow_experts": Variant("experts' rate halved", dict(expert_rate=0.5)),
    "fast_experts": Variant("experts' rate doubled", dict(expert_rate=2.0)),
    "bias": Variant("expert bias by sign, balance 0", dict(router="mixtral_bias")),
    "quantile": Variant("expert bias by quantile, balance 0", dict(router="mixtral_quantile")),
}


class Run(NamedTuple):
    """The settings that distinguish a run from others in a plan. `dense_*` describe its initial dense run."""

    model: str
    seed: int
    learning_rate: float
    steps: int
    dense_rate: float = 0
    dense_steps: int = 0

    def __str__(self) -> str:
        after = f"_after_{self.start}" if self.start else ""
        return f"{self.model}_seed{self.seed}_lr{self.learning_rate:g}_steps{self.steps}{after}"

    @property
    def start(self) -> "Run | None":
        """The dense run that this run is upcycled from, or None if it starts from scratch."""
        return Run("dense", self.seed, self.dense_rate, self.dense_steps) if self.dense_steps else None

    def settings(self, base: Settings) -> Settings:
        """Return the settings of this run. `base` contains the settings that all runs share."""
        own = {"seed": self.seed, "learning_rate": self.learning_rate, "steps": self.steps}
        if self.model in MODELS:
            return replace(base, **MODELS[self.model].options(base.dim), **own)
        return replace(base, **MODELS["moe32"].options(base.dim), **VARIANTS[self.model].options, **own)


class Stage(NamedTuple):
    """Runs that belong together. `share` is their length divided by that of the dense model's long runs.

    With `rates`, the runs are a learning-rate sweep over at least this many rates, with one seed. Without `rates`, they
    use the best known rate.
    """

    model: str
    share: float
    seeds: tuple[int, ...] = (0,)
    rates: int | None = None


class Plan:
    """The ordered runs of `stages`. Long runs have `steps` steps, and sweeps start at `learning_rate`."""

    def __init__(
        self,
        stages: Collection[Stage],
        steps: int,
        learning_rate: float,
        models: Collection[str] = tuple(MODELS),
    ):
        self.steps, self.learning_rate = steps, learning_rate
        starts = {"dense" for model in models if MODELS[model].dense_share}
        self.stages = [stage for stage in stages if stage.model in starts.union(models)]

    def runs(self, finished: Mapping[Run, Record]) -> list[Run]:
        """Return all runs that can start now, without duplicates.

        Their settings are known, and the run that they start from is finished.
        """
        runs = dict.fromkeys(run for stage in self.stages for run in self._runs_of(stage, finished))
        return [run for run in runs if run.start is None or run.start in finished]

    def best_rate(self, model: str, finished: Mapping[Run, Record]) -> float | None:
        """Return the rate whose half and double are both worse, from the longest such sweep, or None if unknown."""
        for length in sorted(self.sweep_lengths(model), reverse=True):
            losses = sweep(model, length, finished)
            best = min(losses, key=losses.__getitem__, default=None)
            if best is not None and {best / 2, best * 2} <= losses.keys():
                return best
        return None

    def rate_so_far(self, model: str, finished: Mapping[Run, Record]) -> float | None:
        """Return the rate with the lowest loss in the longest sweep that has finished more than one rate.

        Half and double this rate need not be finished yet.
        """
        sweeps = [sweep(model, length, finished) for length in sorted(self.sweep_lengths(model), reverse=True)]
        begun = [losses for losses in sweeps if losses]
        losses = next((losses for losses in begun if len(losses) > 1), begun[0] if begun else {})
        return min(losses, key=losses.__getitem__, default=None)

    def sweep_lengths(self, model: str) -> list[int]:
        """Return the run lengths of a model's learning-rate sweeps, in steps."""
        return sorted({self.length(stage) for stage in self.stages if stage.model == model and stage.rates})

    def length(self, stage: Stage) -> int:
        """Return the number of steps in each of a stage's runs."""
        return max(1, round(stage.share * self.steps))

    def dense_steps(self, model: str) -> int:
        """Return the number of steps in the dense run that a model is upcycled from."""
        return round(MODELS[model].dense_share * self.steps)

    def _runs_of(self, stage: Stage, finished: Mapping[Run, Record]) -> list[Run]:
        start: tuple[float, int] | tuple[()] = ()
        if dense_steps := self.dense_steps(stage.model):
            dense_rate = self.best_rate("dense", finished)
            if dense_rate is None:
                return []
            start = (dense_rate, dense_steps)
        length = self.length(stage)
        if stage.rates:
            rates = rates_to_try(self.learning_rate, sweep(stage.model, length, finished), stage.rates)
            return [Run(stage.model, SWEEP_SEED, rate, length, *start) for rate in rates]
        best = self.best_rate(stage.model, finished)
        return [] if best is None else [Run(stage.model, seed, best, length, *start) for seed in stage.seeds]


def sweep(model: str, length: int, finished: Mapping[Run, Record]) -> dict[float, float]:
    """Return held-out bits per byte by rate, from a model's finished runs of this length with the sweep seed."""
    runs = [run for run in finished if (run.model, run.seed, run.steps) == (model, SWEEP_SEED, length)]
    return {run.learning_rate: final_bits(finished[run]) for run in runs}


def rates_to_try(first: float, losses: Mapping[float, float], least: int) -> list[float]:
    """Return the learning rates that a sweep needs so far. It steps by factors of two, to both sides of the best rate.

    Args:
        first: rate at which the sweep starts.
        losses: known losses by rate.
        least: minimum number of rates, even if fewer rates determine the best one. If 1, only `first` is tried.
    """
    if first not in losses or least == 1:
        return [first]
    best = min(losses, key=losses.__getitem__)
    rates = list(dict.fromkeys([*losses, best / 2, best * 2]))
    if len(rates) == len(losses) and len(rates) < least:
        low, high = min(losses), max(losses)
        rates.append(low / 2 if losses[low] < losses[high] else high * 2)
    return rates


def final_bits(record: Record) -> float:
    """Return the held-out bits per byte at the end of a run."""
    return record["held_out"][-1][1]
