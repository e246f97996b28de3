"""A CPU in place of a GPU, for dry runs of the first hour: small shapes, no CUDA graphs and no compiled programs.

`--fault KIND` injects a fault into ScatterMoE, which this module stands in for: see `FAULTS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import first_hour, gpu_contestants, gpu_device, gpu_shapes, tasks
from benchmarks.gpu_cases import GPUCase
from mixture_of_experts import MoE

MACHINE = {"card": "no card", "capability": (9, 0), "memory": 1 << 30, "torch": torch.__version__}


def shrink_shape(shape: gpu_shapes.Shape) -> gpu_shapes.Shape:
    """Return a shape of the same kind that a test can run anywhere."""
    return replace(shape, t=24, d=32, h=32, e=4, k=2)


class CPUDevice(gpu_device.Device):
    name = "cpu"
    yardstick_size = 64

    def describe(self) -> dict[str, Any]:
        return MACHINE

    def read_state(self) -> dict[str, str]:
        return {}

    def get_shared_memory(self) -> int:
        return 227 << 10

    def shapes(self) -> list[gpu_shapes.Shape]:
        return [shrink_shape(shape) for shape in gpu_shapes.SHAPES]

    def tests(self) -> list[str]:
        return ["-m", "", "tests/test_logits.py", "-k", "nothing_of_this_name"]

    def synchronize(self) -> None:
        pass

    def host_seconds(self, step: Callable[[], Any]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def card_seconds(self, step: Callable[[], Any], host: float) -> float:
        return self.host_seconds(step)

    def count_peak_bytes(self, step: Callable[[], Any]) -> int | None:  # type: ignore[override]
        return None

    def compile_function(self, function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, backend="eager")

    def capture_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call

    def compile_programs(self, launches: list[Any]) -> list[str]:
        return []

    def exclusion_reason(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> str | None:
        return None


class FailingDevice(CPUDevice):
    """A device that fails like CUDA: after an illegal access, every later call of the process raises an error."""

    def __init__(self) -> None:
        self.has_failed = False

    def check(self) -> None:
        if self.has_failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    def synchronize(self) -> None:
        self.check()

    def host_seconds(self, step: Callable[[], Any]) -> float:
        self.check()
        return super().host_seconds(step)

    def shapes(self) -> list[gpu_shapes.Shape]:
        self.check()
        return super().shapes()


def build_faulty(fault: str, device: FailingDevice, case: GPUCase, layer: MoE, x: Tensor) -> gpu_contestants.Contestant:
    """Return a contestant that computes the layer, until its fault shows."""

    def forward(x: Tensor) -> Tensor:
        FAULTS[fault](device)
        scale = 1.1 if fault == "wrong" else 1.0
        return scale * layer(x)[0]

    return gpu_contestants.Contestant(forward, list(layer.parameters()))


def fail_asynchronously(device: FailingDevice) -> None:
    """Launch an illegal access: this call returns normally, and all later calls raise an error."""
    device.has_failed = True


def raise_assertion(device: FailingDevice) -> None:
    raise AssertionError("expected the 3rd argument to be contiguous")


#: what the injected contestant does when it is called
FAULTS: dict[str, Callable[[FailingDevice], Any]] = {
    "illegal access": fail_asynchronously,
    "hang": lambda device: time.sleep(600),
    "crash": lambda device: os._exit(7),
    "raises": raise_assertion,
    "wrong": lambda device: None,
}


def run_tasks(generator: tasks.Tasks) -> dict[str, Any]:
    """Return the results of a piece's tasks, as they are read from a file."""
    found, result = {}, None
    while (task := tasks.find_next_task(generator, result)) is not None:
        result = found[task.name] = tasks.run_task(task.compute)
    return json.loads(json.dumps(found))


def inject_fault(fault: str, contestant: str, device: FailingDevice) -> None:
    gpu_contestants.CONTESTANTS[contestant] = partial(build_faulty, fault, device)
    tasks.MIN_LIMIT = tasks.LIMIT_FACTOR = 3.0  # seconds after which a task is considered to hang, instead of minutes


if __name__ == "__main__":
    gpu_device.ROUNDS, gpu_device.WARMUP = 1, 1
    failing, arguments = FailingDevice(), sys.argv[1:]
    if arguments[:1] == ["--fault"]:
        inject_fault(arguments[1], arguments[2], failing)
        arguments = arguments[3:]
    sys.exit(first_hour.main(arguments, failing, [sys.executable, __file__, *sys.argv[1:4]]))
