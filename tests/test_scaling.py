"""The scaling experiment: equal active parameters, no record twice, and tables that are those of the records."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from experiments import modelled_step, regime, scaling, step_times
from experiments.language_model.model import count_parameters
from experiments.language_model.settings import Settings
from experiments.language_model.trainee import make_trainee
from experiments.scaling_plan import MODELS, Run, Stage
from experiments.sizes import SIZES
from experiments.upcycling import upcycle

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
BASE = scaling.base_settings("0.07m")
TINY = ["--context=16", "--batch-size=2", "--eval-windows=2", "--steps=5", "--learning-rate=0.3"]


def parameters_of(model: str, base: Settings = BASE) -> tuple[int, int]:
    settings = Run(model, 0, 0.01, 1).settings(base)
    return count_parameters(make_trainee(settings.models[0], settings).model, 2)


def test_models_have_equal_active_parameters_and_the_wide_one_those_of_32_experts() -> None:
    parameters = {model: parameters_of(model) for model in MODELS}
    active = {parameters[model][1] for model in ("dense", "moe8", "moe32", "moe128")}
    assert max(active) - min(active) < 0.002 * min(active)
    wide, mixture = parameters["wide"][0], parameters["moe32"][0]
    assert abs(wide - mixture) < 0.001 * mixture
    assert wide > 9 * max(active)


# ---- upcycling ----


@pytest.mark.parametrize("width", [140, 160])
def test_an_upcycled_mixture_computes_what_the_dense_model_does(width: int) -> None:
    dense = make_trainee("dense", BASE).model
    torch.nn.init.normal_(dense.to_logits.weight)  # begins at 0
    mixture = make_trainee("moe", replace(BASE, width=width, seed=1)).model
    text = torch.randint(256, (2, 30))
    assert (mixture(text)[0] - dense(text)[0]).abs().max() > 1
    upcycle(mixture, dense)
    torch.testing.assert_close(mixture(text)[0], dense(text)[0], atol=1e-4, rtol=1e-4)
    for block in mixture.blocks:
        routing = block.ffn.gate(torch.randn(1, 50, BASE.dim))
        copies = routing.dispatch_tensor().any(-1).view(50, 16, 2)  # (b n, copies, slices)
        assert (copies[..., 0] == copies[..., 1]).all()
        assert (copies[..., 0].sum(-1) == 1).all()
        assert copies[..., 0].any(0).sum() > 5


# ---- what is reported ----


def test_the_regime_says_from_which_length_on_a_mixture_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense runs of 3,000 and 12,500 steps: 32 experts have their losses after 3,000 steps, and after 6,000 of theirs.

    A step of theirs takes 1.5 times as long. So they lose the short race by half, and win the long one.
    """
    ends = {
        ("dense", 3000): 2.1,
        ("dense", 12_500): 1.9,
        ("moe32", 2000): 2.2,
        ("moe32", 3000): 2.1,
        ("moe32", 6000): 1.9,
    }
    with open(tmp_path / "scaling_0.07m.jsonl", "w") as file:
        for (model, steps), bits in ends.items():
            run = Run(model, 0, 0.01, steps)
            record = {"run": run, "settings": asdict(run.settings(BASE)), "held_out": [[steps, bits]]}
            file.write(json.dumps({**record, "active_parameters": 2048 * 100}) + "\n")
    times = {"dense": {"step": 0.1}, "moe32": {"step": 0.15}}
    (tmp_path / "step_times_0.07m.json").write_text(json.dumps(times))
    picture = tmp_path / "regime.png"
    assert regime.main([f"--records={tmp_path}", f"--picture={picture}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "32 experts" in line]
    assert [line[3:] for line in lines] == [
        ["3,000", "30", "1.00", "one", "1.50", "1.50"],
        ["12,500", "125", "0.48", "one", "1.50", "0.72"],
    ]
    assert picture.stat().st_size > 10_000


def test_the_page_on_training_has_the_table_of_the_records() -> None:
    """Every line that the command prints of the committed records stands in docs/experiments.md, and no other line."""
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text()
    lines = regime.markdown([point for size in SIZES for point in regime.points(size, scaling.RECORDS)])
    assert len(lines) >= 7
    table = page.split("| parameters in use | experts |")[1].split("\n\n")[0]
    assert table.splitlines()[2:] == lines


# ---- the command ----


@pytest.fixture
def text_files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"part{i}.txt" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes((EXPERIMENTS / "language_model" / "training.py").read_bytes()[i * 500 : (i + 1) * 500])
    return ["--text", *map(str, paths)]


@pytest.mark.slow
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
        monkeypatch.setitem(SIZES, "0.07m", SIZES["0.07m"]._replace(stages=part))
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


@pytest.mark.slow
def test_step_times_say_where_the_seconds_go() -> None:
    results = step_times.measure(["dense", "moe8"], BASE, rounds=2, before=3)
    dense, mixture = results["dense"], results["moe8"]
    assert dense["parts"].keys() < mixture["parts"].keys()
    assert {"router", "feed-forward: moving rows"} <= mixture["parts"].keys() - dense["parts"].keys()
    for own in results.values():
        assert sum(own["parts"].values()) == pytest.approx(own["step"])
        assert own["memory"] > 10e6
    calls = {name: {(part, op): calls for part, op, _, calls in own["operators"]} for name, own in results.items()}
    assert calls["dense"]["feed-forward", "mm"] == 9 * BASE.layers  # three matrices, forward and twice backward
    assert calls["dense"]["attention, embeddings, loss", "mm"] == 3 * (2 * BASE.layers + 1)
    assert calls["moe8"]["attention, embeddings, loss", "mm"] == 3 * (2 * BASE.layers + 1)
    assert calls["moe8"]["router", "mm"] == 3 * BASE.layers
    assert calls["moe8"]["optimizer", "_fused_adamw_"] == 3  # a group of parameters each
    text = step_times.table(results) + step_times.parts_table(results) + step_times.operators_table(results, "moe8")
    assert "8 experts, more" in text


def test_a_model_of_a_large_layer_is_bound_by_products_and_of_a_small_one_by_launches() -> None:
    shapes = {shape.label: shape for shape in modelled_step.SHAPES}
    card = modelled_step.CARDS["H100"]
    small, large = shapes["0.3 million active"], shapes["Mixtral's"]
    assert modelled_step.milliseconds(*modelled_step.grouped(small), card) == pytest.approx(110 * 0.004)
    flops = 6 * 3 * large.t * large.d * large.k * large.h
    least = 1000 * flops / (0.65 * card.peak)
    assert least < modelled_step.milliseconds(*modelled_step.dense(large), card) < 1.1 * least
    assert "DeepSeek-V3" in modelled_step.table()
