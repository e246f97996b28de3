"""A GPU as the benchmarks see it: shapes that fit into it, and time on it alone. A test stands a CPU in its place.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.results_file import describe_exception, run_task

ROUNDS, WARMUP = 20, 3
MAX_SECONDS = 0.3  # seconds that the rounds of a step may take
CYCLES = 3e9  # of a multiprocessor in a second, at most


@dataclass(frozen=True)
class Shape:
    """A layer and a call of it."""

    name: str
    t: int
    d: int
    h: int
    e: int
    k: int

    @property
    def mean_rows(self) -> int:
        return self.t * self.k // self.e


SHAPES = (
    Shape("qwen3-30b-a3b", 32768, 2048, 768, 128, 8),
    Shape("readme", 8192, 512, 2048, 16, 2),
    Shape("deepseek-v3", 16384, 7168, 2048, 256, 8),
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
    Shape("512-experts", 32768, 2048, 512, 512, 10),
)


def shrink_to_fit(shape: Shape, memory: int) -> Shape:
    """The shape, made smaller until a card of so many bytes holds the weights of a few contestants with gradients and
    a float32 copy, and what a call makes of its rows. Fewer experts with as many rows each come first, as on more
    cards."""
    while 3 * shape.e * shape.d * shape.h * 2 * 16 > memory:
        fewer = shape.e >= 4 * shape.k
        shape = replace(shape, t=shape.t // 2, e=shape.e // 2) if fewer else replace(shape, h=shape.h // 2)
    while shape.t * shape.k * (2 * shape.d + 4 * shape.h) * 2 * 4 > memory:
        shape = replace(shape, t=shape.t // 2)
    return shape


class Device:
    """The card."""

    name = "cuda"

    @cached_property
    def properties(self) -> Any:
        return torch.cuda.get_device_properties(0)

    def describe(self) -> dict[str, Any]:
        return {
            "card": self.properties.name,
            "capability": (self.properties.major, self.properties.minor),
            "memory": self.properties.total_memory,
            "shared memory of a program": self.get_shared_memory(),
            "torch": torch.__version__,
            "triton": __import__("triton").__version__,
        }

    def get_shared_memory(self) -> int:
        """Bytes of shared memory that a program may have."""
        from triton.runtime import driver

        return driver.active.utils.get_device_properties(0)["max_shared_mem"]  # type: ignore[attr-defined]

    def shapes(self) -> list[Shape]:
        return [shrink_to_fit(shape, self.properties.total_memory) for shape in SHAPES]

    def tests(self) -> list[str]:
        """Arguments of pytest."""
        return ["-m", "cuda", "tests/test_cuda.py"]

    # ---- time ----

    @cached_property
    def allocate_beyond_cache(self) -> Tensor:
        return torch.empty(2 * self.properties.L2_cache_size, dtype=torch.uint8, device=self.name)

    def host_seconds(self, step: Callable[[], Any]) -> float:
        """Seconds until the host has started a step, on a card that does nothing; or until the step ends, where the
        host waits for it."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def card_seconds(self, step: Callable[[], Any], host: float) -> float:
        """Seconds of a step on the card. The card sleeps until the host has queued all of the step, in `host` seconds;
        and the step finds nothing in the cache."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.allocate_beyond_cache.zero_()
        torch.cuda._sleep(int(CYCLES * host))
        before.record()
        step()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def time_steps(
        self, *steps: Callable[[], Any], longest: float = MAX_SECONDS
    ) -> list[tuple[float, float] | dict[str, str]]:
        """Of each step the median seconds on the card, and the least of the host, in rounds of all steps in turn; or
        what ended it. The rounds take `longest` seconds for each step, if they are three at least."""
        found: list[Any] = [([], []) for _ in steps]

        def turn(on_card: bool) -> None:
            for index, step in ((index, step) for index, step in enumerate(steps) if isinstance(found[index], tuple)):
                card, host = found[index]
                one = run_task(
                    partial(self.card_seconds, step, min(host)) if on_card else partial(self.host_seconds, step)
                )
                if isinstance(one, dict):
                    found[index] = one
                else:
                    (card if on_card else host).append(one)

        for _ in range(WARMUP):
            turn(on_card=False)
        start = time.perf_counter()
        turn(on_card=True)
        rounds = int(longest * len(steps) / (time.perf_counter() - start))
        for _ in range(min(ROUNDS, max(3, rounds)) - 1):
            turn(on_card=True)
        return [(median(one[0]), min(one[1])) if isinstance(one, tuple) else one for one in found]

    def time_step(self, step: Callable[[], Any]) -> tuple[float, float]:
        """The same of one step, which is not to raise."""
        (found,) = self.time_steps(step)
        if isinstance(found, dict):
            raise RuntimeError(found["ended"])
        return found

    # ---- graphs and programs ----

    def capture_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """What replays a call as a graph."""
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

    def compile(self, launches: list[Any]) -> list[str]:
        """Compile the programs of `blocks.Launch`es beforehand; returns why some cannot be."""
        from benchmarks.blocks import compile_all

        return compile_all(launches, (self.properties.major, self.properties.minor))

    def exclusion_reason(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> str | None:
        """Why a program is not to be launched: it does not compile, does not fit, or spills registers."""
        try:
            compiled = kernel.warmup(grid=grid, enable_fp_fusion=True, **arguments)
            compiled._init_handles()  # which raises where shared memory is too little
        except Exception as reason:
            return describe_exception(reason)
        return "it spills registers" if compiled.n_spills else None
