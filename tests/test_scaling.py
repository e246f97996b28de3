"""The scaling experiment: equal active parameters, no record twice, and tables that are those of the records."""

import json
from pathlib import Path

import pytest

from experiments import regime, scaling, step_times
from experiments.language_model.model import count_parameters
from experiments.language_model.settings import Settings
from experiments.language_model.trainee import make_trainee
from experiments.scaling_plan import MODELS, Run, Stage
from experiments.sizes import SIZES

BASE = scaling.base_settings("0.07m")
TINY = ["--context=16", "--batch-size=2", "--eval-windows=2", "--steps=5", "--learning-rate=0.3"]


def count_model_parameters(model: str, base: Settings = BASE) -> tuple[int, int]:
    settings = Run(model, 0, 0.01, 1).settings(base)
    return count_parameters(make_trainee(settings.models[0], settings).model, 2)


def test_models_have_equal_active_parameters_and_the_wide_one_those_of_32_experts() -> None:
    parameters = {model: count_model_parameters(model) for model in MODELS}
    active = {parameters[model][1] for model in ("dense", "moe8", "moe32", "moe128")}
    assert max(active) - min(active) < 0.002 * min(active)
    wide, mixture = parameters["wide"][0], parameters["moe32"][0]
    assert abs(wide - mixture) < 0.001 * mixture
    assert wide > 9 * max(active)


# ---- what is reported ----


def test_the_page_on_training_has_the_table_of_the_records() -> None:
    """Every line that the command prints of the committed records stands in docs/experiments.md, and no other line."""
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text()
    lines = regime.markdown([point for size in SIZES for point in regime.points(size, scaling.RECORDS)])
    assert len(lines) >= 7
    table = page.split("| active parameters | experts |")[1].split("\n\n")[0]
    assert table.splitlines()[2:] == lines


# ---- the command ----


@pytest.mark.slow
def test_command_trains_missing_models_and_reports_all(
    text_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call trains the dense model, the second one the mixture, and a third one nothing more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records, picture = tmp_path / "records.jsonl", tmp_path / "scaling.png"
    files = [f"--records={records}", f"--picture={picture}", f"--out={tmp_path / 'out'}"]
    stages = (Stage("dense", 1, rates=1), Stage("moe32", 0.6, rates=1))
    given, texts = ["--text", *map(str, text_files[:6])], []
    for part in (stages[:1], stages, stages):
        monkeypatch.setitem(SIZES, "0.07m", SIZES["0.07m"]._replace(stages=part))
        assert scaling.main([*TINY, *given, *files, "--only", "dense", "moe32"]) == 0
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
        scaling.main([*TINY, *given[:-1], *files])
    assert scaling.main([*TINY, *files, "--report"]) == 0


@pytest.mark.slow
def test_step_times_of_a_mixture_and_a_dense_model() -> None:
    results = step_times.measure(["dense", "moe8"], BASE, rounds=2, before=3)
    dense, mixture = results["dense"], results["moe8"]
    assert 0 < dense["operators_called"] < mixture["operators_called"]
    assert all(own["step"] > 0 and own["memory"] > 10e6 for own in results.values())
    assert "8 experts" in step_times.table(results)
