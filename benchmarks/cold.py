"""What an operator costs right after a product of some megabytes, and what it costs when it is called again.

python -m benchmarks.cold
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F

ROUNDS = 40


def microseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


@torch.no_grad()
def main() -> None:
    rows, weights = torch.randn(10, 80, 256), cycle(torch.randn(6, 10, 256, 1024))  # 10 MB of weights a product
    out, numbers, small = torch.empty(10, 80, 1024), torch.randn(1000), torch.randn(2, 4, 4)
    operators = {
        "slice": lambda: numbers[3:9],
        "mul": lambda: torch.mul(numbers, numbers),
        "bmm": lambda: torch.bmm(small, small),
        "sum": lambda: numbers.sum(),
        "gelu": lambda: F.gelu(numbers),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in operators}
    for turn in range(ROUNDS + 3):
        for name, operator in operators.items():
            torch.bmm(rows, next(weights), out=out)
            first = microseconds(operator)
            operator()
            if turn >= 3:
                times[name].append((first, microseconds(operator)))
    print("median microseconds, on 1000 numbers at most     after a product     again")
    for name, pairs in times.items():
        first, again = (median(column) for column in zip(*pairs, strict=True))
        print(f"{name:48} {first:15.0f} {again:9.1f}")


if __name__ == "__main__":
    main()
