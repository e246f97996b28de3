"""A contestant: something that can be timed, measured and, if it computes the layer, compared. This package's layer as
one, in the configuration that a case asks for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.problem import Inputs, Weights
from benchmarks.problem import inputs as make_inputs
from benchmarks.problem import weights as make_weights

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


def make_module_contestant(
    name: str, case: Case, inputs: Inputs, module: nn.Module, forward: Forward, **more
) -> Contestant:
    """A contestant that is a layer: `module` owns the parameters, `forward` calls it."""
    module.train(case.mode == "train")
    made = make_function_contestant(name, case, inputs, forward, module.parameters(), **more)
    made.output = lambda: whole_output(case, inputs.x, forward)
    return made


def make_function_contestant(
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


def check_output(contestant: Contestant, expected: Tensor) -> float:
    """The largest error in units of the largest expected |output|; raises where it exceeds the tolerance."""
    assert contestant.output is not None
    error = (contestant.output().float() - expected).abs().max() / expected.abs().max()
    if not error <= contestant.tolerance:
        raise AssertionError(
            f"{contestant.name} computes something else in case {contestant.case.name}: its output differs by "
            f"{error:.2e} of the largest value, allowed {contestant.tolerance:.0e}. It is not timed."
        )
    return error.item()


def build(case: Case, threshold: float = 0.2) -> nn.Module:
    """The layer with fresh weights."""
    from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating

    top2 = {
        "capacity_factor_train": case.factor,
        "capacity_factor_eval": case.factor,
        "second_policy_train": case.policy,
        "second_policy_eval": case.policy,
        "second_threshold_train": threshold,
        "second_threshold_eval": threshold,
    }
    if case.inner:
        return HeirarchicalMoE(case.d, (case.e, case.inner), case.h, nn.GELU, **top2)
    if case.router_is_top2:
        return MoE(case.d, case.e, case.h, nn.GELU, **top2)
    factors = {"capacity_factor_train": case.factor, "capacity_factor_eval": case.factor}
    gate = TopKGating(case.d, case.e, case.k, **factors)
    experts = (GatedExperts if case.gated else Experts)(case.d, case.e, case.h)
    return MoE(case.d, case.e, experts=experts, gate=gate)


def make_state_dict(case: Case, weights: Weights) -> dict[str, torch.Tensor]:
    """The weights under the layer's state-dict keys."""
    gate = {"gate.w_gating": weights.w_gating}
    if case.inner:
        gate = {"gate_outer.w_gating": weights.w_gating, "gate_inner.w_gating": weights.w_inner}
    experts = {f"experts.{key}": getattr(weights, key) for key in ("w1", "w2", "w3")}
    return {key: value for key, value in (gate | experts).items() if value is not None}


def load_layer(case: Case, weights: Weights, inputs: Inputs) -> nn.Module:
    module = build(case, inputs.threshold)
    module.load_state_dict(make_state_dict(case, weights), assign=True)
    return module


def layer(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The layer as the case has it."""
    if case.mode == "construct":
        return Contestant("layer", lambda: (build(case), None)[1], case, note="building the module")
    module = load_layer(case, weights, inputs)
    note = "output and auxiliary loss" + (", backward through both" if case.mode == "train" else "")
    return make_module_contestant("layer", case, inputs, module, module, note=note)


def packed(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The layer on rows of eight documents of unequal lengths. With a capacity other choices are dropped."""
    module = load_layer(case, weights, inputs)
    cuts = torch.randperm(case.n - 1, generator=torch.Generator().manual_seed(0))[:7] + 1
    ids = (torch.arange(case.n).unsqueeze(-1) >= cuts).sum(dim=-1).expand(case.b, case.n).contiguous()
    made = make_module_contestant(
        "layer packed", case, inputs, module, lambda x: module(x, segment_ids=ids), note="the layer with segment_ids"
    )
    if case.factor is not None:
        made.output = None
    return made


def make_variant(name: str, **changed):
    """A builder for the layer on the same case with something changed."""

    def build_variant(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
        other = replace(case, **changed)
        made = layer(other, make_weights(other), make_inputs(other))
        made.name, made.note = name, f"the layer with {changed}"
        made.tolerance = 3e-2 if other.dtype == "bfloat16" else made.tolerance
        return made

    return build_variant


def compiled(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The layer under torch.compile with its default settings."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise MissingError("torch.compile needs a C++ compiler on the CPU: install g++ or clang++")
    module = load_layer(case, weights, inputs)
    return make_module_contestant(
        "layer compiled", case, inputs, module, torch.compile(module), note="torch.compile(layer)"
    )
