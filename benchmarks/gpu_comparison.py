"""Compares and times the contestants of a case on a GPU. Each of them is a task.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_contestants
from benchmarks.gpu_cases import GPUCase, compute_logit_gaps, draw_tokens
from benchmarks.gpu_contestants import Contestant, make_layer
from benchmarks.gpu_device import Device
from benchmarks.tasks import Task, Tasks, WrongResultError, find_failure
from mixture_of_experts import MoE, ops

CHECKED_ROWS = 256  # mean rows per expert that are compared: tiles have the same height as for more rows
MAX_ERRORS = {"bfloat16": 3e-2, "autocast": 3e-2, "float16": 1e-2}  # maximum relative error, by norms
#: minimum gap between the last chosen logit and the next: a router that rounds to bfloat16 may swap closer ones
MIN_GAP = 0.05
MAX_SECONDS = 2.0  # seconds that the rounds of a contestant may take
#: estimated seconds of a contestant's task, which includes building and checking it
CONTESTANT_SECONDS = {None: 4.0, "default": 25.0, "reduce-overhead": 15.0}
SELF_CHECK_SECONDS = 8.0  # kernels are checked in a process of their own before their first call of a kind
REFERENCE_SECONDS = 4.0
REFERENCE = "reference"  # name of the task that comes first


@dataclass
class Problem:
    """What the contestants of a case compute.

    Attributes:
        layer: the layer that owns the weights.
        x: tokens, which are timed.
        checked: those of them whose results are compared.
        counts: `(t, 1)` of bool: whether the choices of each checked token are unambiguous.
        grad: gradients of the outputs, of the shape of x.
        expected: outputs of the checked tokens, and in training gradients of tokens, w1, w3 and w2, in float32.
    """

    case: GPUCase
    layer: MoE
    x: Tensor
    checked: Tensor
    counts: Tensor
    grad: Tensor
    expected: list[Tensor]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.case.dtype == "autocast")


def make_problem(case: GPUCase, device: Device) -> Problem:
    """Draw weights and tokens, and compute the expected results by plain operators in float32."""
    training = case.mode == "train"
    layer = make_layer(case.shape, device.name, case.weight_dtype).train(training)
    gate: Any = layer.gate
    x = draw_tokens(case, gate.w_gating)
    checked = x[:, : max(CHECKED_ROWS * case.shape.e // case.shape.k, 1)]
    counts = (compute_logit_gaps(checked.flatten(0, 1), gate.w_gating, case.shape.k) > MIN_GAP).unsqueeze(1)
    if not counts.any():
        raise RuntimeError(f"none of the {len(counts)} checked tokens has unambiguous choices; draw more tokens")
    grad = torch.randn(x.shape, device=x.device)
    problem = Problem(case, layer, x.requires_grad_(training), checked.detach(), counts, grad, [])
    exact = make_layer(case.shape, device.name, torch.float32).train(training)
    exact.load_state_dict(layer.state_dict())
    experts: Any = exact.experts
    weights = [experts.w1, experts.w3, experts.w2]
    reference = Contestant(lambda x: exact(x)[0], [], weights=weights)
    with ops.use("plain", router_kernels=False), torch.autocast(x.device.type, enabled=False):
        problem.expected = compute_results(reference, reference.forward, problem, checked.detach().float())
    return problem


def compute_results(
    contestant: Contestant, call: Callable[[Tensor], Tensor], problem: Problem, x: Tensor
) -> list[Tensor]:
    """Return the outputs of the unambiguous checked tokens, and in training the gradients of tokens and weights."""
    x = x.clone().requires_grad_(problem.case.mode == "train")
    if not x.requires_grad:
        with torch.no_grad():
            return [call(x).flatten(0, 1) * problem.counts]
    out = call(x)
    grad = problem.grad[:, : x.shape[1]] * problem.counts.view(*x.shape[:2], 1)
    grad_x, *gradients = torch.autograd.grad(out, [x, *contestant.weights], grad.to(out.dtype))
    return [out.detach().flatten(0, 1) * problem.counts, grad_x, *contestant.arrange(*gradients)]


def measure_error(contestant: Contestant, call: Callable[[Tensor], Tensor], problem: Problem) -> float | None:
    """Return the largest relative error of outputs and of gradients that can be compared; NaN if one is NaN."""
    if not contestant.computes_layer:
        return None
    found = compute_results(contestant, call, problem, problem.checked)
    pairs = zip(found, problem.expected, strict=False)  # some contestants have no gradients to compare
    errors = [(got.float() - want).norm() / want.norm() for got, want in pairs]
    return float(torch.stack(errors).max())


def make_call(contestant: Contestant, problem: Problem, device: Device) -> Callable[[Tensor], Tensor]:
    """Return what is checked and timed: the contestant's forward, compiled or under autocast if the case says so."""
    forward, mode = contestant.forward, problem.case.compiled
    if mode is not None:
        forward = device.compile_function(forward, mode)

    def call(x: Tensor) -> Tensor:
        with problem.autocast():
            return forward(x)

    return call


def make_step(contestant: Contestant, call: Callable[[Tensor], Tensor], problem: Problem) -> Callable[[], Any]:
    """Return one call, in training with the gradients of tokens and all parameters."""
    x = problem.x

    @torch.no_grad()
    def forward() -> Tensor:
        return call(x)

    if problem.case.mode != "train":
        return forward
    leaves, like = [x, *contestant.parameters], call(x).detach()
    grad = problem.grad.to(like.dtype) if like.shape == x.shape else torch.randn_like(like)
    del like

    def train() -> Any:
        return torch.autograd.grad(call(x), leaves, grad, allow_unused=True)

    return train


def measure(case: GPUCase, name: str, problem: Problem, device: Device) -> dict[str, Any]:
    """Check and time a contestant. A warning of this package is an error: if kernels are turned off, something else
    would be timed under their name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="mixture_of_experts")
        with problem.autocast():
            contestant = gpu_contestants.CONTESTANTS[name](case, problem.layer, problem.checked[:, :1])
        if contestant.module is not None:
            contestant.module.train(case.mode == "train")
        with contestant.context():  # of forward and backward
            return measure_contestant(contestant, problem, device)


def measure_contestant(contestant: Contestant, problem: Problem, device: Device) -> dict[str, Any]:
    """Check a contestant, then measure its times and its peak memory."""
    case = problem.case
    call = make_call(contestant, problem, device)
    error = measure_error(contestant, call, problem)
    if error is not None and not error < MAX_ERRORS[case.dtype]:
        raise WrongResultError(f"its relative error is {error:.1e}, allowed are {MAX_ERRORS[case.dtype]:.0e}")
    step = make_step(contestant, call, problem)
    before = device.read_state()
    times = device.time_step(step, MAX_SECONDS)
    return {
        "error": error,
        **times._asdict(),
        "yardstick": device.time_yardstick().median,
        "peak_bytes": device.count_peak_bytes(step),
        "state": [before, device.read_state()],
    }


def compare(case: GPUCase, device: Device) -> Tasks:
    """Yield the reference as a task, and then each contestant. The problem is created once in each process."""
    problem = functools.cache(lambda: make_problem(case, device))

    def describe() -> dict[str, Any]:
        return {"tokens": case.shape.t, "compared": int(problem().counts.sum())}

    if find_failure((yield Task(REFERENCE, describe, REFERENCE_SECONDS))):
        return
    for name in gpu_contestants.list_contestants(case):
        seconds = CONTESTANT_SECONDS[case.compiled] + ("triton" in name) * SELF_CHECK_SECONDS
        yield Task(name, lambda name=name: measure(case, name, problem(), device), seconds)
