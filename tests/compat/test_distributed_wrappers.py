"""FSDP2 and DDP on two gloo processes learn what one process does, also where ranks or experts get no token."""

from __future__ import annotations

import copy

import pytest
import torch
from support import data_parallel_checks as checks
from support.layer_variants import LAYER_VARIANTS, QUICK_LAYER_VARIANTS, LayerVariant, put_quick_first
from support.parallel_workers import Workers
from support.versions import SHARDS_LISTS
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.parallel import shard_routers

pytestmark = pytest.mark.slow
paths = pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS), ids=str)
DDP = "DDP, with ranks without tokens, experts without tokens on one rank or on all (two processes)"

OF_LAYER = "`fully_shard` on the layer, and on gates, experts and layer: likewise"
FEATURES = {
    "gates": "`fully_shard` (FSDP2) on the gates alone: learns as one process does (two processes)",
    "experts": "`fully_shard` on the experts alone: likewise",
    "layer": OF_LAYER,
    "parts and layer": OF_LAYER,
    "DDP": DDP,
}


@pytest.fixture(autouse=True)
def lists_can_be_sharded(request: pytest.FixtureRequest) -> None:
    given = request.node.callspec.params
    if (
        given.get("wrap") in ("experts", "parts and layer")
        and "path" in given
        and given["path"].experts == "ExpertList"
        and not SHARDS_LISTS
    ):
        pytest.skip("this torch shards no list of modules, whatever its forward")


@pytest.mark.parametrize(
    "wrap", [pytest.param(wrap, marks=pytest.mark.feature(feature)) for wrap, feature in FEATURES.items()]
)
@paths
def test_wrapped(workers: Workers, path: LayerVariant, wrap: str):
    workers.run(checks.check_wrapped, checks.RANKS, path, wrap)


@pytest.mark.feature(DDP)
@paths
def test_ddp_with_starved_experts(workers: Workers, path: LayerVariant):
    workers.run(checks.check_starved_expert, checks.RANKS, path)


@pytest.mark.feature("activation checkpointing under `fully_shard` and DDP (two processes)")
@pytest.mark.parametrize("wrap", ["experts", "parts and layer", "DDP"])
@paths
def test_recomputed(workers: Workers, path: LayerVariant, wrap: str):
    workers.run(checks.check_wrapped, checks.RANKS, path, wrap, checks.call_recomputed)


@pytest.mark.feature("`fully_shard` with bfloat16 parameters, on the experts and on the layer (two processes)")
@pytest.mark.parametrize("wrap", ["experts", "layer"])
@paths
def test_bfloat16(workers: Workers, path: LayerVariant, wrap: str):
    workers.run(checks.check_bfloat16, checks.RANKS, path, wrap)


@pytest.mark.parametrize("wrap", ["DDP", "layer", "parts and layer"])
def test_batch_invariance(workers: Workers, wrap: str):
    workers.run(checks.check_the_same_bits, checks.RANKS, wrap)


@pytest.mark.parametrize("path", QUICK_LAYER_VARIANTS, ids=str)
def test_residual_in_place(workers: Workers, path: LayerVariant):
    """`out += x` right after a sharded layer, whose gradient comes through nothing but `out`."""
    workers.run(checks.check_residual, checks.RANKS, path)


@pytest.mark.parametrize("apart", [True, False])
def test_routers_under_mixed_precision(apart, one_process):
    """Sharded apart they choose as in float32, on the same tokens of bfloat16; within a larger unit they do not. Torch
    warns of a module that returns a view: that would fail the test."""
    layer = MoE(64, gate=TopKGating(64, 64, 8), experts=GatedExperts(64, 64, 16))
    alone, x = copy.deepcopy(layer.gate), torch.randn(2, 512, 64)
    if apart:
        shard_routers(layer)
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    routings = []
    layer.gate.register_forward_hook(lambda gate, args, routing: routings.append(routing))
    out, aux_loss = layer(x)
    (out.float().square().mean() + aux_loss).backward()
    expected = alone(x.bfloat16())
    same = (routings[0].expert.view(-1, 8).sort().values == expected.expert.view(-1, 8).sort().values).all(-1)
    assert bool(same.all()) == apart
    assert layer.gate.w_gating.grad.dtype == torch.float32
