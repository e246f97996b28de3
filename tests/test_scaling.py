"""The scaling experiment: equal active parameters, a plan that tunes every model, records that are never repeated."""

import json
from dataclasses import asdict, replace
from multiprocessing import Value
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import modelled_step, regime, scaling, scaling_runs, step_times
from experiments.language_model.corpus import split_files
from experiments.language_model.model import count_parameters
from experiments.language_model.settings import Settings
from experiments.language_model.trainee import make_trainee
from experiments.language_model.training import Training
from experiments.scaling_plan import MODELS, Plan, Run, Stage, rates_to_try
from experiments.scaling_report import Equal, equal_shares, steps_to, tables, total_cost
from experiments.sizes import SIZES, SMALL
from experiments.text import load_text, without_copies
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
    plan = Plan(SMALL, 100, 0.01, ["moe32"])
    finished: dict[Run, Any] = {}
    while new := [run for run in plan.runs(finished) if run not in finished]:
        assert {run.seed for run in new} == {0} or plan.best_rate("moe32", finished) == 0.04
        finished |= optimum(0.04, new)
    rates = {run.learning_rate for run in finished}
    assert {0.01, 0.02, 0.04, 0.08} <= rates
    assert {(run.seed, run.steps) for run in finished if run.learning_rate == 0.04} >= {(1, 24), (2, 24), (0, 100)}


def test_the_longest_sweep_decides() -> None:
    plan = Plan(SMALL, 100, 0.01, ["dense"])
    short = [Run("dense", 0, rate, 24) for rate in (0.005, 0.01, 0.02, 0.04)]
    finished = optimum(0.02, short)
    assert plan.best_rate("dense", finished) == 0.02
    finished |= optimum(0.01, [Run("dense", 0, rate, 100) for rate in (0.005, 0.01, 0.02)])
    assert plan.best_rate("dense", finished) == 0.01


def test_upcycling_waits_for_a_dense_run_of_its_seed_at_the_best_rate() -> None:
    plan = Plan(SMALL, 100, 0.01, ["upcycled"])
    finished: dict[Run, Any] = {}
    while new := [run for run in plan.runs(finished) if run not in finished]:
        for run in new:
            assert run.model == "dense" or run.start in finished
        finished |= optimum(0.02, new)
    upcycled = {run for run in finished if run.model == "upcycled"}
    assert {run.start for run in upcycled} == {Run("dense", seed, 0.02, 50) for seed in (0, 1, 2)}
    assert {(run.seed, run.steps) for run in upcycled} == {(seed, steps) for seed in (0, 1, 2) for steps in (24, 48)}
    assert len({str(run) for run in finished}) == len(finished)


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


def test_what_is_no_copy_of_the_dense_layer_is_refused() -> None:
    dense = make_trainee("dense", BASE).model
    for settings in (replace(BASE, width=128), replace(BASE, width=140, num_experts=31)):
        with pytest.raises(ValueError, match="give a multiple of 2 experts, and a width of at least 139"):
            upcycle(make_trainee("moe", settings).model, dense)


@pytest.mark.slow
def test_an_upcycled_run_goes_on_where_the_dense_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its losses are the same when the start's checkpoint is missing, and when the run itself was interrupted."""
    base = replace(BASE, context=16, batch_size=2, eval_windows=2, eval_every=1)
    text = (EXPERIMENTS / "language_model" / "training.py").read_bytes()
    corpus = split_files([(str(i), text[i * 500 : (i + 1) * 500]) for i in range(6)])
    run = Run("upcycled", 0, 0.01, 3, dense_rate=0.02, dense_steps=4)
    assert run.start == Run("dense", 0, 0.02, 4)

    def training_in(folder: str) -> Training:
        out = tmp_path / folder
        monkeypatch.setattr(scaling_runs, "_worker", (Value("q", 0), corpus, base, out), raising=False)
        return Training(run.settings(base), corpus, out / str(run))

    training = training_in("kept")
    scaling_runs.train(run.start)
    expected = scaling_runs.train(run)
    training.load()
    assert training.batches.position == 7 * base.batch_size
    assert not (training.out / "start").exists()

    training_in("missing")
    assert scaling_runs.train(run)["held_out"] == expected["held_out"]

    training = training_in("interrupted")
    scaling_runs.begin_from(run.start, training)
    training.run(stop_at=1)
    assert scaling_runs.train(run)["held_out"] == expected["held_out"]

    training_in("scratch")
    assert scaling_runs.train(run._replace(dense_steps=0))["held_out"] != expected["held_out"]


# ---- what is reported ----


