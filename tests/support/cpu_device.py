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

from benchmarks import first_hour, gpu_device, results_file

MACHINE = {"card": "no card", "capability": (9, 0), "memory": 1 << 30, "torch": torch.__version__}


def shrink_shape(shape: gpu_device.Shape) -> gpu_device.Shape:
    """A shape of the same kind that a test can run anywhere."""
    return replace(shape, t=24, d=32, h=32, e=4, k=2)


class CPUDevice(gpu_device.Device):
    name = "cpu"

    def describe(self) -> dict[str, Any]:
        return MACHINE

    def get_shared_memory(self) -> int:
        return 227 << 10

    def shapes(self) -> list[gpu_device.Shape]:
        return [shrink_shape(shape) for shape in gpu_device.SHAPES]

    def tests(self) -> list[str]:
        return ["-m", "", "tests/test_logits.py", "-k", "nothing_of_this_name"]

    def host_seconds(self, step: Callable[[], Any]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def card_seconds(self, step: Callable[[], Any], host: float) -> float:
        return self.host_seconds(step)

    def capture_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call

    def compile(self, launches: list[Any]) -> list[str]:
        return []

    def exclusion_reason(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> str | None:
        return None


def run_tasks(tasks: results_file.Tasks) -> dict[str, Any]:
    """What the tasks of a piece find, as a file has it."""
    found, result = {}, None
    while (task := results_file.find_next_task(tasks, result)) is not None:
        result = found[task[0]] = task[1]()
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    gpu_device.ROUNDS, gpu_device.WARMUP = 1, 1
    sys.exit(first_hour.main(device=CPUDevice(), command=[sys.executable, __file__]))
