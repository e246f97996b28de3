"""The report shows what was recorded, whatever the model. It is one page that needs and runs nothing else."""

from __future__ import annotations

import base64
import json
import re
from datetime import date
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import ExpertChoiceGating, HeirarchicalMoE, MoE, TopKGating
from mixture_of_experts.stats import RoutingStats, track_routing
from mixture_of_experts.stats.html_report import render_figure
from mixture_of_experts.stats.tracking import MAX_DRAWN

DIM = 8
HOSTILE = "</script><script>alert(1)</script>$data'><img src=x>"


class Stack(nn.Module):
    """Residual layers, of hostile names."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict({f'<i id="{i}">{HOSTILE}': layer for i, layer in enumerate(layers)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + layer(x)[0]
        return x


def make_gates() -> nn.Module:
    """Of every kind: dropping, both levels, dropless with more experts than colours, expert choice."""
    return Stack(
        MoE(DIM, 4),
        HeirarchicalMoE(DIM, (2, 3)),
        MoE(DIM, gate=TopKGating(DIM, 64, k=3)),
        MoE(DIM, gate=ExpertChoiceGating(DIM, 4, capacity_factor=1.0)),
    )


def track_model(model: nn.Module, steps: int) -> RoutingStats:
    with track_routing(model) as stats:
        for _ in range(steps):
            model(torch.randn(2, 32, DIM))
            stats.step()
    return stats


def write_page(stats: RoutingStats, folder: Path, **more: object) -> str:
    stats.report(folder / "routing.html", **more)
    return (folder / "routing.html").read_text(encoding="utf-8")


def extract_text(page: str) -> str:
    """What a reader sees of it."""
    return unescape(re.sub(r"<(style|script).*?</\1>|<[^>]*>", "", page, flags=re.DOTALL))


def list_images(page: str) -> dict[str, str]:
    """The sources of its pictures by their titles."""
    return {unescape(title): source for title, source in re.findall(r'<img alt="([^"]*)" src="([^"]*)"', page)}


def test_page_shows_the_records(tmp_path: Path):
    """The cells of the summary, the pictures of `plot`, a name and a date, for every gate that ran."""
    torch.manual_seed(0)
    stats = track_model(make_gates(), 4)
    page = write_page(stats, tmp_path, name="<run> 7")
    header, rule, *lines = stats.summary().splitlines()
    ends = [match.span() for match in re.finditer(r"-+", rule)]
    ends[-1] = (ends[-1][0], max(map(len, lines)))
    lines = [header, *lines[: len(stats.layers)]]
    cells = [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", page)]
    assert cells == [line[first:end].strip() for line in lines for first, end in ends]
    drawn = {"requested": stats.plot(requested=True), "load": stats.plot()}
    drawn |= {layer: stats.plot(layer, requested=True) for layer in (stats.layers[0], stats.layers[-1])}
    for title, figure in drawn.items():
        assert f'src="{list_images(page)[title]}"' in render_figure(title, figure)
    assert list_images(page).keys() == {"requested", "load", *stats.layers}
    assert extract_text(page).count("<run> 7") == 2  # the title, and the heading
    assert date.today().isoformat() in page


def test_page_is_self_contained(tmp_path: Path):
    """Names that are markup stay texts; nothing is loaded; pictures are well formed."""
    torch.manual_seed(0)
    stats = track_model(make_gates(), 3)
    page = write_page(stats, tmp_path, name=HOSTILE)
    for hostile in ("<i id=", "<img src=x", "<script", "onerror="):
        assert hostile not in page
    assert extract_text(page).count(HOSTILE) >= 2 + 2 * len(stats.layers)
    assert "default-src 'none'" in page
    assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)"', page))
    assert not re.search(r"https?://", re.sub(r"base64,[\w+/=]+", "", page))
    for source in list_images(page).values():
        kind, data = source.split(",")
        assert kind == "data:image/svg+xml;base64"
        drawn = ElementTree.fromstring(base64.b64decode(data))
        assert {"step", "expert"} & {node.text for node in drawn.iter() if node.tag.endswith("}text")}


def make_request_counts(*steps: Tensor) -> RoutingStats:
    """A gate of 8 experts whose tokens ask for these, a tensor of experts for each step."""
    model = MoE(8, gate=TopKGating(8, 8, k=1))
    with torch.no_grad():
        model.gate.w_gating.copy_(torch.eye(8))
    with track_routing(model) as stats:
        for experts in steps:
            model(5 * torch.eye(8)[experts].unsqueeze(0))
    return stats


def test_reports_dead_experts(tmp_path: Path):
    text = extract_text(
        write_page(make_request_counts(*[torch.arange(7)] * 4, *[torch.arange(7).clamp(max=5)] * 4), tmp_path)
    )
    assert "gate: 1 of 8 experts computed no tokens in any step: 7" in text
    assert "gate: 1 of 8 experts computed no tokens in the last 2 steps: 6" in text


def make_crowded_model(share: float) -> RoutingStats:
    """In the last two of eight steps so large a share of the tokens asks for expert 3."""
    evenly, crowd = torch.arange(800) % 8, torch.arange(800) < share * 800
    return make_request_counts(*[evenly] * 6, *[evenly.where(~crowd, 3)] * 2)


def test_reports_overloaded_experts(tmp_path: Path):
    """In late steps and above twice a balanced load; the summary has the same words."""
    for share, described in ((0.93, True), (0.25, True), (0.1, False), (0.0, False)):
        stats = make_crowded_model(share)
        load = float((stats.records("gate")[-1].requested.max() * 8 / 800).item())
        note = f"gate: expert 3 was requested {load:.1f} times a balanced load in the last 2 steps: increase loss_coef"
        assert (load > 2.2) == described
        assert (note in stats.summary()) == described
        if share in (0.93, 0.1):
            text = extract_text(write_page(stats, tmp_path))
            assert (note in text) == described
            assert (
                "no expert is requested more than twice or less than a tenth as often as with a balanced load" in text
            ) != described
    assert "warning" not in make_request_counts(torch.arange(8)).summary()


def starving(mean: int) -> RoutingStats:
    """Expert 7 gets a hundredth of a balanced load and more of them 0.05 and 0.2 of it, in each of eight steps."""
    counts = [round(mean * share) for share in (1.3, 1.3, 1.3, 1.3, 1.3, 0.2, 0.05, 0.01)]
    return make_request_counts(*[torch.repeat_interleave(torch.arange(8), torch.tensor(counts))] * 8)


def test_it_names_starved_experts(tmp_path: Path):
    """Below a tenth of a balanced load in late steps; the page is not green. Of few tokens chance leaves as little."""
    stats = starving(200)
    note = "gate: 2 of 8 experts were requested less than 0.1 times a balanced load in the last 2 steps"
    page = write_page(stats, tmp_path)
    assert note in extract_text(page)
    assert "router collapse: 6, 7. Increase loss_coef" in stats.summary()
    assert "class=good" not in page
    assert "were requested less" not in make_request_counts(*[torch.arange(8).repeat(3)[:-1]] * 8).summary()
    assert "class=good" in write_page(make_crowded_model(0.0), tmp_path)


def test_a_name_with_a_surrogate(tmp_path: Path):
    """As in names of files that are not UTF-8: the page is written, and nothing is lost."""
    path = tmp_path / "routing.html"
    make_request_counts(torch.arange(8)).report(path, name="run \udc80")
    assert "run \\udc80" in extract_text(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_of_many_gates_it_draws_some(tmp_path: Path):
    """Those with notes first; the table has all, and the page says what is left out."""
    model = Stack(*(MoE(DIM, gate=TopKGating(DIM, 4, k=1)) for _ in range(40)))
    layers = list(model.layers.values())
    for number in (7, 31):
        layers[number].gate.w_gating.data[0, 0] = torch.nan
        layers[number].forward = partial(of_gate, layers[number])
    stats = track_model(model, 2)
    page = write_page(stats, tmp_path)
    drawn = list_images(page).keys() - {"requested", "load"}
    assert len(drawn) == MAX_DRAWN
    assert {stats.layers[7], stats.layers[31], stats.layers[0]} <= drawn
    assert f"{MAX_DRAWN} of 40 gates are drawn" in extract_text(page)
    assert page.count("<tr>") == 41
    anchors = set(re.findall(r'id="(gate-\d+)"', page))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= anchors
    assert "are drawn" not in write_page(make_request_counts(torch.arange(8)), tmp_path)


def of_gate(layer: Any, x: Tensor) -> tuple[Tensor, None]:
    """What a layer whose router is broken returns: its gate runs, and nothing is added to the tokens."""
    layer.gate(x)
    return torch.zeros_like(x), None


def test_nan_gate_is_reported(tmp_path: Path):
    """The page, the summary and the file of JSON stay readable, and no advice is given that means nothing."""
    torch.manual_seed(0)
    model = Stack(*(MoE(DIM, gate=TopKGating(DIM, 4)) for _ in range(2)))
    with track_routing(model) as stats:
        for step in range(5):
            if step == 3:
                list(model.layers.values())[1].gate.w_gating.data[0, 0] = torch.nan
            model(torch.randn(2, 32, DIM))
            stats.step()
    first, second = stats.layers
    page = write_page(stats, tmp_path)
    note = f"{second} computed NaN probabilities, first in step 3"
    assert note in extract_text(page)
    assert "nan%" not in page.lower()
    assert "loss_coef" not in page
    assert f"warning: {note}" in stats.summary()
    assert f"{first} computed" not in stats.summary()
    stats.to_jsonl(tmp_path / "routing.jsonl")
    lines = (tmp_path / "routing.jsonl").read_text(encoding="utf-8").splitlines()
    described = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    of_second = [record for record in described if record["layer"] == second]
    assert [record["entropy"] is None for record in of_second] == [False] * 3 + [True] * 2
    assert [record["losses"]["z"] is None for record in of_second] == [False] * 3 + [True] * 2


def test_model_without_forward(tmp_path: Path):
    path = tmp_path / "routing.html"
    with (
        track_routing(MoE(DIM, 4)) as stats,
        pytest.raises(RuntimeError, match="no forward pass of a gate was recorded"),
    ):
        stats.report(path)
    assert not path.exists()  # a bad call writes nothing
