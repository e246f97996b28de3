"""A contestant: something that can be timed, measured and, if it computes the layer, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.problem import Inputs

Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # tokens -> output, auxiliary loss if it has one


class MissingError(Exception):
    """A rival that is not installed, or a mode that this machine cannot run; the message says how to get it."""


@dataclass
class Contestant:
    """name; step: the timed work; output: what is compared, None for a yardstick; case: what its output answers to;
    inputs, parameters: the leaves that a step leaves gradients on; tolerance: of the largest expected |output|.
    """

    name: str
    step: Callable[[], None]
    case: Case
    output: Callable[[], Tensor] | None = None
    inputs: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    note: str = ""
    tolerance: float = 1e-4

    def release(self) -> None:
        """Drop the gradients, as a training loop does between steps. Not timed."""
        for leaf in (*self.inputs, *self.parameters):
            leaf.grad = None


def of_module(name: str, case: Case, inputs: Inputs, module: nn.Module, forward: Forward, **more) -> Contestant:
    """A contestant that is a layer: `module` owns the parameters, `forward` calls it."""
    module.train(case.mode == "train")
    made = of_forward(name, case, inputs, forward, module.parameters(), **more)
    made.output = lambda: whole_output(case, inputs.x, forward)
    return made


def of_forward(
    name: str, case: Case, inputs: Inputs, forward: Forward, parameters: Iterable[Tensor], **more
) -> Contestant:
    """A contestant of one function from tokens to output."""
    x = inputs.x.detach().requires_grad_(case.mode == "train")
    step = {"train": train_step, "forward": forward_step, "decode": decode_step}[case.mode](forward, x, inputs.grad)
    return Contestant(name, step, case, inputs=[x], parameters=list(parameters), **more)


def train_step(forward: Forward, x: Tensor, grad: Tensor) -> Callable[[], None]:
    one = torch.ones(())

    def step() -> None:
        out, aux = forward(x)
        if aux is None:
            torch.autograd.backward(out, grad)
        else:
            torch.autograd.backward((out, aux), (grad, one.expand_as(aux)))

    return step


def forward_step(forward: Forward, x: Tensor, grad: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        forward(x)

    return step


def decode_step(forward: Forward, x: Tensor, grad: Tensor) -> Callable[[], None]:
    tokens = x.split(1)  # (1, 1, d) each

    @torch.no_grad()
    def step() -> None:
        for token in tokens:
            forward(token)

    return step


@torch.no_grad()
def whole_output(case: Case, x: Tensor, forward: Forward) -> Tensor:
    """The output for all tokens, called as the step calls it."""
    parts = x.split(1) if case.mode == "decode" else (x,)
    return torch.cat([forward(part)[0] for part in parts])


def check(contestant: Contestant, expected: Tensor) -> float:
    """The largest error in units of the largest expected |output|; raises where it exceeds the tolerance."""
    assert contestant.output is not None
    error = (contestant.output().float() - expected).abs().max() / expected.abs().max()
    if not error <= contestant.tolerance:
        raise AssertionError(
            f"{contestant.name} computes something else in case {contestant.case.name}: its output differs by "
            f"{error:.2e} of the largest value, allowed {contestant.tolerance:.0e}. It is not timed."
        )
    return error.item()
