"""Measures numerical properties: the accuracy of gradients, compared with finite differences, and the effects of lower
precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mixture_of_experts.verify.properties import EVAL_ONLY, layer_property
from mixture_of_experts.verify.trial import (
    Case,
    Deviation,
    Deviations,
    NotApplicableError,
    Trial,
    compare_outcomes,
    make_output_weights,
)

DIFFERENCE_STEPS = (1e-3, 1e-4, 1e-5)  # step sizes of finite differences, relative to the norm of the perturbed tensor
CLOSE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
BATCH_CASES, MANY_TOKENS_CASES = (Case(4, 32, 0),), (Case(1 << 14, 1, 0),)
# maximum fraction of tokens that choose differently; rounding a router to bfloat16 changes 1 in 1000 or more
MAX_CHANGED_SHARE = 1e-4


@layer_property("gradients match finite differences in float64", limit=GRADIENT_TOLERANCE)
def gradients(trial: Trial) -> Deviations:
    if trial.limit > GRADIENT_TOLERANCE:
        raise NotApplicableError("the module's precision is too low for finite differences")
    module, x = convert_module(trial, torch.float64), trial.make_tokens(dtype=torch.float64)
    randomize_zero_parameters(module, trial.case.seed)
    for of in ("both", "loss") if trial.loss is not None else ("both",):  # the output may hide the loss
        yield from compare_with_differences(trial, module, x, of)


def compare_with_differences(trial: Trial, module: nn.Module, x: Tensor, of: str) -> Deviations:
    """Compare the gradients of the loss, or of the weighted output plus the loss, with finite differences."""
    found, weights = trial.step(x, module=copy.deepcopy(module), loss_from=of), make_output_weights(x)
    leaves = {f"gradient of {name}": parameter.data for name, parameter in module.named_parameters()}
    leaves["input gradient"] = x
    grads = {name: grad for name, grad in found.items() if name in leaves}
    largest = max(grad.norm().item() for grad in grads.values())
    # float32 routers round the loss, and a balanced batch has no gradient that exceeds the rounding errors
    floor = abs(compute_objective(trial, module, x, weights, of)) if of == "loss" else 0.0
    for name, grad in grads.items():
        leaf = leaves[name]
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(trial.case.seed)).to(leaf)
        size = leaf.norm().clamp(min=1e-2).item()
        direction *= size / direction.norm()
        wanted, error = (grad * direction).sum().item(), float("inf")
        scale = max(grad.norm().item() * size, 1e-3 * largest, floor, 1e-12)
        for step in DIFFERENCE_STEPS:  # if a step changes a choice, try a smaller one
            leaf += step * direction
            high = compute_objective(trial, module, x, weights, of)
            leaf -= 2 * step * direction
            low = compute_objective(trial, module, x, weights, of)
            leaf += step * direction
            error = min(error, abs((high - low) / (2 * step) - wanted) / scale)
            if error < CLOSE_TOLERANCE:
                break
        yield Deviation(error, f"{name}{', of the loss' * (of == 'loss')}")


@torch.no_grad()
def randomize_zero_parameters(module: nn.Module, seed: int) -> None:
    """Randomize parameters that contain only zeros. If all router weights are zero, all scores tie, and any step
    changes the choices. Other zero parameters hide the gradients that they multiply."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def compute_objective(trial: Trial, module: nn.Module, x: Tensor, weights: Tensor, of: str) -> float:
    """Return the scalar objective that a step differentiates."""
    outcome = trial.forward(x, module=copy.deepcopy(module))
    loss = float(outcome.get("loss", 0.0))
    return loss if of == "loss" else loss + (outcome["output"] * weights).sum().item()


@layer_property(
    "bfloat16 only rounds outputs if choices are the same",
    needs="router",
    cases=BATCH_CASES,
    is_deterministic_only=True,
    limit=2.0**-5,
)
def bfloat16(trial: Trial) -> Deviations:
    (low, exact), x = convert_to_both_dtypes(trial), trial.make_tokens(dtype=torch.bfloat16)
    same = (trial.read_choices(low, x) == trial.read_choices(exact, x.double())).all(dim=-1)
    found, wanted = trial.forward(x, module=low)["output"], trial.forward(x.double(), module=exact)["output"]
    yield compare_outcomes({"output": found[same]}, {"output": wanted[same]})
    yield Deviation(float(found.dtype != x.dtype), f"output in {found.dtype}")


@layer_property(
    "tokens make the same choices in bfloat16 as in float64",
    needs="router",
    cases=MANY_TOKENS_CASES,
    modes=EVAL_ONLY,
    is_deterministic_only=True,
    limit=MAX_CHANGED_SHARE,
)
def router_bfloat16(trial: Trial) -> Deviations:
    (low, exact), x = convert_to_both_dtypes(trial), trial.make_tokens(dtype=torch.bfloat16)
    yield measure_changed_choices(trial.read_choices(low, x), trial.read_choices(exact, x.double()))


@layer_property(
    "tokens make the same choices with and without autocast",
    needs="router",
    cases=MANY_TOKENS_CASES,
    modes=EVAL_ONLY,
    is_deterministic_only=True,
    limit=MAX_CHANGED_SHARE,
)
def router_autocast(trial: Trial) -> Deviations:
    module, x = trial.copy_module(), trial.make_tokens()
    with torch.autocast(x.device.type, torch.bfloat16):
        found = trial.read_choices(module, x)
    yield measure_changed_choices(found, trial.read_choices(module, x))


def measure_changed_choices(found: Tensor, wanted: Tensor) -> Deviation:
    share = (found != wanted).any(dim=-1).double().mean().item()
    return Deviation(share, f"{share:.1%} of the tokens choose other experts")


def convert_module(trial: Trial, dtype: torch.dtype) -> nn.Module:
    """Return the module converted to `dtype`, or raise `NotApplicableError` if it does not run in that dtype."""
    module = trial.copy_module().to(dtype)
    try:
        trial.forward(trial.make_tokens(dtype=dtype), module=copy.deepcopy(module))
    except Exception as error:
        raise NotApplicableError(f"the module does not run in {dtype}: {str(error).splitlines()[0]}") from None
    return module


def convert_to_both_dtypes(trial: Trial) -> tuple[nn.Module, nn.Module]:
    """Return the module in bfloat16 and in float64, with the same parameters and buffers."""
    low, exact = convert_module(trial, torch.bfloat16), convert_module(trial, torch.float64)
    exact.load_state_dict(low.state_dict())
    return low, exact
