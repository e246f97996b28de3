"""What a module keeps: counts, nothing of a call, and all of itself in copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import torch
from torch import nn

from mixture_of_experts.verify.properties import EVAL, ONE, TRAINING, keeps
from mixture_of_experts.verify.subject import CHECKPOINTS, Case, DoesNotApplyError, Gap, Outcome, Run, Trial, gap

MOST_PARTS = 8
RUNS = 6
SEED = 20170123  # that no module seeds with
PATIENCE = 10  # seconds for a forward in another thread


def moved(trial: Trial, run: Run | None = None) -> Outcome:
    """How far a forward and a step move counts and buffers."""
    module = trial.fresh()
    trial.forward(module=module)
    trial.step(run=run, module=module)
    old, new = (trial.subject.counted(each) | dict(each.named_buffers()) for each in (trial.fresh(), module))
    return {name: (new[name].double() - tensor.double()).nan_to_num() for name, tensor in old.items()}


@keeps("checkpointing counts once, and moves buffers once", modes=TRAINING)
def counts_checkpointing(trial: Trial) -> Iterator[Gap]:
    for how, run in CHECKPOINTS.items():
        yield gap(moved(trial, run), moved(trial), how=how)


@keeps("checkpointing changes no output, loss or gradient", modes=TRAINING)
def recomputation(trial: Trial) -> Iterator[Gap]:
    for how, run in CHECKPOINTS.items():
        yield gap(trial.step(run=run, of="sum"), trial.step(of="sum"), how=how)


@keeps("evaluation counts nothing, and moves no buffer", cases=ONE, modes=EVAL, limit=0.0)
def counts_eval(trial: Trial) -> Iterator[Gap]:
    for name, far in moved(trial).items():
        yield Gap(far.abs().sum().item(), f"{name} moved")


@keeps("two runs give the same bits, whatever ran before", limit=0.0)
def bits(trial: Trial) -> Iterator[Gap]:
    module, wanted = trial.fresh(), trial.step(of="sum")
    for number in range(1, RUNS):
        trial.forward(trial.subject.sample(Case(1, number + 1, number)), module)
        found = trial.step(module=module, of="sum")
        yield gap(found, wanted, how=f", after {2 * number - 1} other forwards")
        module.zero_grad()


@keeps("a forward seeds no random numbers anew", cases=ONE)
def seeds(trial: Trial) -> Iterator[Gap]:
    trial.forward(seed=SEED)
    yield Gap(float(torch.initial_seed() != SEED), "the seed of what is drawn after it")


@keeps("a forward that raised leaves nothing behind", cases=ONE)
def raised(trial: Trial) -> Iterator[Gap]:
    wanted, bad = trial.step(), trial.sample(1)
    narrow = bad.at((..., slice(-1)))
    for path in ["", *parts(trial)]:
        module = trial.fresh()
        at = f"in {path}" if path else "of tokens that are too narrow"
        hooks = [module.get_submodule(path).register_forward_pre_hook(refuse)] if path else []
        with suppress(Exception):
            trial.step(bad if path else narrow, module=module)
            continue  # it takes them
        for hook in hooks:
            hook.remove()
        module.zero_grad()
        yield gap(trial.step(module=module), wanted, how=f", after a forward that raised {at}")


def refuse(module: nn.Module, inputs: object) -> None:
    raise RuntimeError("a forward that fails")


@keeps("forwards of two threads do not meet", cases=ONE, steady=True)
def threads(trial: Trial) -> Iterator[Gap]:
    wanted = [trial.forward(trial.sample(i)) for i in (0, 1)]
    for path in [*parts(trial), ""]:
        for outcome, right in zip(of_two_threads(trial, path), wanted, strict=True):
            yield gap(outcome, right, how=f", while the other is at {path or 'its end'}")


def of_two_threads(trial: Trial, path: str) -> list[Outcome]:
    """A forward that stops at a part of the module, or at its end, until another thread's forward is over; and that."""
    module, pool, other = trial.fresh(), ThreadPoolExecutor(1), []

    def stop(*hooked: object) -> None:
        hook.remove()
        other.append(pool.submit(trial.forward, trial.sample(1), module))
        wait(other, PATIENCE)  # a module that locks others out may do so

    part = module.get_submodule(path)
    hook = part.register_forward_pre_hook(stop) if path else part.register_forward_hook(stop)
    return [trial.forward(module=module), other[0].result(PATIENCE)]


def parts(trial: Trial) -> list[str]:
    """Paths of some submodules that a forward calls."""
    module, called = trial.fresh(), {}
    for path, part in list(module.named_modules())[1:]:
        part.register_forward_pre_hook(lambda part, inputs, path=path: called.update({path: None}))
    trial.forward(module=module)
    return list(called)[:: max(1, -(-len(called) // MOST_PARTS))]


@keeps("a copy of a used module computes the same, by itself", cases=ONE)
def deepcopy(trial: Trial) -> Iterator[Gap]:
    module, sample = trial.fresh(), trial.sample(1)
    trial.step(module=module)
    module.zero_grad()
    copied = copy.deepcopy(module)
    wanted = trial.step(sample, module=module)
    yield gap(trial.step(sample, module=copied), wanted)
    scale_weights(copied, 0.0)
    yield gap(trial.forward(sample, module), wanted, of="output", how=", when the weights of a copy change")


@keeps("saved weights, loaded into another, compute the same", cases=ONE, modes=EVAL)
def save_load(trial: Trial) -> Iterator[Gap]:
    module, other, file = trial.subject.fresh(True), trial.fresh(), io.BytesIO()
    trial.step(module=module)
    scale_weights(module, 1.5)
    for _ in range(2):
        trial.forward(module=other)  # a packed copy of its weights would be old
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    yield gap(trial.forward(module=other), trial.forward(module=module.eval()))


@keeps("made on meta, emptied and loaded it computes the same", cases=ONE, modes=EVAL)
def meta(trial: Trial) -> Iterator[Gap]:
    module = trial.fresh()
    empty = trial.fresh().to("meta").to_empty(device=trial.subject.like.device)
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 1)
    empty.load_state_dict(module.state_dict())
    yield gap(trial.forward(module=empty), trial.forward(module=module))


@keeps("inference mode gives the same, and leaves nothing behind", modes=EVAL)
def inference_mode(trial: Trial) -> Iterator[Gap]:
    module = trial.fresh()
    with torch.inference_mode():
        found = trial.forward(module=module)
    yield gap(trial.step(module=module), found)


@keeps("a token alone gets in eval the output that it gets in training", modes=TRAINING, steady=True)
def output_eval(trial: Trial) -> Iterator[Gap]:
    if trial.subject.draws[False]:
        raise DoesNotApplyError("random numbers are drawn in eval")
    one = trial.sample().at((slice(1), slice(1)))
    yield gap(trial._replace(training=False).forward(one), trial.forward(one), of="output")


def scale_weights(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(factor)
