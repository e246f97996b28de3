"""Tabulates the results of `scaling`: sweeps, seeds, and how soon each mixture matches the dense model."""

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import mean
from typing import Any, NamedTuple

from .language_model.report import format_rows
from .scaling_plan import MODELS, SWEEP_SEED, Plan, Record, Run, final_bits, sweep

Finished = Mapping[Run, Record]
Times = Mapping[str, Mapping[str, float]]  # by model: see step_times.py
Rows = list[tuple[str, ...]]


class Equal(NamedTuple):
    """The share of the dense model's steps that a mixture needs to reach the same final loss, for one seed.

    `sign` is "<" if the share is only known to be below `share`, and ">" if it is only known to be above.
    """

    share: float
    sign: str = ""

    def __str__(self) -> str:
        return f"{self.sign}{self.share:.3f}"


def tables(plan: Plan, finished: Finished, times: Times) -> str:
    """Return all tables that have at least one finished run."""
    all_tables = {
        "Sweeps: held-out bits per byte; * best rate (half and double are worse), ? so far": sweep_rows(plan, finished),
        "Every seed at that rate: held-out bits per byte": seed_rows(plan, finished, times),
        "Share of the dense model's steps, and of its seconds, until its final loss": equal_rows(plan, finished, times),
        "What the models cost": cost_rows(plan, finished, times),
    }
    return "\n\n".join(f"{title}\n{format_rows(rows)}" for title, rows in all_tables.items() if len(rows) > 1)


def sweep_rows(plan: Plan, finished: Finished) -> Rows:
    """Return a row for each model and length, with a column for each rate."""
    lengths = [(model, length) for model in models_of(plan) for length in plan.sweep_lengths(model)]
    sweeps = {(model, length): sweep(model, length, finished) for model, length in lengths}
    rates = sorted({rate for losses in sweeps.values() for rate in losses})
    rows: Rows = [("model", "steps", *(f"{rate:g}" for rate in rates))]
    for (model, length), losses in sweeps.items():
        if losses:
            mark = {plan.rate_so_far(model, finished): "?"} | {plan.best_rate(model, finished): "*"}
            cells = (f"{losses[rate]:.4f}{mark.get(rate, '')}" if rate in losses else "" for rate in rates)
            rows.append((MODELS[model].label, f"{length:,}", *cells))
    return rows


def seed_rows(plan: Plan, finished: Finished, times: Times) -> Rows:
    """Return a row for each model and length, with a column for each seed and the mean training loss."""
    groups = at_best_rate(plan, finished)
    seeds = sorted({seed for values in groups.values() for seed in values})
    columns = ("rate", "steps", "operations", "seconds")
    rows: Rows = [("model", *columns, *(f"seed {seed}" for seed in seeds), "mean", "mean, in training")]
    operations, seconds = operations_of(finished), seconds_of(times)
    for (model, steps), values in groups.items():
        cells = (f"{values[seed]:.4f}" if seed in values else "" for seed in seeds)
        average = f"{mean(values.values()):.4f}" if len(values) > 1 else ""
        before = f"{plan.dense_steps(model):,} + " if plan.dense_steps(model) else ""
        cost = (
            f"{plan.rate_so_far(model, finished):g}",
            f"{before}{steps:,}",
            f"{total_cost(plan, model, steps, operations):.2g}",
            f"{total_cost(plan, model, steps, seconds):.0f}" if model in seconds else "",
        )
        own = [run for run in runs_at_best_rate(plan, finished) if (run.model, run.steps) == (model, steps)]
        training = mean(last_training_bits(finished[run]) for run in own)
        rows.append((MODELS[model].label, *cost, *cells, average, f"{training:.4f}"))
    return rows


def equal_rows(plan: Plan, finished: Finished, times: Times) -> Rows:
    """Return a row for each mixture: the share for each seed, their mean, and the mean in seconds."""
    shares = {model: equal_shares(plan, finished, model) for model in models_of(plan) if model.startswith("moe")}
    seeds = sorted({seed for values in shares.values() for seed in values})
    rows: Rows = [("model", *(f"seed {seed}" for seed in seeds), "mean", "step ÷ dense step", "mean, seconds")]
    for model, values in shares.items():
        if values:
            cells = (str(values[seed]) if seed in values else "" for seed in seeds)
            exact = not any(equal.sign for equal in values.values())
            average = mean(equal.share for equal in values.values())
            ratio = times[model]["step"] / times["dense"]["step"] if times else math.nan
            row = (f"{average:.3f}", f"{ratio:.2f}", f"{average * ratio:.3f}")
            rows.append((MODELS[model].label, *cells, *(row if exact else ("", row[1], ""))))
    return rows


