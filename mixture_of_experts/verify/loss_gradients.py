"""The auxiliary loss is right: its value, and its gradient once, however the step is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mixture_of_experts.verify.properties import TRAINING, keeps
from mixture_of_experts.verify.subject import CHECKPOINTS, Case, Gap, Trial, gap, without_tokens

LARGE = (Case(4, 64, 0),)
OF_BFLOAT16 = 0.2  # a choice that rounding turns is one of many tokens


@keeps("the loss has a gradient, and micro-batches add gradients once each", modes=TRAINING)
def loss_accumulation(trial: Trial) -> Iterator[Gap]:
    for of in ("output", "loss"):
        first, second = (trial.step(trial.sample(i), of=of) for i in (0, 1))
        module = trial.fresh()
        for i in (0, 1):
            found = trial.step(trial.sample(i), module=module, of=of)
        sums = {name: first[name] + tensor for name, tensor in without_tokens(second).items() if name != "loss"}
        yield gap(found, second | sums, how=f", of the {of}")
    flat = not any(first[name].any() for name in first if name.startswith("gradient"))
    yield Gap(gap(first, second, of="loss").number * flat, "loss of two batches, though it has no gradient")


@keeps("checkpointing leaves the loss and its gradient", "loss", modes=TRAINING)
def loss_checkpointing(trial: Trial) -> Iterator[Gap]:
    for how, run in CHECKPOINTS.items():
        yield gap(trial.step(run=run, of="loss"), trial.step(of="loss"), how=how)


@keeps("autocast only rounds the loss and its gradient", "loss", cases=LARGE, modes=TRAINING, limit=OF_BFLOAT16)
def loss_autocast(trial: Trial) -> Iterator[Gap]:
    with torch.autocast(trial.subject.like.device.type, torch.bfloat16):
        found = trial.step(of="loss")
    yield gap(found, without_tokens(trial.step(of="loss")))


@keeps("a loss times a number gives gradients times that number", modes=TRAINING)
def loss_scale(trial: Trial) -> Iterator[Gap]:
    for of in ("all", "output"):
        yield gap(trial.step(of=of, scale=1024), trial.step(of=of))


@keeps("a batch beside its copy has the same loss", "loss", modes=TRAINING, steady=True)
def loss_mean(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    twice = sample.at([*range(trial.case.sequences)] * 2)
    yield gap(trial.step(twice, of="loss"), without_tokens(trial.step(sample, of="loss")))
