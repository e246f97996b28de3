"""A step is right however it is made: its output, its auxiliary loss, the gradient of each, what it counts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixture_of_experts.verify.properties import ONLY, TRAINING, keeps
from mixture_of_experts.verify.trial import RESULTS, Gap, Gaps, Run, Trial, gap


def checkpointed(reentrant: bool, function: Run, x: Tensor) -> Any:
    """Run a function under activation checkpointing. The reentrant kind takes tuples of tensors only."""
    keys: list[str] = []

    def flat(x: Tensor) -> Any:
        returned = function(x)
        if not isinstance(returned, dict):
            return returned
        keys[:] = returned
        return tuple(returned.values())

    out: Any = checkpoint(flat, x, use_reentrant=reentrant)
    return dict(zip(keys, out, strict=True)) if keys else out


def recomputed(trial: Trial, compared: str | tuple[str, ...]) -> Gaps:
    for reentrant in (False, True):
        for of in ("output", "loss"):
            found = trial.step(run=partial(checkpointed, reentrant), of=of)
            yield gap(found, trial.step(of=of), compared, f", of the {of}, use_reentrant={reentrant}")


@keeps("checkpointing changes no output, loss or gradient", modes=TRAINING)
def recomputation(trial: Trial) -> Gaps:
    yield from recomputed(trial, RESULTS)


@keeps("checkpointing counts once, and moves buffers once", modes=TRAINING)
def counts_checkpointing(trial: Trial) -> Gaps:
    yield from recomputed(trial, "move")


@keeps("the loss has a gradient, and micro-batches add gradients once each", modes=TRAINING)
def loss_accumulation(trial: Trial) -> Gaps:
    for of in ("output", "loss"):
        first, second = (trial.step(trial.x(i), of=of) for i in (0, 1))
        module = trial.fresh()
        trial.step(module=module, of=of)
        found = trial.step(trial.x(1), module=module, of=of)
        wanted = {name: first[name] + grad for name, grad in second.items() if name.startswith("gradient")}
        yield gap(found, wanted, how=f", of the {of}")
    flat = not any(grad.any() for name, grad in first.items() if name.startswith("gradient"))
    yield Gap(gap(first, second, "loss").number * flat, "loss of two batches, though it has no gradient")


@keeps("a loss times a number gives gradients times that number", modes=TRAINING)
def loss_scale(trial: Trial) -> Gaps:
    yield gap(trial.step(scale=1024), trial.step())


@keeps("a batch beside its copy has the same loss", needs="loss", modes=TRAINING, steady=True)
def loss_mean(trial: Trial) -> Gaps:
    x = trial.x()
    yield gap(trial.step(torch.cat([x, x]), of="loss"), trial.step(of="loss"), ("loss", "gradient"))


@keeps("compiled it computes the same", cases=ONLY, by_name=True)
def compile(trial: Trial) -> Gaps:
    torch.compiler.reset()
    found = trial.step(run=lambda function, x: torch.compile(function, backend="aot_eager")(x))
    yield gap(found, trial.step())
