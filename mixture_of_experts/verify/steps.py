"""Measures properties of training steps: the output, auxiliary loss, gradients and counts are correct regardless of how
a step is run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixture_of_experts.verify.properties import SINGLE_CASE, TRAINING_ONLY, layer_property
from mixture_of_experts.verify.trial import RESULT_PREFIXES, Deviation, Deviations, RunFunction, Trial, compare_outcomes


def run_checkpointed(reentrant: bool, function: RunFunction, x: Tensor) -> Any:
    """Run a function under activation checkpointing. The reentrant implementation supports only tuples of tensors."""
    keys: list[str] = []

    def flat(x: Tensor) -> Any:
        returned = function(x)
        if not isinstance(returned, dict):
            return returned
        keys[:] = returned
        return tuple(returned.values())

    out: Any = checkpoint(flat, x, use_reentrant=reentrant)
    return dict(zip(keys, out, strict=True)) if keys else out


def compare_recomputed(trial: Trial, compared: str | tuple[str, ...]) -> Deviations:
    for reentrant in (False, True):
        for of in ("output", "loss"):
            found = trial.step(run=partial(run_checkpointed, reentrant), loss_from=of)
            yield compare_outcomes(
                found, trial.step(loss_from=of), compared, f", of the {of}, use_reentrant={reentrant}"
            )


@layer_property("checkpointing does not change outputs, losses or gradients", modes=TRAINING_ONLY)
def recomputation(trial: Trial) -> Deviations:
    yield from compare_recomputed(trial, RESULT_PREFIXES)


@layer_property("checkpointing counts choices and updates buffers only once", modes=TRAINING_ONLY)
def counts_checkpointing(trial: Trial) -> Deviations:
    yield from compare_recomputed(trial, "move")


@layer_property("the loss has a gradient, and each micro-batch adds its gradients once", modes=TRAINING_ONLY)
def loss_accumulation(trial: Trial) -> Deviations:
    for of in ("output", "loss"):
        first, second = (trial.step(trial.make_tokens(i), loss_from=of) for i in (0, 1))
        module = trial.copy_module()
        trial.step(module=module, loss_from=of)
        found = trial.step(trial.make_tokens(1), module=module, loss_from=of)
        wanted = {name: first[name] + grad for name, grad in second.items() if name.startswith("gradient")}
        yield compare_outcomes(found, wanted, context=f", of the {of}")
    # the gradient of one batch may be 0, for example if its tokens choose all experts equally often
    grads = (grad for step in (first, second) for name, grad in step.items() if name.startswith("gradient"))
    flat = not any(grad.any() for grad in grads)
    yield Deviation(
        compare_outcomes(first, second, "loss").value * flat, "loss of two batches, although it has no gradient"
    )


@layer_property("scaling the loss scales the gradients", modes=TRAINING_ONLY)
def loss_scale(trial: Trial) -> Deviations:
    for of in ("output", "loss"):
        yield compare_outcomes(trial.step(scale=1024, loss_from=of), trial.step(loss_from=of), context=f", of the {of}")


@layer_property(
    "a batch and its duplicate together have the same loss",
    needs="loss",
    modes=TRAINING_ONLY,
    is_deterministic_only=True,
)
def loss_mean(trial: Trial) -> Deviations:
    x = trial.make_tokens()
    yield compare_outcomes(
        trial.step(torch.cat([x, x]), loss_from="loss"), trial.step(loss_from="loss"), ("loss", "gradient")
    )


@layer_property("the compiled module computes the same", cases=SINGLE_CASE, is_opt_in=True)
def compile(trial: Trial) -> Deviations:
    torch.compiler.reset()
    found = trial.step(run=lambda function, x: torch.compile(function, backend="aot_eager")(x))
    yield compare_outcomes(found, trial.step())
