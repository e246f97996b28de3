"""The scaling experiment: equal active parameters, a plan that tunes every model, records that are never repeated."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import scaling  # noqa: E402
import scaling_plan  # noqa: E402
import step_times  # noqa: E402
from model import count_parameters  # noqa: E402
from scaling_plan import MODELS, Plan, Run, Stage, rates_to_try  # noqa: E402
from scaling_report import Equal, equal_shares, steps_to, tables  # noqa: E402
from training import make_trainee  # noqa: E402

BASE = scaling.base_settings()
TINY = ["--context=16", "--batch-size=2", "--eval-windows=2", "--steps=5", "--learning-rate=0.3"]


def parameters_of(model: str) -> tuple[int, int]:
    settings = Run(model, 0, 0.01, 1).settings(BASE)
    return count_parameters(make_trainee(settings.models[0], settings).model, 2)


def test_models_have_equal_active_parameters_and_the_wide_one_those_of_32_experts() -> None:
    parameters = {model: parameters_of(model) for model in MODELS}
    active = {parameters[model][1] for model in ("dense", "moe8", "moe32", "moe128")}
    assert max(active) - min(active) < 0.002 * min(active)
    wide, mixture = parameters["wide"][0], parameters["moe32"][0]
    assert abs(wide - mixture) < 0.001 * mixture
    assert wide > 9 * max(active)


# ---- the plan ----


def test_a_sweep_goes_on_to_both_sides_of_the_best_until_half_and_double_are_worse() -> None:
    assert rates_to_try(0.01, {}, 3) == [0.01]
    assert rates_to_try(0.01, {0.01: 2.0}, 3) == [0.01, 0.005, 0.02]
    assert rates_to_try(0.01, {0.01: 2.0, 0.005: 2.1, 0.02: 2.2}, 3) == [0.01, 0.005, 0.02]
    assert rates_to_try(0.01, {0.01: 2.0, 0.005: 2.1, 0.02: 1.9}, 3) == [0.01, 0.005, 0.02, 0.04]
    assert rates_to_try(0.01, {0.01: 2.0, 0.005: 2.1, 0.02: 2.2}, 4)[-1] == 0.0025


def optimum(best: float, runs: list[Run]) -> dict[Run, Any]:
    """Records of runs that are the worse the farther their rate is from the best."""
    return {run: {"held_out": [[run.steps, 2 + abs(run.learning_rate - best) - run.steps / 1e6]]} for run in runs}


def test_the_plan_wants_seeds_at_the_rate_that_the_sweep_found() -> None:
    plan = Plan(100, 0.01, ["moe32"])
    finished: dict[Run, Any] = {}
    while new := [run for run in plan.runs(finished) if run not in finished]:
        assert {run.seed for run in new} == {0} or plan.best_rate("moe32", finished) == 0.04
        finished |= optimum(0.04, new)
    rates = {run.learning_rate for run in finished}
    assert {0.01, 0.02, 0.04, 0.08} <= rates
    assert {(run.seed, run.steps) for run in finished if run.learning_rate == 0.04} >= {(1, 24), (2, 24), (0, 100)}


def test_the_longest_sweep_decides() -> None:
    plan = Plan(100, 0.01, ["dense"])
    short = [Run("dense", 0, rate, 24) for rate in (0.005, 0.01, 0.02, 0.04)]
    finished = optimum(0.02, short)
    assert plan.best_rate("dense", finished) == 0.02
    finished |= optimum(0.01, [Run("dense", 0, rate, 100) for rate in (0.005, 0.01, 0.02)])
    assert plan.best_rate("dense", finished) == 0.01


# ---- what is reported ----


def test_steps_to_a_loss_lie_between_the_lengths_that_were_run() -> None:
    steps, sign = steps_to(2.0, {100: 2.2, 200: 2.1, 400: 1.9})
    assert steps == pytest.approx(200 * 2**0.5)
    assert sign == ""
    assert steps_to(2.0, {100: 1.9, 200: 1.8}) == (100, "<")
    assert steps_to(2.0, {100: 2.2, 200: 2.1}) == (200, ">")


def test_shares_are_of_the_same_seed() -> None:
    plan = Plan(100, 0.01, ["dense", "moe32"])
    finished = optimum(0.01, [Run("dense", 0, rate, 100) for rate in (0.005, 0.01, 0.02)])
    finished |= optimum(0.01, [Run("moe32", 0, rate, 24) for rate in (0.005, 0.01, 0.02)])
    finished[Run("dense", 1, 0.01, 100)] = {"held_out": [[100, 1.5]]}
    finished[Run("moe32", 0, 0.01, 32)] = {"held_out": [[32, 1.8]]}
    finished[Run("moe32", 1, 0.01, 32)] = {"held_out": [[32, 1.8]]}
    shares = equal_shares(plan, finished, "moe32")
    assert 0.24 < shares[0].share < 0.32
    assert shares[1] == Equal(0.32, ">")


# ---- the command ----


@pytest.fixture
def text_files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"part{i}.txt" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes((EXAMPLES / "training.py").read_bytes()[i * 500 : (i + 1) * 500])
    return ["--text", *map(str, paths)]


def test_the_command_trains_what_is_missing_and_reports_all(
    text_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call trains the dense model, the second one the mixture, and a third one nothing more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records, picture = tmp_path / "records.jsonl", tmp_path / "scaling.png"
    files = [f"--records={records}", f"--picture={picture}", f"--out={tmp_path / 'out'}"]
    stages = (Stage("dense", 1, rates=1), Stage("moe32", 0.6, rates=1))
    texts = []
    for part in (stages[:1], stages, stages):
        monkeypatch.setattr(scaling_plan, "STAGES", part)
        assert scaling.main([*TINY, *text_files, *files, "--only", "dense", "moe32"]) == 0
        texts.append(records.read_text())
    assert texts[1].startswith(texts[0])
    assert texts[2] == texts[1]
    lines = [json.loads(line) for line in texts[2].splitlines()]
    runs = [Run(*line["run"]) for line in lines]
    assert len(set(runs)) == len(runs)
    assert {run.model for run in runs} == {"dense", "moe32"}
    assert all(line["held_out"][-1][0] == run.steps for line, run in zip(lines, runs, strict=True))
    assert lines[-1]["dropped"] == 0
    assert not list((tmp_path / "out").glob("*"))
    assert "32 experts" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000

    with pytest.raises(SystemExit, match="another text"):
        scaling.main([*TINY, *text_files[:-1], *files])
    assert scaling.main([*TINY, *files, "--report"]) == 0


def test_tables_have_times_and_shares() -> None:
    plan = Plan(100, 0.01, ["dense", "moe32"])
    finished = optimum(0.01, [Run("dense", 0, rate, 100) for rate in (0.005, 0.01, 0.02)])
    finished |= optimum(0.01, [Run("moe32", 0, rate, 24) for rate in (0.005, 0.01, 0.02)])
    for run, record in finished.items():
        record |= {"total_parameters": 10, "active_parameters": 5}
        finished[run] = record
    finished[Run("moe32", 0, 0.01, 32)] = {**finished[Run("moe32", 0, 0.01, 24)], "held_out": [[32, 1.5]]}
    times = {"dense": {"step": 0.1, "memory": 1e6}, "moe32": {"step": 0.15, "memory": 2e6}}
    text = tables(plan, finished, times)
    assert "1.50" in text
    assert "150.0" in text


def test_step_times_are_of_every_model_and_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "measure_memory", abs)  # of a new process: slow, and tried by hand
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        seconds = step_times.measure_times(["dense", "moe8"], rounds=2)
    finally:
        torch.set_num_threads(threads)
    assert {model: set(parts) for model, parts in seconds.items()} == {
        "dense": {"step", "layers", "optimizer"},
        "moe8": {"step", "layers", "optimizer", "routers"},
    }
    assert all(len(values) == 2 and min(values) > 0 for parts in seconds.values() for values in parts.values())
