"""The example for a GPU, on a CPU: it trains, and compares what it says it compares."""

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_gpu  # noqa: E402

SIZES = dict(dim=32, depth=1, context=32, batch=2, seconds=0.4)
SMALL = ["--device", "cpu", "--eager", *(part for name, value in SIZES.items() for part in (f"--{name}", str(value)))]


@pytest.mark.slow
def test_it_trains_both_models(capsys) -> None:
    train_gpu.main(SMALL)
    told = capsys.readouterr().out
    of_dense, of_mixture = told.split("mixture:")
    for part in (of_dense, of_mixture):
        losses = [float(line.split()[-4]) for line in part.splitlines() if line.endswith("bits a byte")]
        assert len(losses) >= 2
        assert all(0 < loss < 9 for loss in losses)


def test_both_models_have_as_many_active_parameters() -> None:
    dense, mixture = train_gpu.Dense(64, 256), train_gpu.mixture(64, 256, experts=8, k=4)
    weights = sum(weight.numel() for weight in dense.parameters() if weight.ndim == 2)
    active = sum(weight.numel() for weight in mixture.experts.parameters()) * 4 // 8
    assert weights == active
    assert dense(torch.ones(1, 2, 64))[0].shape == mixture(torch.ones(1, 2, 64))[0].shape
