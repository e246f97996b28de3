"""A dry run of the first hour where kernels are on fake CUDA tensors: real shapes, real launches, made-up times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import blocks, card, decide, pieces
from mixture_of_experts.ops.triton import operators, schedule
from support import no_card
from support.fake_cuda_checks import on_gpu
from support.fake_cuda_counts import Ledger
from support.triton_machine_code import CARDS

#: what the made-up card likes: heights (16 rows less than the schedule thinks, 64 rows more), and blocks of two kernels
COSTS = {16: 6.0, 32: 2.3, 64: 1.05, 128: 1.0}
LIKED = {("hidden_grads", 128): (128, 64, 8, 3), ("weight_grads", 128): (128, 256, 64, 8, 3)}


class MadeUp(card.Device):
    """A card on which nothing starts, and times are made up from a launch."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability, self.compiled = capability, []

    def describe(self) -> dict[str, Any]:
        return {"card": "made up", "capability": self.capability}

    def shared(self) -> int:
        return CARDS[self.capability].shared_of_one << 10

    def shapes(self) -> list[card.Shape]:
        return [card.fitting(shape, 80 << 30) for shape in card.SHAPES]

    def compile(self, launches: list[blocks.Launch]) -> list[str]:
        self.compiled += launches
        return []

    def left_out(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> str | None:
        return None

    def host_seconds(self, step: Callable[[], Any]) -> float:
        return 1e-5

    def card_seconds(self, step: Any, host: float) -> float:
        (kernel, _), arguments = step.args, step.keywords
        name = blocks.name_of(kernel, arguments)
        if name not in blocks.KERNELS:
            return 1e-6
        rows = next(arguments[key] for key in ("token", "x", "grad_pre") if arguments.get(key) is not None).shape[0]
        experts = next(arguments[key] for key in ("weight", "out") if arguments.get(key) is not None).shape[0]
        sizes = [arguments[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_C", "num_warps", "num_stages")]
        if name == "weight_grads":
            height, tried = 128, tuple(sizes)
            computed, cost = rows, 1.0
        else:
            height, tried = sizes[0], tuple(sizes[1:])
            computed, cost = experts * schedule.rows_computed(rows // experts, height), COSTS[height]
        own = next(e for e in operators.entries_for(torch.device("cuda"), torch.bfloat16) if e.rows == height)
        best = LIKED.get((name, height), tuple(getattr(own, name)))
        return 1e-9 * computed * cost * (1.0 if tried == best else 1.25)


def dry_run(capability: tuple[int, int], number: int) -> str:
    """The decisions on the schedule after the pieces of some shapes."""

    device, found = MadeUp(capability), {}
    with on_gpu(torch.bfloat16, capability), Ledger() as ledger, ledger.of_kernels():
        for index, shape in list(enumerate(device.shapes()))[:number]:
            found[f"kernels/{shape.name}"] = no_card.results(pieces.kernels(device, index))
        entries = operators.entries_for(torch.device("cuda"), torch.bfloat16)
        assert all(not isinstance(value, Tensor) for one in device.compiled for value in one.arguments.values())
        assert {one.kernel for one in device.compiled} >= {
            "rows_by_weights",
            "hidden_grads",
            "row_grads",
            "weight_grads",
        }
    return "\n".join(decide.lines(found, entries))
