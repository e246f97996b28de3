"""Parts of a layer as units of FSDP2, on two gloo processes: what it must find in results and must not in arguments."""

from __future__ import annotations

import pytest
from support import fsdp2_checks as checks
from support.data_parallel_checks import RANKS
from support.layer_variants import LayerVariant
from support.parallel_workers import Workers
from support.versions import SHARDS_LISTS

pytestmark = pytest.mark.slow
LAYERS = [
    LayerVariant("MoE", "Experts", "capacity", "plain"),
    LayerVariant("MoE", "GatedExperts", "dropless", "plain"),
    LayerVariant("MoE", "ExpertList", "capacity", "plain"),
    LayerVariant("MoE", "custom", "capacity", "plain"),
    LayerVariant("HeirarchicalMoE", "Experts", "capacity", "plain"),
    LayerVariant("HeirarchicalMoE", "GatedExperts", "dropless", "plain"),
]


@pytest.mark.parametrize("loss", checks.LOSSES)
@pytest.mark.parametrize("units", checks.UNITS)
@pytest.mark.parametrize("path", [LAYERS[0], LAYERS[-1]], ids=str)
def test_gates_and_shared_expert_train(workers: Workers, path: LayerVariant, units: str, loss: str):
    """FSDP2 finds every tensor of a gate's result that has a gradient."""
    workers.run(checks.check_gates, RANKS, path, units, loss)


@pytest.mark.parametrize("units", checks.HALF_UNITS)
@pytest.mark.parametrize("path", LAYERS, ids=str)
def test_experts_in_bfloat16_receive_float32_weights(workers: Workers, path: LayerVariant, units: str):
    if path.experts == "ExpertList" and not SHARDS_LISTS:
        pytest.skip("this torch shards no list of modules, whatever its forward")
    workers.run(checks.check_weights, RANKS, path, units)
