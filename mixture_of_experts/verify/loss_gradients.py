"""The auxiliary loss is right: its value, and its gradient once, however the step is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mixture_of_experts.verify.properties import TRAINING, keeps
from mixture_of_experts.verify.subject import OF_TOKENS, Case, Gap, Trial, gap, in_checkpoint

LARGE = (Case(4, 64, 0),)
OF_BFLOAT16 = 0.2  # a choice that rounding turns is one of many tokens


@keeps("micro-batches add the loss's gradient once each", "loss", modes=TRAINING)
def loss_accumulation(trial: Trial) -> Iterator[Gap]:
    first, second = (trial.step(trial.sample(i), of="loss") for i in (0, 1))
    module = trial.fresh()
    for i in (0, 1):
        found = trial.step(trial.sample(i), module=module, of="loss")
    sums = {name: first[name] + tensor for name, tensor in second.items() if name not in ("loss", *OF_TOKENS)}
    yield gap(found, second | sums)


@keeps("checkpointing leaves the loss and its gradient", "loss", modes=TRAINING)
def loss_checkpointing(trial: Trial) -> Iterator[Gap]:
    for reentrant in (False, True):
        found = trial.step(trial.sample(), in_checkpoint(reentrant), of="loss")
        yield gap(found, trial.step(trial.sample(), of="loss"), how=f", use_reentrant={reentrant}")


@keeps("autocast only rounds the loss and its gradient", "loss", cases=LARGE, modes=TRAINING, limit=OF_BFLOAT16)
def loss_autocast(trial: Trial) -> Iterator[Gap]:
    wanted = trial.step(trial.sample(), of="loss")
    with torch.autocast(trial.subject.like.device.type, torch.bfloat16):
        found = trial.step(trial.sample(), of="loss")
    yield gap(found, {name: tensor for name, tensor in wanted.items() if name not in OF_TOKENS})


@keeps("a loss times a number gives gradients times that number", modes=TRAINING)
def loss_scale(trial: Trial) -> Iterator[Gap]:
    for of in ("all", "output"):
        yield gap(trial.step(trial.sample(), of=of, scale=1024), trial.step(trial.sample(), of=of))


@keeps("a batch beside its copy has the same loss", "loss", modes=TRAINING, steady=True)
def loss_mean(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    twice = replace(sample, x=sample.x.repeat(2, 1, 1), cotangent=sample.cotangent.repeat(2, 1, 1))
    wanted = trial.step(sample, of="loss")
    yield gap(trial.step(twice, of="loss"), {name: tensor for name, tensor in wanted.items() if name not in OF_TOKENS})
