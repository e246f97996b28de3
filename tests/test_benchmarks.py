"""The benchmark harness: it runs, compares before it times, and counts exactly. No time is asserted."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import counts, documented, registry, report, timing
from benchmarks.cases import Figure, list_cases, select_cases
from benchmarks.contestants import Contestant, MissingError
from benchmarks.registry import PUBLISHED
from benchmarks.timing import AGAIN, Samples
from experiments import cpu_constants
from mixture_of_experts.ops.cpu import batches

ROOT = Path(__file__).parent.parent
TOYS = {case.name: case for case in select_cases("toy", quick=False)}


@pytest.fixture(autouse=True)
def hide_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not need the published package."""
    monkeypatch.delenv(PUBLISHED, raising=False)


def enter_case(name: str, *contestants: str, **changed) -> dict[str, Contestant]:
    return registry.build_contestants(replace(TOYS[name], figures=(), extras=contestants, **changed))[0]


@pytest.mark.slow
def test_the_command_measures_saves_and_draws(tmp_path: Path) -> None:
    saved, drawn = tmp_path / "result.json", tmp_path / "picture.png"
    arguments = ["--only", "toy/train", "--half", "ordinary", "--rounds", "2", "--attempts", "1", "--processes", "2"]
    arguments += ["--json", str(saved), "--plot", str(drawn)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "layer ÷ products" in done.stdout
    result = json.loads(saved.read_text())
    (record,) = result["records"]
    assert {"layer", "products", "products" + AGAIN, "loop", "dense"} <= record["contestants"].keys()
    assert record["contestants"]["layer"]["error"] <= 1e-4
    assert len(record["contestants"]["layer"]["seconds"]) == record["rounds"] == 4
    assert "4 rounds of 2 processes" in done.stdout
    assert not record["figures"][0]["valid"], "four rounds are too few for a figure to count"
    assert drawn.exists()
    value, (low, high) = record["figures"][0]["value"], record["figures"][0]["range"]
    row = f"| toy/train | layer ÷ products | ({value:.2f}), {low:.2f}–{high:.2f} |  |  |"
    assert row in report.markdown(result["records"])


def test_the_table_of_the_documents_is_read_whole() -> None:
    """Every case of it is one of ours, and the layer's mark stands where the table says."""
    page = documented.MEASURED.read_text(encoding="utf-8")
    points = {record["case"]["name"]: record["contestants"] for record in documented.result_of(page)["records"]}
    found = re.findall(r"^\| (\S+) \| layer ÷ (?:products|by hand) \| ([\d.]+)", page, re.MULTILINE)
    assert len(found) > 15
    for name, ratio in found:
        assert points[name]["layer"]["median_s"] == float(ratio), name


def test_rejects_baseline_with_different_output() -> None:
    contestants = enter_case("toy/train", "layer", "loop")
    right = contestants["loop"].output
    assert right is not None
    contestants["loop"].output = lambda: right().roll(1, dims=1)
    with pytest.raises(AssertionError, match="loop computes something else"):
        registry.check_all(contestants)


def test_missing_baselines_name_remedy() -> None:
    _, missing = registry.build_contestants(replace(TOYS["toy/train"], figures=(), extras=("0.2.3",)))
    assert "pip install --no-deps --target" in missing["0.2.3"]
    with pytest.raises(MissingError, match=r"mixture-of-experts==0\.2\.3"):
        registry.BUILDERS["0.2.3"](TOYS["toy/train"], None, None)


def test_every_case_has_known_contestants_and_a_name_of_its_own() -> None:
    cases = list_cases()
    assert max(Counter(case.name for case in cases).values()) == 1
    assert {name for case in cases for name in case.contestants} <= registry.BUILDERS.keys()
    assert all(case.figures for case in cases)
    assert max(Counter((case.group, case.title) for case in select_cases(None, quick=False)).values()) == 1
    assert all(case.group and "/" not in case.title for case in select_cases(None, quick=False))
    assert select_cases(None, quick=True)
    assert [case.name for case in select_cases("train/4x1024-d512*", quick=False)] == ["train/4x1024-d512-e16"]


def list_samples(**seconds: list[float]) -> dict[str, Samples]:
    return {name.replace("_again", AGAIN): Samples(s, [0] * len(s)) for name, s in seconds.items()}


def test_figure_requires_reproducible_reference() -> None:
    figure = Figure("layer", "floor", target=1.5)
    slow_and_fast = [1.0, 5.0] * 8  # a whole round slowed down cancels
    layer = [1.4 * s for s in slow_and_fast]
    calm = list_samples(layer=layer, floor=slow_and_fast, floor_again=[1.01 * s for s in slow_and_fast])
    row = timing.time_figure(figure, calm, "ordinary")
    assert row is not None
    assert row["value"] == pytest.approx(1.4 / 1.01**0.5)
    assert row["aa"] == pytest.approx(1.01)
    assert (row["valid"], row["met"]) == (True, True)
    noisy = calm | list_samples(floor_again=[1.04 * s for s in slow_and_fast])
    assert timing.time_figure(figure, noisy, "ordinary")["valid"] is False
    assert timing.time_figure(figure, noisy, "ordinary")["met"] is None
    short = {name: Samples(s.seconds[:14], s.faults[:14]) for name, s in calm.items()}
    assert timing.time_figure(figure, short, "ordinary")["valid"] is False
    assert timing.time_figure(figure, list_samples(layer=layer), "ordinary") is None


def test_bytes_kept_count_each_storage_once_without_parameters_and_input() -> None:
    x, w = torch.randn(16, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)

    def step() -> None:
        hidden = x @ w  # keeps x and w: not counted
        (hidden * hidden.T.T).sum().backward()  # keeps hidden twice: counted once

    assert (
        counts.count_saved_bytes(Contestant("twice", step, TOYS["toy/train"], inputs=[x], parameters=[w])) == 16 * 4 * 4
    )


def test_peak_of_a_known_step() -> None:
    x, w = torch.randn(256, 64), torch.randn(64, 64, requires_grad=True)
    grad = torch.randn(256, 64)

    def step() -> None:
        (x @ w).exp().backward(grad)

    peak = counts.measure_peak_bytes(Contestant("known", step, TOYS["toy/train"], parameters=[w]))
    assert peak == 2 * 256 * 64 * 4  # product and exponential, then exponential and the product's gradient


@pytest.mark.slow
def test_counts_of_a_toy() -> None:
    rows = {(row["what"], row["note"]): row for row in counts.against_rivals(TOYS["toy/train"])}
    assert rows["FLOPs", "layer ÷ router + products"]["value"] <= 1.0
    assert rows["bytes kept for backward", "layer ÷ dense"]["over"] > 0
    assert {what: row["met"] for (what, _), row in rows.items() if row["limit"] is not None} == {
        "FLOPs": True,
        "bytes kept for backward": True,
    }


def test_other_constants_of_the_batches_are_timed_and_put_back(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_constants, "ONE_ROW", ())
    before = (batches.MAX_CHUNK_BYTES, batches.PADDING_WORK, batches.FREE_PADDING_ROWS)
    cpu_constants.main(["--rounds", "2"], {"tiny": (64, 8, 4, 16, 2, True)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: ")
    each = 2 + sum(map(len, cpu_constants.VALUES.values()))
    assert len(lines) == 2 * (1 + each)
    assert lines[1].split() == ["as", "it", "is", "1.000"]
    assert [line.removesuffix(", faster") for line in lines[2 + each :]] == lines[1 : 1 + each]  # of one shape
    assert before == (batches.MAX_CHUNK_BYTES, batches.PADDING_WORK, batches.FREE_PADDING_ROWS)
