"""The examples run, and end where they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import finetune_trainer
import upcycle

pytestmark = pytest.mark.slow
EXAMPLES = Path(upcycle.__file__).parent


def test_upcycle(tmp_path, capsys):
    upcycle.main(["--steps=6", "--eval-windows=4", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    bits = r": [\d,]+ parameters, \d+ ms a step, ([\d.]+) bits per byte before, ([\d.]+) after"
    (dense,), (moe,) = (re.findall(name + bits, printed) for name in ("dense", "upcycled"))
    assert dense[0] == moe[0], "upcycling changed the loss"
    assert float(moe[1]) < float(moe[0])
    assert (tmp_path / "upcycle.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
@pytest.mark.parametrize("lora", ["--lora", "--no-lora"])
def test_finetune_trainer(lora, tmp_path, capsys):
    finetune_trainer.main(["--steps=2", lora, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "routing/balance" in printed
    assert "loaded again" in printed
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in TRL
@pytest.mark.parametrize("coef", ["1", "0"])
def test_finetune_trl(coef, tmp_path, capsys):
    """Both trainers ask for the auxiliary loss, and do not if it is switched off."""
    pytest.importorskip("trl")
    import finetune_trl

    finetune_trl.main(["--sft-steps=2", "--grpo-steps=1", f"--coef={coef}", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"aux_loss ([\d.]+)", printed)]
    assert len(losses) == (3 if coef == "1" else 0)
    assert all(0.02 <= loss < 0.1 for loss in losses)  # of two layers; 0.01 each is balanced
    assert re.findall(r"sorted after (\w+)", printed) == ["SFT", "GRPO"]
    assert "loaded again" in printed


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_finetune_trl_names_what_is_missing(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing} .*this example needs the extra hf and TRL, pip install"):
        runpy.run_path(str(EXAMPLES / "finetune_trl.py"))
