"""Numbers: gradients against differences, and what lower precision changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mixture_of_experts.verify.properties import EVAL, keeps
from mixture_of_experts.verify.subject import INPUTS, Case, DoesNotApplyError, Gap, Sample, Trial, gap

Choose = Callable[[Tensor], Tensor]
STEPS = (1e-3, 1e-4, 1e-5)  # of a difference, relative to the size of what moves
CLOSE, ROUGH = 1e-4, 1e-3
BATCH, MANY = (Case(4, 32, 0),), (Case(512, 1, 0),)
HALVINGS = 10  # of the way between two tokens that choose otherwise
A_TIE = 0.01


@keeps("gradients are those of differences in float64", limit=1e-3)
def gradients(trial: Trial) -> Iterator[Gap]:
    if trial.subject.limit > ROUGH:
        raise DoesNotApplyError("it rounds to fewer digits than differences need")
    module, sample = converted(trial, torch.float64), trial.sample(dtype=torch.float64)
    found = trial.step(sample, module=copy.deepcopy(module))
    grads = {name.removeprefix("gradient of "): grad for name, grad in found.items() if name.startswith("gradient")}
    largest = max(grad.norm().item() for grad in grads.values())
    for name, grad in grads.items():
        leaf = sample.x if name == INPUTS else module.get_parameter(name).detach()
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(trial.case.seed)).to(leaf)
        direction *= leaf.norm().clamp(min=1e-2) / direction.norm()
        scale = max(grad.norm().item() * direction.norm().item(), 1e-3 * largest, 1e-12)
        error = float("inf")
        for step in STEPS:  # a choice that a step turns is no slope: a smaller one is taken
            high, low = (value(trial, module, sample, name, side * step * direction) for side in (1, -1))
            error = min(error, abs((high - low) / (2 * step) - (grad * direction).sum().item()) / scale)
            if error < CLOSE:
                break
        yield Gap(error, f"gradient of {name}")


def value(trial: Trial, module: nn.Module, sample: Sample, name: str, shift: Tensor) -> float:
    """The sum of output times cotangent, plus the loss, where inputs or a parameter are shifted."""
    module = copy.deepcopy(module)
    if name == INPUTS:
        sample = replace(sample, x=sample.x + shift)
    else:
        module.get_parameter(name).data.add_(shift)
    outcome = trial.forward(sample, module)
    return (outcome["output"] * sample.cotangent).sum().item() + float(outcome.get("loss", 0.0))


@keeps("bfloat16 only rounds outputs, by the same choices", "router", cases=BATCH, steady=True, limit=2.0**-5)
def bfloat16(trial: Trial) -> Iterator[Gap]:
    (low, exact), sample = in_both(trial), trial.sample(dtype=torch.bfloat16)
    wide = replace(sample, x=sample.x.double())
    same = ~differ(trial.subject.chosen(low, sample.x), trial.subject.chosen(exact, wide.x))
    found, wanted = trial.forward(sample, low)["output"], trial.forward(wide, exact)["output"]
    yield gap({"output": found.double()[same]}, {"output": wanted[same]})
    yield Gap(float(found.dtype != sample.x.dtype), f"output in {found.dtype}")


@keeps("in bfloat16 tokens choose as in float64", "router", cases=MANY, modes=EVAL, steady=True, limit=A_TIE)
def router_bfloat16(trial: Trial) -> Iterator[Gap]:
    (low, exact), chosen = in_both(trial), trial.subject.chosen
    yield turned(partial(chosen, low), lambda x: chosen(exact, x.double()), trial.sample(dtype=torch.bfloat16).x)


@keeps("under autocast tokens choose as without", "router", cases=MANY, modes=EVAL, steady=True, limit=A_TIE)
def router_autocast(trial: Trial) -> Iterator[Gap]:
    x, choose = trial.sample().x, partial(trial.subject.chosen, trial.fresh())
    yield turned(torch.autocast(x.device.type, torch.bfloat16)(choose), choose, x)


def turned(choose: Choose, exactly: Choose, x: Tensor) -> Gap:
    """How many tokens choose otherwise than exactly, of tokens near a tie: between neighbours of `x` whose exact
    choices differ, close to where the choice turns."""
    first, second, start = x, x.roll(1, 0), exactly(x)
    for _ in range(HALVINGS):
        middle = (first + second) / 2
        like_first = ~differ(exactly(middle), start).unsqueeze(-1)
        first, second = torch.where(like_first, middle, first), torch.where(like_first, second, middle)
    x = torch.cat([first, second])
    share = differ(choose(x), exactly(x)).double().mean().item()
    return Gap(share, f"{share:.1%} of the tokens near a tie choose other experts")


def converted(trial: Trial, dtype: torch.dtype) -> nn.Module:
    """The module in another dtype, in which it has to run."""
    module = trial.fresh().to(dtype)
    try:
        trial.forward(trial.sample(dtype=dtype), copy.deepcopy(module))
    except Exception as error:
        raise DoesNotApplyError(f"it does not run in {dtype}: {str(error).splitlines()[0]}") from None
    return module


def in_both(trial: Trial) -> tuple[nn.Module, nn.Module]:
    """The module in bfloat16, and in float64 with the same numbers."""
    low, exact = converted(trial, torch.bfloat16), converted(trial, torch.float64)
    exact.load_state_dict(low.state_dict())
    return low, exact


def differ(first: Tensor, second: Tensor) -> Tensor:
    """`(b, n)` bool, the tokens with other experts."""
    wide, narrow = sorted((first, second), key=lambda chosen: -chosen.shape[-1])
    e = narrow.shape[-1]
    return (wide[..., :e] != narrow).any(dim=-1) | wide[..., e:].any(dim=-1)