def cost_rows(plan: Plan, finished: Finished, times: Times) -> Rows:
    """Return a row for each model: parameters, step time, memory, and expert loads in the last quarter of the steps."""
    header = ("parameters", "active", "step, ms", "÷ dense", "memory, MB", "busiest ÷ mean", "idlest ÷ mean", "dropped")
    rows: Rows = [("model", *header)]
    for model in models_of(plan):
        record = longest(plan, finished, model)
        if record is None:
            continue
        parameters = (f"{record['total_parameters']:,}", f"{record['active_parameters']:,}")
        time = ("", "", "")
        if model in times:
            own, dense = times[model], times["dense"]
            time = (f"{1000 * own['step']:.1f}", f"{own['step'] / dense['step']:.2f}", f"{own['memory'] / 1e6:.0f}")
        load = ("", "", "")
        if "busiest" in record:
            load = (f"{record['busiest']:.2f}", f"{record['idlest']:.2f}", f"{record['dropped']:.1%}")
        rows.append((MODELS[model].label, *parameters, *time, *load))
    return rows


# ---- shared by the tables and the picture ----


def models_of(plan: Plan) -> list[str]:
    """Return the plan's models, ordered as in `MODELS`."""
    wanted = {stage.model for stage in plan.stages}
    return [model for model in MODELS if model in wanted]


def at_best_rate(plan: Plan, finished: Finished) -> dict[tuple[str, int], dict[int, float]]:
    """Return the held-out bits of the runs at each model's best rate, by (model, steps) and seed."""
    groups: dict[tuple[str, int], dict[int, float]] = {}
    for run in runs_at_best_rate(plan, finished):
        groups.setdefault((run.model, run.steps), {})[run.seed] = final_bits(finished[run])
    return groups


def runs_at_best_rate(plan: Plan, finished: Finished) -> list[Run]:
    """Return the runs to compare, ordered by model, length and seed."""
    runs: list[Run] = []
    for model in models_of(plan):
        rate = plan.rate_so_far(model, finished)
        own = [run for run in finished if (run.model, run.learning_rate) == (model, rate)]
        runs += sorted(own, key=lambda run: (run.steps, run.seed))
    return runs


def last_training_bits(record: Record) -> float:
    """Return the training bits per byte of the last 300 steps, measured on each batch before its update."""
    return mean(record["train"][-3:])


def equal_shares(plan: Plan, finished: Finished, model: str, dense_steps: int | None = None) -> dict[int, Equal]:
    """Return, by seed, the share of the dense model's steps that `model` needs to reach the dense model's final loss.

    The dense runs have `dense_steps` steps, by default the length of the plan's long runs.
    """
    groups, dense_steps = at_best_rate(plan, finished), dense_steps or plan.steps
    shares = {}
    for seed, target in groups.get(("dense", dense_steps), {}).items():
        lengths = {steps: bits[seed] for (name, steps), bits in groups.items() if name == model and seed in bits}
        if lengths:
            steps, sign = steps_to(target, lengths)
            shares[seed] = Equal(steps / dense_steps, sign)
    return shares


def steps_to(target: float, bits: Mapping[int, float]) -> tuple[float, str]:
    """Return the length of a run that would end at `target` bits, interpolated between two finished runs.

    The interpolation is linear in the logarithm of the length. If the longer run is more than twice as long as the
    shorter run, interpolation is too inaccurate, and the length is only known to be above the shorter one.
    """
    lengths = sorted(bits)
    for short, long in pairwise(lengths):
        if bits[short] >= target >= bits[long]:
            if long > 2 * short:
                return short, ">"
            part = (bits[short] - target) / (bits[short] - bits[long])
            return short * (long / short) ** part, ""
    return (lengths[0], "<") if bits[lengths[0]] < target else (lengths[-1], ">")


def longest(plan: Plan, finished: Finished, model: str) -> Record | None:
    """Return the record of a model's longest run at its best rate so far."""
    rate = plan.rate_so_far(model, finished)
    runs = [run for run in finished if run.model == model and rate in (None, run.learning_rate)]
    runs = [run for run in runs if run.seed == SWEEP_SEED]
    return finished[max(runs, key=lambda run: run.steps)] if runs else None


def total_cost(plan: Plan, model: str, steps: int, step_cost: Mapping[str, float]) -> float:
    """Return the total cost of a run, including the dense run that it is upcycled from."""
    before = plan.dense_steps(model)
    return steps * step_cost[model] + (before * step_cost["dense"] if before else 0)


def operations_of(finished: Finished) -> dict[str, float]:
    """Return the floating-point operations of a training step, by model."""
    return {run.model: step_flops(record) for run, record in finished.items()}


def seconds_of(times: Times) -> dict[str, float]:
    """Return the seconds of a training step, measured separately, by model."""
    return {model: own["step"] for model, own in times.items()}


def step_flops(record: Record) -> float:
    """Return the floating-point operations of a training step.

    The forward counts the active matrices and causal attention, and the backward counts twice as much. The embedding
    table is excluded, because it is not multiplied.
    """
    settings: dict[str, Any] = record["settings"]
    dim, context = settings["dim"], settings["context"]
    matrices = 2 * (record["active_parameters"] - 256 * dim)
    attention = settings["layers"] * 2 * context * dim
    return 3 * (matrices + attention) * settings["batch_size"] * context
