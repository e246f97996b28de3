"""Measures state properties: calls have no lasting effects, and copies are complete."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.verify.batching import make_padded_batch
from mixture_of_experts.verify.properties import EVAL_ONLY, SINGLE_CASE, TRAINING_ONLY, layer_property
from mixture_of_experts.verify.settings import preserve_settings, read_settings
from mixture_of_experts.verify.trial import (
    RESULT_PREFIXES,
    Deviation,
    Deviations,
    NotApplicableError,
    Outcome,
    RunFunction,
    Trial,
    compare_outcomes,
)

UNUSUAL_SEED = 20170123  # a seed that no module uses
MAX_PARTS = 8  # maximum number of submodules in which a forward pass is paused
PATIENCE = 10  # seconds to wait for a forward pass in another thread


@layer_property("evaluation counts nothing and does not change buffers", cases=SINGLE_CASE, modes=EVAL_ONLY, limit=0.0)
def counts_eval(trial: Trial) -> Deviations:
    module = trial.copy_module()
    trial.forward(module=module)
    yield compare_outcomes(trial.step(module=module), trial.measure_buffer_changes(trial.copy_module()))


@layer_property("two runs are bitwise equal, whatever ran before", limit=0.0)
def bits(trial: Trial) -> Deviations:
    module, wanted = trial.copy_module(), trial.step()
    for number in range(1, 6):
        trial.forward(trial.make_tokens(number)[:1, : number + 1], module=module)
        yield compare_outcomes(trial.step(module=module), wanted, RESULT_PREFIXES)
        module.zero_grad()


@layer_property("a forward pass does not reseed the random number generator", cases=SINGLE_CASE)
def seeds(trial: Trial) -> Deviations:
    trial.forward(seed=UNUSUAL_SEED)
    yield Deviation(float(torch.initial_seed() != UNUSUAL_SEED), "the seed after the forward pass")


@layer_property("a forward pass changes neither its inputs nor global settings", cases=SINGLE_CASE, limit=0.0)
def side_effects(trial: Trial) -> Deviations:
    for x, mask in ((trial.make_tokens(), None), make_padded_batch(trial, 3.0)):
        given = {"the tokens": x, **({} if mask is None else {"the mask": mask})}
        kept, changed = {name: tensor.clone() for name, tensor in given.items()}, []

        def run(function: RunFunction, x: Tensor, changed: list[str] = changed) -> Any:
            before = read_settings()
            with preserve_settings():
                out = function(x)
                after = read_settings()
            changed += [name for name, value in before.items() if after[name] != value]
            return out

        trial.forward(x, mask, run=run)
        changed += [name for name, tensor in given.items() if not torch.equal(tensor, kept[name])]
        yield Deviation(len(changed), f"it changed {', '.join(changed)}{'' if mask is None else ', padded'}")


@layer_property("forward passes of two threads do not interfere", cases=SINGLE_CASE, is_deterministic_only=True)
def threads(trial: Trial) -> Deviations:
    wanted = [trial.forward(trial.make_tokens(number)) for number in (0, 1)]
    for path in [*find_submodules(trial), ""]:
        for found, alone in zip(run_two_threads(trial, path), wanted, strict=True):
            yield compare_outcomes(found, alone, context=f", while the other is at {path or 'its end'}")


def run_two_threads(trial: Trial, path: str) -> list[Outcome]:
    """Run a forward pass that pauses at a submodule or at its end, while another thread runs a second forward pass.
    Return both outcomes."""
    module, other = trial.copy_module(), list[Future[Outcome]]()
    with ThreadPoolExecutor(1) as pool:

        def stop(*hooked: object) -> None:
            hook.remove()
            other.append(pool.submit(trial.forward, trial.make_tokens(1), module=module))
            wait(other, PATIENCE)  # a module may serialize its forward passes with a lock

        part = module.get_submodule(path)
        hook = part.register_forward_pre_hook(stop) if path else part.register_forward_hook(stop)
        return [trial.forward(module=module), other[0].result(PATIENCE)]


def find_submodules(trial: Trial) -> list[str]:
    """Return the paths of up to `MAX_PARTS` submodules that a forward pass calls."""
    module, called = trial.copy_module(), dict[str, None]()
    for path, part in list(module.named_modules())[1:]:
        part.register_forward_pre_hook(lambda part, inputs, path=path: called.update({path: None}))
    trial.forward(module=module)
    return list(called)[:: max(1, -(-len(called) // MAX_PARTS))]


@layer_property("a forward pass that raised leaves no traces", cases=SINGLE_CASE)
def raised(trial: Trial) -> Deviations:
    wanted = trial.step()
    for path, _ in list(trial.module.named_modules())[1:]:
        module = trial.copy_module()
        hook = module.get_submodule(path).register_forward_pre_hook(raise_injected_error)
        try:
            trial.step(trial.make_tokens(1), module=module)
            continue  # the forward pass does not call this submodule
        except InjectedError:
            hook.remove()
        module.zero_grad()
        yield compare_outcomes(trial.step(module=module), wanted, context=f", after an error in {path}")


class InjectedError(Exception):
    """An error that is deliberately raised in a forward pass."""


def raise_injected_error(module: nn.Module, inputs: object) -> None:
    raise InjectedError


@layer_property("a copy of a used module computes the same, independently of it", cases=SINGLE_CASE)
def deepcopy(trial: Trial) -> Deviations:
    module = trial.copy_module()
    trial.step(module=module)
    module.zero_grad()
    copied = copy.deepcopy(module)
    wanted = trial.step(module=module)
    yield compare_outcomes(trial.step(module=copied), wanted)
    scale_weights(copied, 0.0)
    yield compare_outcomes(trial.forward(module=module), wanted, "output", ", when the weights of a copy change")


@layer_property(
    "weights of another module compute the same when loaded into a used copy or one constructed on meta",
    cases=SINGLE_CASE,
    modes=EVAL_ONLY,
)
def save_load(trial: Trial) -> Deviations:
    module, used, empty = trial.copy_module().train(), trial.copy_module(), trial.copy_module().to("meta")
    trial.step(module=module)
    scale_weights(module, 1.5)
    # this forward pass may pack the weights; after loading, the packed copies are stale
    trial.forward(module=used)
    empty.to_empty(device=trial.make_tokens().device)
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.detach().fill_(3)
    for how, other in ((", of a used copy", used), (", of one constructed on meta", empty)):
        other.load_state_dict(module.state_dict())
        yield compare_outcomes(trial.forward(module=other), trial.forward(module=module.eval()), context=how)


@layer_property("inference mode gives the same results and leaves no traces", modes=EVAL_ONLY)
def inference_mode(trial: Trial) -> Deviations:
    module = trial.copy_module()
    with torch.inference_mode():
        found = trial.forward(module=module)
    yield compare_outcomes(trial.step(module=module), found)


@layer_property(
    "a token alone gets the same output in eval as in training",
    cases=SINGLE_CASE,
    modes=TRAINING_ONLY,
    is_deterministic_only=True,
)
def output_eval(trial: Trial) -> Deviations:
    if False not in trial.deterministic_modes:
        raise NotApplicableError("the module draws random numbers in eval mode")
    one = trial.make_tokens()[:1, :1]
    yield compare_outcomes(replace(trial, training=False).forward(one), trial.forward(one), names="output")


def scale_weights(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(factor)
