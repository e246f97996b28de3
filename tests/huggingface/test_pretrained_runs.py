"""The experiment that upcycles a pretrained model: its plan, its records, and the split of its model; tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.transformers_models import ARCHITECTURES

from mixture_of_experts.huggingface.feed_forward import feed_forwards

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from experiments import prune_pretrained as pruning
from experiments import upcycle_pretrained as experiment
from experiments.upcycle_pretrained import Run

FIRST = Run("dense", 8, 3e-4, 0, 20)


def line(run: Run, step: int, bits: float, seconds: float) -> str:
    return json.dumps({"run": list(run), "step": step, "bits": bits, "seconds": seconds}) + "\n"


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_layers_go_on_from_what_is_below_them(layers):
    model, inputs = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].inputs()
    wanted = model(**inputs).logits
    below = experiment.split(model, layers)
    for variant in ("dense", "copies"):
        experiment.prepare(model, experiment.VARIANTS[variant])
        found = model(inputs_embeds=below(inputs["input_ids"]), use_cache=False).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert len(feed_forwards(model)) == layers
    assert all(".mlp." in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_runs_that_were_interrupted_are_done_again(tmp_path):
    records = tmp_path / "records.jsonl"
    assert next(experiment.planned({}, 20)) == FIRST
    records.write_text(line(FIRST, 0, 2.0, 0) + line(FIRST, 10, 1.5, 10) + line(FIRST, 0, 2.0, 0))
    found = experiment.read(records, 20)
    assert [record["step"] for record in found[FIRST]] == [0]
    assert experiment.best_rate(found, "dense", 8, 20) == 3e-4
    other = FIRST._replace(rate=1e-4)
    with open(records, "a") as file:
        file.write(line(FIRST, 20, 1.5, 10) + line(other, 0, 2.0, 0) + line(other, 20, 1.2, 10))
        file.write(line(FIRST._replace(variant="copies"), 20, 1.4, 18)[:-9])  # killed in the middle of it
    found = experiment.read(records, 20)
    assert set(found) == {FIRST, other}
    assert experiment.best_rate(found, "dense", 8, 20) == 1e-4
    planned = list(experiment.planned(found, 20))
    assert len(set(planned)) == len(planned)
    assert Run("dense", 8, 1e-4, 2, 20) in planned


def test_a_table_compares_at_equal_seconds(tmp_path):
    copies = FIRST._replace(variant="copies")
    of_dense = [dict(step=0, bits=2.0, seconds=0.0), dict(step=10, bits=1.6, seconds=10.0)]
    of_dense.append(dict(step=20, bits=1.4, seconds=20.0))
    found = {FIRST: of_dense, copies: [dict(step=0, bits=2.0, seconds=0.0), dict(step=10, bits=1.5, seconds=15.0)]}
    lines = experiment.table(found).splitlines()
    assert [cell.strip() for cell in lines[3].split("  ") if cell][-2:] == ["1.5000", "1.5000"]
    assert "10 of 20" in lines[3]
    assert experiment.bits_after(of_dense, 30.0) == "under 1.4000"
    experiment.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_each_rule_prunes_what_was_trained(tmp_path, monkeypatch):
    """Trained once, kept, and pruned by each rule: with all experts kept every rule has the trained model's bits."""
    for module in (experiment, pruning):
        monkeypatch.setattr(module, "CONTEXT", 16)
    for name, value in dict(LAYERS=1, KEEP=(3,), CALIBRATION=1, DRAWS=1).items():
        monkeypatch.setattr(pruning, name, value)
    monkeypatch.setattr(pruning, "pretrained", ARCHITECTURES["llama"].build)
    tokens = torch.randint(3, 64, (400,), dtype=torch.int32)
    text = experiment.Text(tokens, torch.randint(3, 64, (4, 17)), 4.0, "random")
    pruning.train(tmp_path / "weights.pt", text, 2)
    rows = [line.split() for line in pruning.table(tmp_path / "weights.pt", text).splitlines()[2:4]]
    assert [row[0] for row in rows] == ["8", "3"]
    assert len(set(rows[0][1:])) == 1
    assert len(rows[1]) == 5
