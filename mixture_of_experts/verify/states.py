"""What a module keeps: counts, nothing of a call, and all of itself in copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mixture_of_experts.verify.properties import EVAL, ONE, TRAINING, keeps
from mixture_of_experts.verify.subject import Gap, Trial, gap, in_checkpoint

MOST_PARTS = 8
PATIENCE = 10  # seconds for a forward in another thread


def recompute(trial: Trial, counts: bool) -> Iterator[Gap]:
    """Both kinds of checkpointing against none."""
    wanted = {name: each for name, each in trial.step(trial.sample()).items() if (name == "counts") == counts}
    for reentrant in (False, True):
        found = trial.step(trial.sample(), in_checkpoint(reentrant))
        yield gap(found, wanted, how=f", use_reentrant={reentrant}")


@keeps("checkpointing counts once", "counts", modes=TRAINING)
def counts_checkpointing(trial: Trial) -> Iterator[Gap]:
    yield from recompute(trial, counts=True)


@keeps("checkpointing changes no output, loss or gradient", modes=TRAINING)
def recomputation(trial: Trial) -> Iterator[Gap]:
    yield from recompute(trial, counts=False)


@keeps("evaluation counts nothing", "counts", cases=ONE, modes=EVAL, limit=0.0)
def counts_eval(trial: Trial) -> Iterator[Gap]:
    module = trial.fresh()
    before = trial.subject.counted(module)
    trial.forward(trial.sample(), module)
    trial.step(trial.sample(), module=module)
    yield Gap((trial.subject.counted(module) - before).abs().sum().item(), "counted")


@keeps("two runs give the same bits", limit=0.0)
def bits(trial: Trial) -> Iterator[Gap]:
    for _ in range(2):
        yield gap(trial.step(trial.sample()), trial.step(trial.sample()))


@keeps("a forward that raised leaves nothing behind", cases=ONE)
def raised(trial: Trial) -> Iterator[Gap]:
    wanted, bad = trial.step(trial.sample()), trial.sample(1)
    narrow = replace(bad, x=bad.x[..., :-1], cotangent=bad.cotangent[..., :-1])
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
        yield gap(trial.step(trial.sample(), module=module), wanted, how=f", after a forward that raised {at}")


def refuse(module: nn.Module, inputs: object) -> None:
    raise RuntimeError("a forward that fails")


@keeps("forwards of two threads do not meet", cases=ONE, steady=True)
def threads(trial: Trial) -> Iterator[Gap]:
    """One forward stops at a part of the module, or at its end, until another thread's forward is over."""
    wanted = [trial.forward(trial.sample(i)) for i in (0, 1)]
    for path in [*parts(trial), ""]:
        module, pool, begun = trial.fresh(), ThreadPoolExecutor(1), []

        def stop(*hooked: object, module=module, pool=pool, begun: list[Any] = begun) -> None:
            if not begun:
                begun.append(None)
                begun.append(pool.submit(trial.forward, trial.sample(1), module))
                wait(begun[1:], PATIENCE)  # a module that locks others out may do so

        part = module.get_submodule(path)
        hook = part.register_forward_pre_hook(stop) if path else part.register_forward_hook(stop)
        first = trial.forward(trial.sample(), module)
        hook.remove()
        for outcome, right in zip([first, begun[1].result(PATIENCE)], wanted, strict=True):
            yield gap(outcome, right, how=f", while the other is at {path or 'its end'}")


def parts(trial: Trial) -> list[str]:
    """Paths of some submodules that a forward calls."""
    module, called = trial.fresh(), {}
    for path, part in list(module.named_modules())[1:]:
        part.register_forward_pre_hook(lambda part, inputs, path=path: called.update({path: None}))
    trial.forward(trial.sample(), module)
    return list(called)[:: max(1, -(-len(called) // MOST_PARTS))]


@keeps("a copy of a used module computes the same, by itself", cases=ONE)
def deepcopy(trial: Trial) -> Iterator[Gap]:
    module, sample = trial.fresh(), trial.sample(1)
    trial.step(trial.sample(), module=module)
    module.zero_grad()
    copied = copy.deepcopy(module)
    wanted = trial.step(sample, module=module)
    yield gap(trial.step(sample, module=copied), wanted)
    scale_weights(copied, 0.0)
    yield gap(trial.forward(sample, module), wanted, of="output", how=", when the weights of a copy change")


@keeps("saved weights, loaded into another, compute the same", cases=ONE, modes=EVAL)
def save_load(trial: Trial) -> Iterator[Gap]:
    module, other, file = trial.subject.fresh(True), trial.fresh(), io.BytesIO()
    trial.step(trial.sample(), module=module)
    scale_weights(module, 1.5)
    torch.save(module.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    yield gap(trial.forward(trial.sample(), other), trial.forward(trial.sample(), module.eval()))


@keeps("made on meta, emptied and loaded it computes the same", cases=ONE, modes=EVAL)
def meta(trial: Trial) -> Iterator[Gap]:
    module = trial.fresh()
    empty = trial.fresh().to("meta").to_empty(device=trial.subject.like.device)
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 1)
    empty.load_state_dict(module.state_dict())
    yield gap(trial.forward(trial.sample(), empty), trial.forward(trial.sample(), module))


def scale_weights(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(factor)