def test_steps_to_a_loss_lie_between_the_lengths_that_were_run() -> None:
    steps, sign = steps_to(2.0, {100: 2.2, 200: 2.1, 400: 1.9})
    assert steps == pytest.approx(200 * 2**0.5)
    assert sign == ""
    assert steps_to(2.0, {100: 1.9, 200: 1.8}) == (100, "<")
    assert steps_to(2.0, {100: 2.2, 200: 2.1}) == (200, ">")
    assert steps_to(2.0, {100: 2.2, 201: 1.9}) == (100, ">")  # too far apart for a line


def test_an_upcycled_run_costs_what_its_dense_start_did_too() -> None:
    plan = Plan(SMALL, 100, 0.01)
    assert total_cost(plan, "upcycled", 24, {"dense": 2.0, "upcycled": 3.0}) == 50 * 2 + 24 * 3
    assert total_cost(plan, "moe32", 24, {"moe32": 3.0}) == 24 * 3


def test_shares_are_of_the_same_seed() -> None:
    plan = Plan(SMALL, 100, 0.01, ["dense", "moe32"])
    finished = optimum(0.01, [Run("dense", 0, rate, 100) for rate in (0.005, 0.01, 0.02)])
    finished |= optimum(0.01, [Run("moe32", 0, rate, 24) for rate in (0.005, 0.01, 0.02)])
    finished[Run("dense", 1, 0.01, 100)] = {"held_out": [[100, 1.5]]}
    finished[Run("moe32", 0, 0.01, 32)] = {"held_out": [[32, 1.8]]}
    finished[Run("moe32", 1, 0.01, 32)] = {"held_out": [[32, 1.8]]}
    shares = equal_shares(plan, finished, "moe32")
    assert 0.24 < shares[0].share < 0.32
    assert shares[1] == Equal(0.32, ">")


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
def test_the_command_keeps_the_dense_model_that_is_upcycled(
    text_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stages = (Stage("dense", 0.4), Stage("upcycled", 0.6, rates=1))
    monkeypatch.setitem(SIZES, "0.07m", SIZES["0.07m"]._replace(stages=stages))
    monkeypatch.setattr(Plan, "best_rate", lambda *_: 0.1)
    records, out = tmp_path / "records.jsonl", tmp_path / "out"
    assert scaling.main([*TINY, *text_files, f"--records={records}", f"--out={out}", "--only=upcycled"]) == 0
    dense, upcycled = (Run(*json.loads(line)["run"]) for line in records.read_text().splitlines())
    assert upcycled == Run("upcycled", 0, 0.3, 3, dense_rate=0.1, dense_steps=2)
    assert upcycled.start == dense
    assert [path.name for path in out.glob("*seed*")] == [str(dense)]  # for further runs from it


def test_tables_have_times_and_shares() -> None:
    plan = Plan(SMALL, 100, 0.01, ["dense", "moe32"])
    finished = optimum(0.01, [Run("dense", 0, rate, 100) for rate in (0.005, 0.01, 0.02)])
    finished |= optimum(0.01, [Run("moe32", 0, rate, 24) for rate in (0.005, 0.01, 0.02)])
    for run, record in finished.items():
        record |= {"total_parameters": 10, "active_parameters": 5, "settings": asdict(run.settings(BASE))}
        record["train"] = [9.0, 3.0, 2.0, 2.5]
        finished[run] = record
    finished[Run("moe32", 0, 0.01, 32)] = {**finished[Run("moe32", 0, 0.01, 24)], "held_out": [[32, 1.5]]}
    times = {"dense": {"step": 0.1, "memory": 1e6}, "moe32": {"step": 0.15, "memory": 2e6}}
    text = tables(plan, finished, times)
    assert "1.50" in text
    assert "2.5000" in text
    assert "150.0" in text


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


# ---- sizes and text ----


@pytest.mark.parametrize(("size", "least"), [("0.07m", 65_000), ("0.3m", 280_000), ("1m", 1_000_000)])
def test_every_size_has_models_of_equal_active_parameters(size: str, least: int) -> None:
    active = {model: parameters_of(model, scaling.base_settings(size))[1] for model in ("dense", "moe8", "moe32")}
    assert max(active.values()) - min(active.values()) < 0.002 * min(active.values())
    assert least < min(active.values()) < 1.3 * least


@pytest.mark.slow
def test_no_long_run_of_the_larger_sizes_reads_a_byte_twice() -> None:
    size, base = SIZES["0.3m"], scaling.base_settings("0.3m")
    text = load_text((), size.packages)
    assert size.steps * base.batch_size * (base.context + 1) < text.train.numel()
    assert text.sources[0].startswith("python 3.")
    assert [source.split()[0] for source in text.sources[1:]] == list(size.packages)
    assert load_text((), size.packages[1:2]).digest == load_text((), size.packages[1:2]).digest


def test_of_equal_files_the_first_is_kept() -> None:
    files = [("b", b"same"), ("c", b"other"), ("a", b"same")]
    assert without_copies(files) == [("a", b"same"), ("c", b"other")]
