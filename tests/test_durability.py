"""`experiments.durability` finds what it looks for. The runs themselves take half an hour."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import durability


def test_states_that_differ_in_one_bit():
    state = {"w": torch.ones(3), "n": [1, (2.0, "x")]}
    assert not list(durability.differences(state, {"w": torch.ones(3), "n": [1, (2.0, "x")]}))
    others = [{"w": torch.ones(3).nextafter(torch.tensor(2.0)), "n": [1, (2.0, "x")]}, {"w": torch.ones(3), "n": [1]}]
    others += [{"w": torch.ones(3).double(), "n": [1, (2.0, "x")]}, {"w": torch.ones(3), "n": [1, (2.5, "x")]}]
    assert [list(durability.differences(state, other)) for other in others] == [
        [".w"],
        ["length of .n"],
        [".w"],
        [".n[1][0]: 2.0 and 2.5"],
    ]


@pytest.mark.slow
def test_half_precision_of_few_steps(tmp_path: Path):
    rows = durability.half_precision(tmp_path, replace(durability.SETTINGS, steps=150))
    assert [row["run"] for row in rows] == list(durability.ROUTERS)


@pytest.mark.slow
def test_a_run_that_is_killed(tmp_path: Path):
    settings = replace(durability.SETTINGS, steps=80)
    (row,) = durability.kills(tmp_path, settings, times=1)
    assert row["kills"] == 1
    assert row["steps lost at most"] <= row["checkpoint every"] == 20
    (record,) = (tmp_path / "killed" / "kills.jsonl").read_text().splitlines()
    assert json.loads(record)["lost"] == row["steps lost at most"]
