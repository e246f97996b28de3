"""Measure the time and memory of a training step for each model in `scaling`, with the models interleaved.

    OMP_NUM_THREADS=1 python -m experiments.step_times                   # --size 0.3m for a larger transformer
    python -m experiments.step_times --threads 2 --out two_threads.json

Seconds are processor time, which other programs affect only through the caches. They are medians over all rounds. With
more than one thread, seconds are wall-clock time, so the machine must be idle. The file --out contains the seconds,
the number of operators called in a step, and the memory in bytes. `scaling --report` reads this file.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .language_model.corpus import Batches, load_corpus
from .language_model.report import format_rows
from .language_model.settings import Settings
from .language_model.trainee import make_trainee
from .scaling import RECORDS, base_settings
from .scaling_plan import MODELS, Run
from .sizes import SIZES

Result = dict[str, Any]  # of one model: see `summary`


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    models = args.models or list(dict.fromkeys(stage.model for stage in SIZES[args.size].stages))
    results = measure(models, base_settings(args.size), args.rounds, args.before, args.threads)
    print(table(results))
    out = args.out or RECORDS / f"step_times_{args.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(model)}: {json.dumps(own)}" for model, own in results.items())
    out.write_text(f"{{\n{lines}\n}}\n")
    print(f"wrote {out}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="0.07m", help="millions of active parameters")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="default: all models in the size's plan")
    parser.add_argument("--rounds", type=int, default=40, help="number of rounds; each model takes a step per round")
    parser.add_argument("--before", type=int, default=100, help="warm-up steps of each model, in which routers balance")
    parser.add_argument("--threads", type=int, default=1, help="number of threads; more than one requires --out")
    parser.add_argument("--out", type=Path, help="file to write; by default the record that the report reads")
    args = parser.parse_args(argv)
    if args.threads > 1 and args.out is None:
        parser.error("--threads above 1 requires --out: the records are for one thread")
    return args


# ---- measuring ----


def measure(models: Sequence[str], settings: Settings, rounds: int, before: int, threads: int = 1) -> dict[str, Result]:
    """Return the cost of a step by model, after `before` training steps.

    Each model has its own process, as in its runs, because the memory that the allocator keeps depends on everything
    that a process has freed.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {}
        for model in models:
            pool = ProcessPoolExecutor(1, context, prepare_worker, (model, settings, threads))
            processes[model] = stack.enter_context(pool)
        for process in processes.values():
            process.submit(train, max(before, 3)).result()  # the first steps allocate the optimizer's state
        order, seconds = list(models), {model: [] for model in models}
        for i in range(rounds):
            random.Random(i).shuffle(order)
            for model in order:
                seconds[model].append(processes[model].submit(seconds_of_step).result())
        return {model: process.submit(summary, seconds[model]).result() for model, process in processes.items()}


# ---- in a worker process ----

_worker: "Worker"


class Worker:
    """A model and its batches."""

    def __init__(self, model: str, settings: Settings, threads: int):
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.memory_before = peak_memory()
        self.batches = Batches(load_corpus().train, settings.context, settings.batch_size, seed=0)
        run = Run(model, seed=0, learning_rate=0.01, steps=1)
        self.trainee = make_trainee(MODELS[model].kind, run.settings(settings))

    def train_step(self) -> None:
        self.trainee.train_step(self.batches.next(), self.trainee.settings.learning_rate)


def prepare_worker(model: str, settings: Settings, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = Worker(model, settings, threads)


def train(steps: int) -> None:
    for _ in range(steps):
        _worker.train_step()


def seconds_of_step() -> float:
    begin = _worker.now()
    _worker.train_step()
    return _worker.now() - begin


class Operators(TorchDispatchMode):
    """Counts the operators that torch calls."""

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def summary(seconds: Sequence[float]) -> Result:
    """Return the median seconds of a step, the range of 80% of the steps, the memory, and the operator count."""
    tenths = quantiles(seconds, n=10) if len(seconds) > 1 else [*seconds]
    memory = peak_memory() - _worker.memory_before
    with Operators() as operators:
        _worker.train_step()
    return {
        "step": median(seconds),
        "most": [tenths[0], tenths[-1]],
        "memory": memory,
        "operators_called": operators.number,
    }


def peak_memory() -> int:
    """Return this process's peak memory in bytes (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def table(results: Mapping[str, Result]) -> str:
    """Return a table with a row for each model."""
    first = next(iter(results.values()))["step"]
    rows: list[tuple[str, ...]] = [("model", "step, ms", "of 8 in 10 rounds", "÷ first", "operators", "memory, MB")]
    for model, own in results.items():
        low, high = (1000 * seconds for seconds in own["most"])
        cells = (f"{1000 * own['step']:.1f}", f"{low:.1f} to {high:.1f}", f"{own['step'] / first:.2f}")
        rows.append((MODELS[model].label, *cells, f"{own['operators_called']}", f"{own['memory'] / 1e6:.0f}"))
    return format_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
