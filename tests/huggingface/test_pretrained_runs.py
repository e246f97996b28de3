"""The experiments on a pretrained model, tiny: the split of the model, and its pruning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.transformers_models import ARCHITECTURES

from mixture_of_experts.huggingface.feed_forward import feed_forwards

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from experiments import prune_pretrained as pruning
from experiments import upcycle_pretrained as experiment


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
