"""A CPU in the place of a card, for the first hour: small shapes, no graphs, and of the tests one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import first_hour, gpu, pieces

MACHINE = {"card": "no card", "capability": (0, 0), "memory": 1 << 30, "torch": torch.__version__}


class NoCard(pieces.Device):
    name = "cpu"

    def describe(self) -> dict[str, Any]:
        return MACHINE

    def shapes(self) -> list[gpu.Shape]:
        return [gpu.small(shape) for shape in gpu.SHAPES[:2]]

    def tests(self) -> list[str]:
        return ["-m", "", "tests/test_logits.py", "-k", "nothing_of_this_name"]

    def others(self) -> list[str]:
        return ["cpu"]

    def capture(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        out = call()
        return lambda: out.copy_(call()), out

    def compiled(self, layer: gpu.MoE) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        return layer


if __name__ == "__main__":
    gpu.ROUNDS, gpu.WARMUP = 1, 0
    sys.exit(first_hour.main(device=NoCard(), command=[sys.executable, __file__]))
