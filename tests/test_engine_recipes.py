"""Trainers of models with sharded experts, as `docs/distributed/trainers.md` shows, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import engine_recipes as recipes
from support.parallel_workers import Workers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("one_file", [False, True], ids=["folder", "file"])
def test_lightning(workers: Workers, tmp_path: Path, one_file: bool):
    pytest.importorskip("lightning")
    workers.run(recipes.check_lightning, 2, tmp_path, one_file)
    workers.run(recipes.check_lightning_resumes, 1, tmp_path, one_file)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "plugin"])
def test_accelerate(workers: Workers, tmp_path: Path, layout: str):
    pytest.importorskip("accelerate")
    workers.run(recipes.check_accelerate, 2, tmp_path, layout)


@pytest.mark.parametrize(
    ("schedule", "factor", "steps"), [("ScheduleGPipe", 1.0, 1), ("Schedule1F1B", 8.0, 1), ("Schedule1F1B", 1.0, 2)]
)
def test_pipeline(workers: Workers, schedule: str, factor: float, steps: int):
    workers.run(recipes.check_pipeline, 2, schedule, factor, steps)


def test_torchtitan(workers: Workers):
    pytest.importorskip("torchtitan", reason="docs/distributed/trainers.md says how to install it")
    workers.run(recipes.check_torchtitan, 2)
