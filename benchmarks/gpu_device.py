"""A GPU as the benchmarks see it: the time of a step on it and on the host, memory, and state. Tests replace it by a
CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cached_property
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import nvidia_smi
from benchmarks.gpu_shapes import SHAPES, Shape, shrink_to_fit
from benchmarks.tasks import describe_exception

ROUNDS, WARMUP = 20, 3
MAX_SECONDS = 0.3  # seconds that the rounds of a step may take, after the first three
CYCLES = 3e9  # upper bound of a multiprocessor's cycles per second
SLEEP_FACTOR = 1.25  # the GPU sleeps this many times as long as the host usually takes to launch a step


class Spread(NamedTuple):
    """Quartiles of samples, in seconds."""

    q1: float
    median: float
    q3: float


class Times(NamedTuple):
    """The times of a step on the GPU and of the host that launches it."""

    card: Spread
    host: Spread


def summarize(samples: list[float]) -> Spread:
    """Return the quartiles of at least one sample."""
    return Spread(*(quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3))


class Device:
    """The GPU."""

    name = "cuda"
    yardstick_size = 4096

    @cached_property
    def properties(self) -> Any:
        return torch.cuda.get_device_properties(0)

    @cached_property
    def identifier(self) -> str:
        """How nvidia-smi identifies this GPU, whose index may differ from torch's."""
        uuid = getattr(self.properties, "uuid", None)
        return "0" if uuid is None else f"GPU-{uuid}"

    @cached_property
    def description(self) -> dict[str, Any]:
        return {
            "card": self.properties.name,
            "capability": (self.properties.major, self.properties.minor),
            "memory": self.properties.total_memory,
            "shared memory of a program": self.get_shared_memory(),
            "torch": torch.__version__,
            "triton": __import__("triton").__version__,
        }

    def describe(self) -> dict[str, Any]:
        """Return what all results of a comparison must have in common."""
        return self.description

    def read_state(self) -> dict[str, str]:
        """Return driver, clocks, power and temperature at this moment, as far as nvidia-smi reports them."""
        return nvidia_smi.query(nvidia_smi.CONSTANT + nvidia_smi.CHANGING, self.identifier)

    def get_shared_memory(self) -> int:
        """Return the bytes of shared memory available to a program."""
        from triton.runtime import driver

        return driver.active.utils.get_device_properties(0)["max_shared_mem"]  # type: ignore[attr-defined]

    def shapes(self) -> list[Shape]:
        return [shrink_to_fit(shape, self.properties.total_memory) for shape in SHAPES]

    def tests(self) -> list[str]:
        """Return the arguments of pytest for the tests that need a GPU."""
        return ["-m", "cuda", "tests/test_cuda.py"]

    def synchronize(self) -> None:
        """Wait for the GPU. Raises an error if a launch has failed."""
        torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Free the memory of tensors that are no longer used."""
        gc.collect()
        torch.cuda.empty_cache()

    # ---- time and memory ----

    @cached_property
    def cold_buffer(self) -> Tensor:
        """Twice the size of the L2 cache. Reading it evicts everything else, and leaves no dirty lines that would be
        written back during the next step."""
        return torch.zeros(2 * self.properties.L2_cache_size // 4, device=self.name)

    def host_seconds(self, step: Callable[[], Any]) -> float:
        """Return the seconds in which the host launches a step on an idle GPU, including any wait for the GPU."""
        self.synchronize()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def card_seconds(self, step: Callable[[], Any], host: float) -> float:
        """Return the seconds of a step on the GPU, with a cold cache. The GPU sleeps while the host launches the step,
        which takes `host` seconds, so that no kernel waits for the host."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cold_buffer.sum()
        torch.cuda._sleep(int(CYCLES * host))
        before.record()
        step()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def time_step(self, step: Callable[[], Any], longest: float = MAX_SECONDS) -> Times:
        """Return the times of a step, sampled in up to `ROUNDS` rounds that take about `longest` seconds, but at least
        three."""
        for _ in range(WARMUP):
            self.host_seconds(step)
        card, host, start = [], [], time.perf_counter()
        while len(card) < min(ROUNDS, 3) or (len(card) < ROUNDS and time.perf_counter() < start + longest):
            host.append(self.host_seconds(step))
            card.append(self.card_seconds(step, SLEEP_FACTOR * summarize(host).median))
        return Times(summarize(card), summarize(host))

    def count_peak_bytes(self, step: Callable[[], Any]) -> int:
        """Return the maximum memory that a step allocates in addition to what was allocated before."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def time_yardstick(self) -> Spread:
        """Return the time of a fixed matrix product, which shows whether the clocks of the GPU changed between
        contestants."""
        a, b = (torch.ones(2 * [self.yardstick_size], device=self.name, dtype=torch.bfloat16) for _ in range(2))
        return self.time_step(lambda: a @ b).card

    # ---- graphs and programs ----

    def compile_function(self, function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        """Return a function compiled by torch, after removing the graphs of earlier contestants. With
        "reduce-overhead", each call may overwrite the outputs of the previous one."""
        torch.compiler.reset()
        compiled = torch.compile(function, mode=mode)

        def call(*arguments: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*arguments)

        return call if mode == "reduce-overhead" else compiled

    def capture_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that replays a call as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def compile_programs(self, launches: list[Any]) -> list[str]:
        """Compile the programs of `blocks.Launch`es into Triton's cache, and return why some cannot be compiled."""
        from benchmarks.blocks import compile_all

        return compile_all(launches, (self.properties.major, self.properties.minor))

    def exclusion_reason(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> str | None:
        """Return why a program is not launched (it does not compile, does not fit, or spills registers), or None."""
        try:
            compiled = kernel.warmup(grid=grid, enable_fp_fusion=True, **arguments)
            compiled._init_handles()  # raises an error if there is not enough shared memory
        except Exception as reason:
            return describe_exception(reason)
        return "it spills registers" if compiled.n_spills else None
