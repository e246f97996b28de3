"""FSDP2 and DDP on two gloo processes learn what one process does, also where ranks or experts get no token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import wrapper_checks as checks
from support.parallel_workers import Workers
from support.paths import PATHS, SOME_PATHS, Path, some_first
from support.versions import SHARDS_LISTS

pytestmark = pytest.mark.slow
paths = pytest.mark.parametrize("path", some_first(PATHS), ids=str)
DDP = "DDP, with ranks without tokens, experts without tokens on one rank or on all (two processes)"


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def lists_can_be_sharded(request: pytest.FixtureRequest) -> None:
    given = request.node.callspec.params
    alone = given.get("wrap") in ("experts", "parts and layer") or "test_sharded_experts" in request.node.name
    if alone and given["path"].experts == "ExpertList" and not SHARDS_LISTS:
        pytest.skip("this torch shards no list of modules, whatever its forward")


@pytest.mark.feature("`fully_shard` (FSDP2) on the gates alone: learns as one process does (two processes)")
@paths
def test_sharded_gates(workers: Workers, path: Path):
    workers.run(checks.check_wrapped, checks.RANKS, path, "gates")


@pytest.mark.feature("`fully_shard` on the experts alone: likewise")
@paths
def test_sharded_experts(workers: Workers, path: Path):
    workers.run(checks.check_wrapped, checks.RANKS, path, "experts")


@pytest.mark.feature("`fully_shard` on the layer, and on gates, experts and layer: likewise")
@pytest.mark.parametrize("wrap", ["layer", "parts and layer"])
@paths
def test_sharded_layer(workers: Workers, path: Path, wrap: str):
    workers.run(checks.check_wrapped, checks.RANKS, path, wrap)


@pytest.mark.feature(DDP)
@paths
def test_ddp(workers: Workers, path: Path):
    workers.run(checks.check_wrapped, checks.RANKS, path, "DDP")


@pytest.mark.feature(DDP)
@paths
def test_ddp_with_starved_experts(workers: Workers, path: Path):
    workers.run(checks.check_starved, checks.RANKS, path)


@pytest.mark.feature("activation checkpointing under `fully_shard` and DDP (two processes)")
@pytest.mark.parametrize("wrap", ["experts", "parts and layer", "DDP"])
@paths
def test_recomputed(workers: Workers, path: Path, wrap: str):
    workers.run(checks.check_recomputed, checks.RANKS, path, wrap)


@pytest.mark.feature("`fully_shard` with bfloat16 parameters, on the experts and on the layer (two processes)")
@pytest.mark.parametrize("wrap", ["experts", "layer"])
@paths
def test_bfloat16(workers: Workers, path: Path, wrap: str):
    workers.run(checks.check_bfloat16, checks.RANKS, path, wrap)


@pytest.mark.parametrize("path", SOME_PATHS, ids=str)
def test_residual_in_place(workers: Workers, path: Path):
    """`out += x` right after a sharded layer, whose gradient comes through nothing but `out`."""
    workers.run(checks.check_residual, checks.RANKS, path)
