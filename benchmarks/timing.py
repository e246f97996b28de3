"""The machine that figures belong to, interleaved rounds, and ratios that count only where a contestant agrees with
itself.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch

from benchmarks.cases import Case, Figure
from benchmarks.contestants import Contestant

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def machine() -> dict:
    """What figures belong to."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
    }


AGAIN = " (again)"
MAX_DISAGREEMENT = 0.03
MIN_ROUNDS = 15

Clock = Literal["wall", "cpu"]
# Seconds of all this process's threads pass over what others do on the same cores, but count threads that wait for
# each other: use them with one thread.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Samples:
    """Seconds of each round, and page faults of each round or process."""

    seconds: list[float]
    faults: list[int]

    def summary(self) -> dict[str, float]:
        spread = quantiles(self.seconds, n=4, method="inclusive") if len(self.seconds) > 1 else [self.seconds[0]] * 3
        return {"median_s": spread[1], "q1_s": spread[0], "q3_s": spread[2], "faults": median(self.faults)}


def rounds_of(
    contestants: dict[str, Contestant],
    twice: Sequence[str],
    rounds: int,
    warmup: int,
    clock: Clock = "wall",
    seed: int = 0,
) -> dict[str, Samples]:
    """Time every contestant once a round, those in `twice` under two names, in an order shuffled anew each round.

    The shuffle is seeded. It gives everyone the same neighbours on average: what one leaves in the caches and in the
    allocator is the next one's start.
    """
    runners = dict(contestants) | {name + AGAIN: contestants[name] for name in twice if name in contestants}
    samples = {name: Samples([], []) for name in runners}
    order, shuffle = list(runners), random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            shuffle(order)
            for name in order:
                seconds, faults = timed(runners[name], clock)
                if turn >= warmup:
                    samples[name].seconds.append(seconds)
                    samples[name].faults.append(faults)
    finally:
        gc.enable()
    return samples


def timed(contestant: Contestant, clock: Clock) -> tuple[float, int]:
    """Seconds and minor page faults of one step."""
    now = CLOCKS[clock]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = now()
    contestant.step()
    seconds = now() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    contestant.release()
    return seconds, faults


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' own ratios: what slows a whole round down cancels."""
    return median(a / b for a, b in zip(over, under, strict=True))


def fastest(figure: Figure, samples: dict[str, Samples]) -> str | None:
    """The reference with the smallest median of those that ran."""
    ran = [name for name in figure.references if name in samples]
    return min(ran, key=lambda name: median(samples[name].seconds), default=None)


def time_figure(figure: Figure, samples: dict[str, Samples], half: str) -> dict | None:
    """The figure's value, its A/A ratio and whether it counts; None where somebody is missing."""
    reference = fastest(figure, samples)
    if reference is None or figure.numerator not in samples:
        return None
    value, same = ratio(figure.numerator, reference, samples)
    valid = abs(same - 1) <= MAX_DISAGREEMENT and len(samples[reference].seconds) >= MIN_ROUNDS
    return figure_row(figure, half, value, valid) | {"aa": same, "numerator": figure.numerator, "reference": reference}


def ratio(numerator: str, reference: str, samples: dict[str, Samples]) -> tuple[float, float]:
    """Of the times, and the A/A ratio of the reference."""
    first, again = samples[reference].seconds, samples[reference + AGAIN].seconds
    both = [(a * b) ** 0.5 for a, b in zip(first, again, strict=True)]
    return paired_ratio(samples[numerator].seconds, both), paired_ratio(again, first)


def memory_figure(figure: Figure, peaks: dict[str, int], half: str) -> dict | None:
    """The same for peak memory, which is counted, not sampled: it always counts."""
    ran = [name for name in figure.references if name in peaks]
    if not ran or figure.numerator not in peaks:
        return None
    return figure_row(figure, half, peaks[figure.numerator] / min(peaks[name] for name in ran), True)


def figure_row(figure: Figure, half: str, value: float, valid: bool) -> dict:
    target = figure.target_for(half)
    met = None if target is None or not valid else value <= target
    row = {"label": figure.label, "quantity": figure.quantity, "value": value, "valid": valid}
    return row | {"target": target, "met": met}


def measure(
    case: Case, contestants: dict[str, Contestant], rounds: int, attempts: int, clock: Clock = "wall", seed: int = 0
) -> dict[str, Samples]:
    """Time the case, up to `attempts` times while a reference disagrees with itself; the calmest attempt stays."""
    best, best_off = {}, float("inf")
    for attempt in range(attempts):
        samples = rounds_of(contestants, case.references, rounds, 3 if attempt == 0 else 1, clock, seed)
        off = worst_disagreement(case, samples)
        if off < best_off:
            best, best_off = samples, off
        if off <= MAX_DISAGREEMENT:
            break
    return best


def worst_disagreement(case: Case, samples: dict[str, Samples]) -> float:
    """How far the A/A ratio of any figure's reference is from 1."""
    rows = (time_figure(f, samples, "ordinary") for f in case.figures if f.quantity == "time")
    return max((abs(row["aa"] - 1) for row in rows if row is not None), default=0.0)
