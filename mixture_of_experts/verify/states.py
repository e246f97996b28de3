"""What a module keeps: nothing of a call, and all of itself in copies."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.verify.batching import padded
from mixture_of_experts.verify.properties import EVAL, ONLY, TRAINING, keeps
from mixture_of_experts.verify.settings import current_settings, settings_kept
from mixture_of_experts.verify.trial import RESULTS, DoesNotApplyError, Gap, Gaps, Outcome, Run, Trial, gap

SEED = 20170123  # that no module seeds with
MAX_PARTS = 8  # submodules at which a forward waits for another thread's
PATIENCE = 10  # seconds for a forward in another thread


@keeps("evaluation counts nothing, and moves no buffer", cases=ONLY, modes=EVAL, limit=0.0)
def counts_eval(trial: Trial) -> Gaps:
    module = trial.fresh()
    trial.forward(module=module)
    yield gap(trial.step(module=module), trial.moves(trial.fresh()))


@keeps("two runs give the same bits, whatever ran before", limit=0.0)
def bits(trial: Trial) -> Gaps:
    module, wanted = trial.fresh(), trial.step()
    for number in range(1, 6):
        trial.forward(trial.x(number)[:1, : number + 1], module=module)
        yield gap(trial.step(module=module), wanted, RESULTS)
        module.zero_grad()


@keeps("a forward seeds no random numbers anew", cases=ONLY)
def seeds(trial: Trial) -> Gaps:
    trial.forward(seed=SEED)
    yield Gap(float(torch.initial_seed() != SEED), "the seed of what is drawn after it")


@keeps("a forward changes neither its inputs nor global settings", cases=ONLY, limit=0.0)
def side_effects(trial: Trial) -> Gaps:
    for x, mask in ((trial.x(), None), padded(trial, 3.0)):
        given = {"the tokens": x, **({} if mask is None else {"the mask": mask})}
        kept, changed = {name: tensor.clone() for name, tensor in given.items()}, []

        def run(function: Run, x: Tensor, changed: list[str] = changed) -> Any:
            before = current_settings()
            with settings_kept():
                out = function(x)
                after = current_settings()
            changed += [name for name, value in before.items() if after[name] != value]
            return out

        trial.forward(x, mask, run=run)
        changed += [name for name, tensor in given.items() if not torch.equal(tensor, kept[name])]
        yield Gap(len(changed), f"it changed {', '.join(changed)}{'' if mask is None else ', padded'}")


@keeps("forwards of two threads do not meet", cases=ONLY, steady=True)
def threads(trial: Trial) -> Gaps:
    wanted = [trial.forward(trial.x(number)) for number in (0, 1)]
    for path in [*parts(trial), ""]:
        for found, alone in zip(of_two_threads(trial, path), wanted, strict=True):
            yield gap(found, alone, how=f", while the other is at {path or 'its end'}")


def of_two_threads(trial: Trial, path: str) -> list[Outcome]:
    """A forward that stops at a part of the module, or at its end, until another thread's forward is over; and that."""
    module, other = trial.fresh(), list[Future[Outcome]]()
    with ThreadPoolExecutor(1) as pool:

        def stop(*hooked: object) -> None:
            hook.remove()
            other.append(pool.submit(trial.forward, trial.x(1), module=module))
            wait(other, PATIENCE)  # a module that locks others out may do so

        part = module.get_submodule(path)
        hook = part.register_forward_pre_hook(stop) if path else part.register_forward_hook(stop)
        return [trial.forward(module=module), other[0].result(PATIENCE)]


def parts(trial: Trial) -> list[str]:
    """Paths of some submodules that a forward calls."""
    module, called = trial.fresh(), dict[str, None]()
    for path, part in list(module.named_modules())[1:]:
        part.register_forward_pre_hook(lambda part, inputs, path=path: called.update({path: None}))
    trial.forward(module=module)
    return list(called)[:: max(1, -(-len(called) // MAX_PARTS))]


@keeps("a forward that raised leaves nothing behind", cases=ONLY)
def raised(trial: Trial) -> Gaps:
    wanted = trial.step()
    for path, _ in list(trial.module.named_modules())[1:]:
        module = trial.fresh()
        hook = module.get_submodule(path).register_forward_pre_hook(refuse)
        try:
            trial.step(trial.x(1), module=module)
            continue  # it does not call this one
        except RefusedError:
            hook.remove()
        module.zero_grad()
        yield gap(trial.step(module=module), wanted, how=f", after a forward that raised in {path}")


class RefusedError(Exception):
    """What a forward raises here."""


def refuse(module: nn.Module, inputs: object) -> None:
    raise RefusedError


@keeps("a copy of a used module computes the same, by itself", cases=ONLY)
def deepcopy(trial: Trial) -> Gaps:
    module = trial.fresh()
    trial.step(module=module)
    module.zero_grad()
    copied = copy.deepcopy(module)
    wanted = trial.step(module=module)
    yield gap(trial.step(module=copied), wanted)
    scale_weights(copied, 0.0)
    yield gap(trial.forward(module=module), wanted, "output", ", when the weights of a copy change")


@keeps("weights of another, loaded into a used copy or one made on meta, compute the same", cases=ONLY, modes=EVAL)
def save_load(trial: Trial) -> Gaps:
    module, used, empty = trial.fresh().train(), trial.fresh(), trial.fresh().to("meta")
    trial.step(module=module)
    scale_weights(module, 1.5)
    trial.forward(module=used)  # a packed copy of its weights would be old
    empty.to_empty(device=trial.x().device)
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.detach().fill_(3)
    for how, other in ((", of a used copy", used), (", of one made on meta", empty)):
        other.load_state_dict(module.state_dict())
        yield gap(trial.forward(module=other), trial.forward(module=module.eval()), how=how)


@keeps("inference mode gives the same, and leaves nothing behind", modes=EVAL)
def inference_mode(trial: Trial) -> Gaps:
    module = trial.fresh()
    with torch.inference_mode():
        found = trial.forward(module=module)
    yield gap(trial.step(module=module), found)


@keeps("a token alone gets in eval the output that it gets in training", cases=ONLY, modes=TRAINING, steady=True)
def output_eval(trial: Trial) -> Gaps:
    if False not in trial.steady:
        raise DoesNotApplyError("random numbers are drawn in eval")
    one = trial.x()[:1, :1]
    yield gap(replace(trial, training=False).forward(one), trial.forward(one), of="output")


def scale_weights(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(factor)
