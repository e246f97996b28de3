"""Numbers: gradients against differences, and what lower precision changes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mixture_of_experts.verify.properties import EVAL, keeps
from mixture_of_experts.verify.trial import Case, DoesNotApplyError, Gap, Gaps, Trial, gap, weights_of

STEPS = (1e-3, 1e-4, 1e-5)  # of a difference, relative to the size of what moves
CLOSE, ROUGH = 1e-4, 1e-3
BATCH, MANY = (Case(4, 32, 0),), (Case(1 << 14, 1, 0),)
FEW = 1e-4  # of tokens that choose otherwise: a router that rounds to bfloat16 turns one of a thousand or more


@keeps("gradients are those of differences in float64", limit=ROUGH)
def gradients(trial: Trial) -> Gaps:
    if trial.limit > ROUGH:
        raise DoesNotApplyError("it rounds to fewer digits than differences need")
    module, x = converted(trial, torch.float64), trial.x(dtype=torch.float64)
    draw_zeros(module, trial.case.seed)
    found, weights = trial.step(x, module=copy.deepcopy(module)), weights_of(x)
    leaves = {f"gradient of {name}": parameter.data for name, parameter in module.named_parameters()}
    leaves["input gradient"] = x
    grads = {name: grad for name, grad in found.items() if name in leaves}
    largest = max(grad.norm().item() for grad in grads.values())
    for name, grad in grads.items():
        leaf = leaves[name]
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(trial.case.seed)).to(leaf)
        size = leaf.norm().clamp(min=1e-2).item()
        direction *= size / direction.norm()
        wanted, error = (grad * direction).sum().item(), float("inf")
        scale = max(grad.norm().item() * size, 1e-3 * largest, 1e-12)
        for step in STEPS:  # a choice that a step turns is no slope: a smaller one is taken
            leaf += step * direction
            high = value(trial, module, x, weights)
            leaf -= 2 * step * direction
            low = value(trial, module, x, weights)
            leaf += step * direction
            error = min(error, abs((high - low) / (2 * step) - wanted) / scale)
            if error < CLOSE:
                break
        yield Gap(error, name)


@torch.no_grad()
def draw_zeros(module: nn.Module, seed: int) -> None:
    """Draw parameters that are all zero: at the zeros of a router all scores tie, so that any difference changes
    choices, and other zeros hide the gradients that they multiply."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def value(trial: Trial, module: nn.Module, x: Tensor, weights: Tensor) -> float:
    """What a step differentiates."""
    outcome = trial.forward(x, module=copy.deepcopy(module))
    return (outcome["output"] * weights).sum().item() + float(outcome.get("loss", 0.0))


@keeps("bfloat16 only rounds outputs, by the same choices", needs="router", cases=BATCH, steady=True, limit=2.0**-5)
def bfloat16(trial: Trial) -> Gaps:
    (low, exact), x = in_both(trial), trial.x(dtype=torch.bfloat16)
    same = (trial.chosen(low, x) == trial.chosen(exact, x.double())).all(dim=-1)
    found, wanted = trial.forward(x, module=low)["output"], trial.forward(x.double(), module=exact)["output"]
    yield gap({"output": found[same]}, {"output": wanted[same]})
    yield Gap(float(found.dtype != x.dtype), f"output in {found.dtype}")


@keeps("in bfloat16 tokens choose as in float64", needs="router", cases=MANY, modes=EVAL, steady=True, limit=FEW)
def router_bfloat16(trial: Trial) -> Gaps:
    (low, exact), x = in_both(trial), trial.x(dtype=torch.bfloat16)
    yield turned(trial.chosen(low, x), trial.chosen(exact, x.double()))


@keeps("under autocast tokens choose as without", needs="router", cases=MANY, modes=EVAL, steady=True, limit=FEW)
def router_autocast(trial: Trial) -> Gaps:
    module, x = trial.fresh(), trial.x()
    with torch.autocast(x.device.type, torch.bfloat16):
        found = trial.chosen(module, x)
    yield turned(found, trial.chosen(module, x))


def turned(found: Tensor, wanted: Tensor) -> Gap:
    share = (found != wanted).any(dim=-1).double().mean().item()
    return Gap(share, f"{share:.1%} of the tokens choose other experts")


def converted(trial: Trial, dtype: torch.dtype) -> nn.Module:
    """The module in another dtype, in which it has to run."""
    module = trial.fresh().to(dtype)
    try:
        trial.forward(trial.x(dtype=dtype), module=copy.deepcopy(module))
    except Exception as error:
        raise DoesNotApplyError(f"it does not run in {dtype}: {str(error).splitlines()[0]}") from None
    return module


def in_both(trial: Trial) -> tuple[nn.Module, nn.Module]:
    """The module in bfloat16, and in float64 with the same numbers."""
    low, exact = converted(trial, torch.bfloat16), converted(trial, torch.float64)
    exact.load_state_dict(low.state_dict())
    return low, exact
