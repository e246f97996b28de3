"""What `scaling` trains: models of equal active parameters, and in which order their runs come.

The plan reads what is finished: a run at a model's best learning rate is wanted once that model's sweep is complete.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .language_model.settings import Settings

Record = dict[str, Any]  # what a finished run leaves: see scaling_runs.py
SWEEP_SEED = 0


class Model(NamedTuple):
    """A model of the comparison. `width` gives the hidden units that work on one byte, for a dim.

    `dense_share` is the length of the dense run that it is upcycled from, over that of the dense model's long runs; 0:
    it is trained from scratch.
    """

    label: str
    kind: str  # "dense" or "moe"
    num_experts: int
    width: Callable[[int], int]
    dense_share: float = 0

    def options(self, dim: int) -> dict[str, Any]:
        """Those of `Settings` that make this model, in a transformer of `dim`."""
        return dict(models=(self.kind,), num_experts=self.num_experts, width=self.width(dim))


# A feed-forward layer has 13 dim² active parameters, its router's included: the more experts, the larger the router and
# the narrower the two experts of a byte. At dim 32 that is 13,312; the dense layer has 139 hidden units, 13,344
# parameters. The wide one has 2,059, as many parameters as 32 experts and their router have: it is the twin of two wide
# experts, both chosen.
# The upcycled mixture has 16 copies of the dense layer, an expert half of one: its two experts have one hidden unit
# more than that layer, and the router comes on top. A step takes 1.05 times the operations of the dense model's.
MODELS = {
    "dense": Model("dense", "dense", 32, lambda dim: 4 * dim),
    "moe8": Model("8 experts", "moe", 8, lambda dim: 4 * dim + 8),
    "moe32": Model("32 experts", "moe", 32, lambda dim: 4 * dim),
    "moe128": Model("128 experts", "moe", 128, lambda dim: 4 * dim - 32),
    "upcycled": Model("32 experts, upcycled", "moe", 32, lambda dim: 4 * dim + 12, dense_share=0.5),
    "wide": Model("dense, 15 times as wide", "dense", 2, lambda dim: 64 * dim + 10),
}


class Variant(NamedTuple):
    """One thing of the 32 experts changed: see ablations.py."""

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
    """One training: all that tells it from the others of a plan. `dense_*` are of the run that it is upcycled from."""

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
        """The dense run that it is upcycled from; None: it begins from scratch."""
        return Run("dense", self.seed, self.dense_rate, self.dense_steps) if self.dense_steps else None

    def settings(self, base: Settings) -> Settings:
        """The settings of this run; those that all runs share are `base`'s."""
        own = {"seed": self.seed, "learning_rate": self.learning_rate, "steps": self.steps}
        if self.model in MODELS:
            return replace(base, **MODELS[self.model].options(base.dim), **own)
        return replace(base, **MODELS["moe32"].options(base.dim), **VARIANTS[self.model].options, **own)


class Stage(NamedTuple):
    """Runs that are wanted together: `share` is their length over that of the dense model's long runs.

    With `rates` they are a sweep of the learning rate with at least so many rates, of one seed; without, they have the
    best rate that is known.
    """

    model: str
    share: float
    seeds: tuple[int, ...] = (0,)
    rates: int | None = None


class Plan:
    """The runs of `stages`, in their order, for long runs of `steps` and sweeps that begin at `learning_rate`."""

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
        """All runs that can begin by now, each once: their settings are known, and what they start from is finished."""
        runs = dict.fromkeys(run for stage in self.stages for run in self._runs_of(stage, finished))
        return [run for run in runs if run.start is None or run.start in finished]

    def best_rate(self, model: str, finished: Mapping[Run, Record]) -> float | None:
        """The rate whose half and double are both worse, at the longest runs that show it; None if none do."""
        for length in sorted(self.sweep_lengths(model), reverse=True):
            losses = sweep(model, length, finished)
            best = min(losses, key=losses.__getitem__, default=None)
            if best is not None and {best / 2, best * 2} <= losses.keys():
                return best
        return None

    def rate_so_far(self, model: str, finished: Mapping[Run, Record]) -> float | None:
        """The rate of the lowest loss in the longest sweep that has begun with more than one rate; its half and double
        need not be known yet."""
        sweeps = [sweep(model, length, finished) for length in sorted(self.sweep_lengths(model), reverse=True)]
        begun = [losses for losses in sweeps if losses]
        losses = next((losses for losses in begun if len(losses) > 1), begun[0] if begun else {})
        return min(losses, key=losses.__getitem__, default=None)

    def sweep_lengths(self, model: str) -> list[int]:
        """The lengths at which a model's learning rate is swept."""
        return sorted({self.length(stage) for stage in self.stages if stage.model == model and stage.rates})

    def length(self, stage: Stage) -> int:
        """Steps of a stage's runs."""
        return max(1, round(stage.share * self.steps))

    def dense_steps(self, model: str) -> int:
        """Steps of the dense run that a model is upcycled from."""
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
    """Held-out bits per byte by learning rate, of a model's finished runs of a length and the sweep's seed."""
    runs = [run for run in finished if (run.model, run.seed, run.steps) == (model, SWEEP_SEED, length)]
    return {run.learning_rate: final_bits(finished[run]) for run in runs}


def rates_to_try(first: float, losses: Mapping[float, float], least: int) -> list[float]:
    """The learning rates that a sweep wants as far as is known: it goes by factors of two, to both sides of the best.

    Args:
        first: where it begins.
        losses: what is known, by rate.
        least: so many rates at least, though fewer have shown the best one; 1 is the first one alone.
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
    """Held-out bits per byte at the end of a run."""
    return record["held_out"][-1][1]
