"""This package's layer as a contestant, in the configuration that a case asks for."""

from __future__ import annotations

import shutil
from dataclasses import replace

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.contest import Contestant, MissingError, of_module
from benchmarks.problem import Inputs, Weights
from benchmarks.problem import inputs as make_inputs
from benchmarks.problem import weights as make_weights


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


def state(case: Case, weights: Weights) -> dict[str, torch.Tensor]:
    """The weights under the layer's state-dict keys."""
    gate = {"gate.w_gating": weights.w_gating}
    if case.inner:
        gate = {"gate_outer.w_gating": weights.w_gating, "gate_inner.w_gating": weights.w_inner}
    experts = {f"experts.{key}": getattr(weights, key) for key in ("w1", "w2", "w3")}
    return {key: value for key, value in (gate | experts).items() if value is not None}


def loaded(case: Case, weights: Weights, inputs: Inputs) -> nn.Module:
    module = build(case, inputs.threshold)
    module.load_state_dict(state(case, weights), assign=True)
    return module


def layer(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The layer as the case has it."""
    if case.mode == "construct":
        return Contestant("layer", lambda: (build(case), None)[1], case, note="building the module")
    module = loaded(case, weights, inputs)
    note = "output and auxiliary loss" + (", backward through both" if case.mode == "train" else "")
    return of_module("layer", case, inputs, module, module, note=note)


def variant(name: str, **changed):
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
    module = loaded(case, weights, inputs)
    return of_module("layer compiled", case, inputs, module, torch.compile(module), note="torch.compile(layer)")
