"""The examples run, and end where they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import finetune_trainer
import upcycle

pytestmark = pytest.mark.slow


def test_upcycle(tmp_path, capsys):
    assert upcycle.main(["--steps=6", "--eval-windows=4", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    dense, moe = (line.split() for line in printed.splitlines() if line.strip().startswith(("dense", "mixture")))
    assert dense[-2] == moe[-2], "upcycling changed the loss"
    assert float(moe[-1]) < float(moe[-2])
    assert (tmp_path / "upcycle.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
@pytest.mark.parametrize("lora", ["--lora", "--no-lora"])
def test_finetune_trainer(lora, tmp_path, capsys):
    assert finetune_trainer.main(["--steps=2", lora, f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "routing/balance" in printed
    assert "loaded again" in printed
    assert (tmp_path / "model" / "model.safetensors").exists()
