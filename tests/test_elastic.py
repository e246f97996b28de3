"""`examples/elastic.py` by two agents of torchrun, of which one is killed. `experiments.elastic` does it more often."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from experiments import elastic

pytestmark = pytest.mark.slow


def test_a_node_is_killed_and_the_other_one_goes_on(tmp_path: Path):
    """At most the steps since the last checkpoint are lost. When they are done again, their losses are the same."""
    pytest.importorskip("transformers")
    options = f"--steps 64 --context 16 --save-every {elastic.SAVE_EVERY} --timeout {elastic.TIMEOUT}".split()
    run = elastic.Run(tmp_path / "run", options, kills=1, addresses=("127.0.0.1", "127.0.0.2"))
    (row,) = run.disturb(random.Random(1), ["kill"])
    assert 0 <= row["steps lost"] <= elastic.SAVE_EVERY
    assert (run.seen[-1].step, run.seen[-1].ranks) == (64, 1)
    by_ranks = [{line.step: line.loss for line in run.seen if line.ranks == ranks} for ranks in (1, 2)]
    again = by_ranks[0].keys() & by_ranks[1].keys()
    assert len(again) >= row["steps lost"]
    assert all(abs(by_ranks[0][step] - by_ranks[1][step]) < 2e-4 for step in again)
