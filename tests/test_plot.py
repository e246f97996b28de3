"""The pictures of routing show the numbers they are given."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch import nn

from mixture_of_experts import HeirarchicalMoE, MoE, TopKGating
from mixture_of_experts.stats import RoutingStats, track_routing

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DIM = 4
DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_identity_gate(num_experts: int, **more: object) -> TopKGating:
    """A gate whose tokens are their own logits."""
    gate = TopKGating(num_experts, num_experts, **more)
    with torch.no_grad():
        gate.w_gating.copy_(torch.eye(num_experts))
    return gate


@pytest.fixture
def make_stats() -> RoutingStats:
    """Two steps of a layer of 4 experts: first all tokens to expert 0, then evenly to 0 and 1; 2 and 3 get none."""
    moe = MoE(DIM, gate=make_identity_gate(4, k=1))
    with track_routing(moe) as stats:
        for experts in ([0, 0, 0, 0], [0, 1, 0, 1]):
            moe(5 * torch.eye(4)[experts].unsqueeze(0))
            stats.step()
    return stats


def find_meshes(ax: Axes) -> list:
    return [c for c in ax.collections if hasattr(c, "get_coordinates")]


def read_labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def read_figure(figure: Figure) -> Axes:
    """Lay the figure out and draw it: what is wrong with a text or a size shows then."""
    figure.canvas.draw()
    return figure.axes[0]


def test_gates_over_experts(make_stats: RoutingStats):
    ax = read_figure(make_stats.plot())
    (row,) = find_meshes(ax)
    assert row.get_array().flatten().tolist() == [3.0, 1.0, 0.25, 0.25]  # the last two clipped
    assert read_labels(ax.texts) == ["3.00", "1.00", "×", "×"]
    assert read_labels(ax.get_yticklabels()) == ["gate"]
    assert read_labels(ax.get_xticklabels()) == ["0", "1", "2", "3"]
    assert row.norm(0.5) + row.norm(2.0) == pytest.approx(1)  # half and double are equally far from balanced


def test_one_gate_over_steps(make_stats: RoutingStats):
    ax = read_figure(make_stats.plot("gate"))
    (mesh,) = find_meshes(ax)
    expected = [[4.0, 2.0], [0.25, 2.0], [0.25, 0.25], [0.25, 0.25]]
    assert torch.tensor(mesh.get_array().data).view(4, 2).tolist() == expected
    assert (ax.get_xlabel(), ax.get_xlim(), ax.get_ylim()) == ("step", (-0.5, 1.5), (3.5, -0.5))


def test_every_step_of_a_long_training_is_shown():
    moe = MoE(DIM, gate=make_identity_gate(4, k=1))
    with track_routing(moe) as stats:
        for step in range(250):
            moe(5 * torch.eye(4)[[step % 2, step % 2]].unsqueeze(0))
    (mesh,) = find_meshes(read_figure(stats.plot("gate")))
    values = torch.tensor(mesh.get_array().data).view(4, -1)
    assert values[:2].tolist() == [[4.0, 0.25] * 125, [0.25, 4.0] * 125]
    assert mesh.get_coordinates()[0, -1, 0] == 249.5


def test_gates_fill_the_width():
    """An expert of level one is as wide as the experts behind it; an axes that is given is drawn in."""
    torch.manual_seed(0)
    model, x = nn.ModuleList([HeirarchicalMoE(DIM, (2, 3)), MoE(DIM, 4)]), torch.randn(2, 16, DIM)
    model.forward = lambda x: [layer(x) for layer in model]
    with track_routing(model) as stats:
        model(x)
    given = plt.figure().subplots()
    assert stats.plot(requested=True, ax=given) is given.figure
    ax = read_figure(given.figure)
    assert read_labels(ax.get_yticklabels()) == ["0.gate_outer", "0.gate_inner", "1"]
    widths = [mesh.get_coordinates()[0, :, 0].tolist() for mesh in find_meshes(ax)]
    assert widths == [[0, 3, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1.5, 3, 4.5, 6]]
    for layer, mesh in zip(stats.layers, find_meshes(ax), strict=True):
        load = stats.total(layer).relative_requested.flatten().clamp(0.25, 4)
        assert mesh.get_array().flatten().tolist() == pytest.approx(load.tolist())
    ax = read_figure(stats.plot("0.gate_inner"))
    (lines,) = [found for found in ax.collections if not hasattr(found, "get_coordinates")]
    assert [segment[:, 1].tolist() for segment in lines.get_segments()] == [[2.5, 2.5]]  # between the two outer experts


def test_errors(make_stats: RoutingStats, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KeyError, match="no gate named 'gat'"):
        make_stats.plot("gat")

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    for draw in (make_stats.plot, lambda: make_stats.plot("gate")):
        with pytest.raises(ImportError, match="its 'plot' extra"):
            draw()


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds the examples' folder
    runpy.run_path(str(DOCS / name), run_name="__main__")


@pytest.mark.slow
def test_pictures_of_the_documentation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "routing.html"
    run_script("draw_statistics.py", monkeypatch, "--steps", 2, "--out", tmp_path / "images", "--report", report)
    written = {path.name for path in (tmp_path / "images").iterdir()}
    shown = set(re.findall(r"images/(\w+\.png)", (DOCS / "statistics.md").read_text(encoding="utf-8")))
    assert written | {"report.png"} == shown >= {"load_layers.png"}
    assert report.exists()
    assert "blocks.3.ffn.gate" in capsys.readouterr().out


def test_measurement_of_the_documentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run_script("measure_tracking.py", monkeypatch, "--pairs", 2, "--only", "512 tokens of 128")
    assert re.search(r"processor +\d+\.\d\d ms, tracked +\d+\.\d\d ms, ratio \d\.\d{3}", capsys.readouterr().out)
