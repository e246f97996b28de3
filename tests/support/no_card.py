"""A CPU in the place of a card, for the first hour: small shapes, no graphs, no programs, and of the tests one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import card, first_hour, kept

MACHINE = {"card": "no card", "capability": (9, 0), "memory": 1 << 30, "torch": torch.__version__}


def small(shape: card.Shape) -> card.Shape:
    """A shape of the same kind that a test can run anywhere."""
    return replace(shape, t=24, d=32, h=32, e=4, k=2)


class NoCard(card.Device):
    name = "cpu"

    def describe(self) -> dict[str, Any]:
        return MACHINE

    def shared(self) -> int:
        return 227 << 10

    def shapes(self) -> list[card.Shape]:
        return [small(shape) for shape in card.SHAPES]

    def tests(self) -> list[str]:
        return ["-m", "", "tests/test_logits.py", "-k", "nothing_of_this_name"]

    def host_seconds(self, step: Callable[[], Any]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def card_seconds(self, step: Callable[[], Any], host: float) -> float:
        return self.host_seconds(step)

    def graph_of(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call

    def compile(self, launches: list[Any]) -> list[str]:
        return []

    def left_out(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> str | None:
        return None


def results(tasks: kept.Tasks) -> dict[str, Any]:
    """What the tasks of a piece find, as a file has it."""
    found, result = {}, None
    while (task := kept.following(tasks, result)) is not None:
        result = found[task[0]] = task[1]()
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    card.ROUNDS, card.WARMUP = 1, 1
    sys.exit(first_hour.main(device=NoCard(), command=[sys.executable, __file__]))
