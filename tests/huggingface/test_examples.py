"""The examples run, and end where they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from support.pretrained import SMOLLM2, find_folder

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import finetune_trainer
import upcycle_pretrained

pytestmark = pytest.mark.slow
EXAMPLES = Path(finetune_trainer.__file__).parent


@pytest.mark.pretrained
def test_upcycle_pretrained(tmp_path, capsys):
    upcycle_pretrained.main(
        [str(find_folder(SMOLLM2)), "--steps=2", "--layers=1", "--characters=200", f"--out={tmp_path}"]
    )
    printed = capsys.readouterr().out
    before, after = (float(bits) for bits in re.findall(r": +([\d.]+) bits a byte held out", printed))
    assert after < before < 1.5
    assert "experts in model.layers.29.mlp" in printed
    assert "loaded again" in printed
    page = (tmp_path / "routing.html").read_text()
    assert "model.layers.29.mlp" in page
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
@pytest.mark.parametrize("lora", ["--lora", "--no-lora"])
def test_finetune_trainer(lora, tmp_path, capsys):
    finetune_trainer.main(["--steps=2", lora, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "routing/balance" in printed
    assert "loaded again" in printed
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in TRL
@pytest.mark.parametrize("coef", ["0.01", "0"])
def test_finetune_trl(coef, tmp_path, capsys):
    """Both trainers ask for the auxiliary loss, and do not if it is switched off."""
    pytest.importorskip("trl")
    import finetune_trl

    finetune_trl.main(["--sft-steps=2", "--grpo-steps=1", f"--coef={coef}", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"aux_loss ([\d.]+)", printed)]
    assert len(losses) == (3 if coef == "0.01" else 0)
    assert all(2 <= loss < 10 for loss in losses)  # of two layers, without the coefficient; 1 each is balanced
    assert re.findall(r"sorted after (\w+)", printed) == ["SFT", "GRPO"]
    assert "loaded again" in printed


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_finetune_trl_names_missing_packages(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing} .*pip install"):
        runpy.run_path(str(EXAMPLES / "finetune_trl.py"))
