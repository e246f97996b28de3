"""Who can run: contestants by the names that the cases use. The rivals are on the same weights. Each is optional: one
that is missing is skipped with a line saying how to get it.

mixture-of-experts 0.2.3, whose import name is this package's, is in a folder that an environment variable names (the
option --published sets it).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks import baselines, contestants
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, MissingError, check_output, make_module_contestant, make_state_dict
from benchmarks.gpu_shapes import Shape
from benchmarks.problem import Inputs, LoopMoE, Weights, expected_output
from benchmarks.problem import inputs as make_inputs
from benchmarks.problem import weights as make_weights

PUBLISHED = "BENCHMARKS_PUBLISHED"
GET_PUBLISHED = "pip install --no-deps --target FOLDER mixture-of-experts==0.2.3, then --published FOLDER"


def make_loop(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The plain loop over experts."""
    module = LoopMoE(case, weights, inputs.threshold)
    note = "top-k, one-hot and cumsum for the slots, then per expert gather, products and index_add; no auxiliary loss"
    return make_module_contestant("loop", case, inputs, module, lambda x: (module(x), None), note=note)


def published_module() -> ModuleType:
    """mixture-of-experts 0.2.3 under another name: its own is this package's."""
    name = "published_mixture_of_experts"
    if name in sys.modules:
        return sys.modules[name]
    folder = os.environ.get(PUBLISHED)
    if not folder:
        raise MissingError(GET_PUBLISHED)
    versions = {found.metadata["Name"]: found.version for found in distributions(path=[folder])}
    if versions.get("mixture-of-experts", versions.get("mixture_of_experts")) != "0.2.3":
        raise MissingError(f"{folder} holds {versions}, not mixture-of-experts 0.2.3: {GET_PUBLISHED}")
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "mixture_of_experts" / "mixture_of_experts.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_layer(case: Case) -> nn.Module:
    module = published_module()
    options = {
        "second_policy_train": case.policy,
        "second_policy_eval": case.policy,
        "capacity_factor_train": case.factor,
        "capacity_factor_eval": case.factor,
    }
    if case.inner:
        return module.HeirarchicalMoE(case.d, (case.e, case.inner), case.h, nn.GELU, **options)
    return module.MoE(case.d, case.e, case.h, nn.GELU, **options)


def make_published(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """mixture-of-experts 0.2.3."""
    if not case.router_is_top2 or case.factor is None or case.policy == "threshold" or case.dtype != "float32":
        raise MissingError("0.2.3 has no such configuration")
    if case.mode == "construct":
        published_module()
        return Contestant("0.2.3", lambda: (published_layer(case), None)[1], case, note="building the module")
    module = published_layer(case)
    module.load_state_dict(make_state_dict(case, weights), assign=True)
    return make_module_contestant("0.2.3", case, inputs, module, module, note="output and auxiliary loss, GELU experts")


def transformers_block(family: str, backend: str):
    """A builder for the sparse block of Mixtral or Qwen3-MoE with an experts backend."""

    def build(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
        if importlib.util.find_spec("transformers") is None:
            raise MissingError("pip install transformers")
        block = {"mixtral": mixtral_block, "qwen3": qwen3_block}[family](case, backend)
        assert weights.w3 is not None
        gate_up = torch.cat([weights.w1, weights.w3], dim=-1).transpose(1, 2).contiguous()
        down = weights.w2.transpose(1, 2).contiguous()
        parts = {"gate.weight": weights.w_gating.T.contiguous(), "experts.gate_up_proj": gate_up}
        block.load_state_dict(parts | {"experts.down_proj": down}, assign=True)
        note = f"experts_implementation={backend!r}; the block has no auxiliary loss"
        return make_module_contestant(f"{family} {backend}", case, inputs, block, lambda x: (block(x), None), note=note)

    return build


def mixtral_block(case: Case, backend: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": case.d, "intermediate_size": case.h, "num_local_experts": case.e}
    return MixtralSparseMoeBlock(MixtralConfig(**sizes, num_experts_per_tok=case.k, experts_implementation=backend))


def qwen3_block(case: Case | Shape, backend: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": case.d, "moe_intermediate_size": case.h, "num_experts": case.e}
    options = {"num_experts_per_tok": case.k, "norm_topk_prob": True, "experts_implementation": backend}
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, **options))


Builder = Callable[[Case, Weights, Inputs], Contestant]

BUILDERS: dict[str, Builder] = {
    "layer": contestants.layer,
    "layer balanced": contestants.make_variant("layer balanced", skew=0.0),
    "layer dropless": contestants.make_variant("layer dropless", factor=None),
    "layer bfloat16": contestants.make_variant("layer bfloat16", dtype="bfloat16"),
    "layer compiled": contestants.compiled,
    "layer packed": contestants.packed,
    "products": baselines.products,
    "router + products": baselines.router_and_products,
    "roofline": baselines.roofline,
    "dense": baselines.dense,
    "by hand": baselines.decode_by_hand,
    "loop": make_loop,
    "0.2.3": make_published,
    **{
        f"{family} {backend}": transformers_block(family, backend)
        for family in ("mixtral", "qwen3")
        for backend in ("eager", "grouped_mm", "batched_mm")
    },
}


def build_contestants(case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The case's contestants, and why each that is missing is missing."""
    found = {name: build(name, case) for name in case.contestants}
    present = {name: one for name, one in found.items() if isinstance(one, Contestant)}
    return present, {name: one for name, one in found.items() if isinstance(one, str)}


def build(name: str, case: Case) -> Contestant | str:
    """The contestant, or why it is missing."""
    try:
        return BUILDERS[name](case, make_weights(case), make_inputs(case))
    except MissingError as reason:
        return str(reason)


def check_all(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Compare everyone that computes the layer with the plain loop (two levels: with each other). Error by name."""
    errors: dict[str, float] = {}
    known: dict[Case, object] = {}
    for name, contestant in contestants.items():
        if contestant.output is None:
            continue
        case = contestant.case
        if case not in known:
            known[case] = contestant.output() if case.inner else compute_expected_output(case)
        errors[name] = check_output(contestant, known[case])
    return errors


def compute_expected_output(case: Case):
    return expected_output(case, make_weights(case), make_inputs(case))
