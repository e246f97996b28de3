"""Time and memory of a training step of each model of `scaling`, and where they go; interleaved.

    OMP_NUM_THREADS=1 python -m experiments.step_times                   # --size 0.3m: of a larger transformer
    python -m experiments.step_times --threads 2 --out two_threads.json

In every round each model takes a step that is timed as a whole and one in which each operator is. Seconds are of the
processor, so that other programs slow them by what they take of the caches and no more; medians over the rounds. What a
step takes beyond its operators (Python, autograd, the allocator) is "between operators". With more than one thread only
whole steps are shown, by the clock on the wall: the machine must be idle. The file --out, which `scaling --report`
reads, has seconds, calls of each operator in a step, and memory in bytes.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from .language_model.corpus import Batches, load_corpus
from .language_model.report import format_rows
from .language_model.settings import Settings
from .language_model.trainee import make_trainee
from .operator_clock import LAYERS, Clock, cost_of_watching, watched
from .scaling import RECORDS, base_settings
from .scaling_plan import MODELS, Run
from .sizes import SIZES

Result = dict[str, Any]  # of a model: see `summary`
Cost = tuple[float, float, int]  # of a step: see `cost_of_step`
BETWEEN = "between operators"
KINDS = {
    "products": {"mm", "bmm", "addmm", "baddbmm", "baddbmm_"},
    "activation, weighting": {"silu", "silu_backward", "mul", "mul_", "add", "add_", "sum"},
    "moving rows": {"index_select", "index_fill_", "index", "gather", "sort", "cat", "_embedding_bag_forward_only"}
    | {"scatter", "scatter_add", "nonzero", "clone", "copy_", "_index_put_impl_", "index_put_"},
    "views": {"view", "slice", "transpose", "t", "expand", "select", "unsqueeze", "squeeze", "as_strided", "detach"}
    | {"_unsafe_view", "alias", "split", "split_with_sizes", "unbind", "permute"},
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    models = args.models or list(dict.fromkeys(stage.model for stage in SIZES[args.size].stages))
    results = measure(models, base_settings(args.size), args.rounds, args.before, args.threads)
    print(table(results))
    if args.threads == 1:
        print(f"\n{parts_table(results)}")
        if "moe32" in results:
            print(f"\n{operators_table(results)}")
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
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="by default all of the size's plan")
    parser.add_argument("--rounds", type=int, default=40, help="in which each model takes two steps")
    parser.add_argument("--before", type=int, default=100, help="steps of each before: routers balance in them")
    parser.add_argument("--threads", type=int, default=1, help="that compute a step; with more than one give --out")
    parser.add_argument("--out", type=Path, help="by default the file among the records that the report reads")
    args = parser.parse_args(argv)
    if args.threads > 1 and args.out is None:
        parser.error("--threads above 1 needs --out: the records are of one thread")
    return args


# ---- measuring ----


def measure(models: Sequence[str], settings: Settings, rounds: int, before: int, threads: int = 1) -> dict[str, Result]:
    """What a step costs, by model, after `before` steps of training.

    Each model has a process of its own, as in its runs: what the allocator keeps depends on all that a process frees.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {}
        for model in models:
            pool = ProcessPoolExecutor(1, context, prepare_worker, (model, settings, threads))
            processes[model] = stack.enter_context(pool)
        for process in processes.values():
            process.submit(train, max(before, 3)).result()  # the first steps allocate the optimizer's state
        order, costs = list(models), {model: [] for model in models}
        for i in range(rounds):
            random.Random(i).shuffle(order)
            for model in order:
                costs[model].append(processes[model].submit(cost_of_step).result())
                processes[model].submit(watch_step).result()
        return {model: process.submit(summary, costs[model]).result() for model, process in processes.items()}


# ---- in a process of its own ----

_worker: "Worker"


class Worker:
    """A model, its batches, and what its steps were seen to do."""

    def __init__(self, model: str, settings: Settings, threads: int):
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.memory_before = peak_memory()
        self.batches = Batches(load_corpus().train, settings.context, settings.batch_size, seed=0)
        run = Run(model, seed=0, learning_rate=0.01, steps=1)
        self.trainee = make_trainee(MODELS[model].kind, run.settings(settings))
        self.clocks: list[Clock] = []

    def train_step(self) -> None:
        self.trainee.train_step(self.batches.next(), self.trainee.settings.learning_rate)


def prepare_worker(model: str, settings: Settings, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = Worker(model, settings, threads)


def train(steps: int) -> None:
    for _ in range(steps):
        _worker.train_step()


def cost_of_step() -> Cost:
    """Of a step: seconds, those of the processor in the system, and page faults."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), _worker.now()
    _worker.train_step()
    seconds, after = _worker.now() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt


def watch_step() -> None:
    """Take a step whose operators are timed."""
    with watched(_worker.trainee) as clock:
        _worker.train_step()
    _worker.clocks.append(clock)


def summary(costs: Sequence[Cost]) -> Result:
    """Seconds of a step, of eight in ten of them and of them in the system; page faults, parts, operators, memory."""
    clocks = _worker.clocks
    seconds, system, faults = zip(*costs, strict=True)
    tenths = quantiles(seconds, n=10) if len(seconds) > 1 else [*seconds]
    watching = cost_of_watching()
    keys = set[tuple[str, str]]().union(*(clock.seconds for clock in clocks))
    operators = []
    for part, operator in keys:
        key = part, operator
        own = median(clock.seconds[key] - watching * clock.calls[key] for clock in clocks)
        operators.append((part, operator, round(max(own, 0.0), 7), median(clock.calls[key] for clock in clocks)))
    operators.sort(key=lambda line: -line[2])
    parts: dict[str, float] = {}
    for part, operator, own, _ in operators:
        name = name_of(part, operator)
        parts[name] = parts.get(name, 0.0) + own
    parts[BETWEEN] = median(seconds) - sum(parts.values())
    return {
        "step": median(seconds),
        "most": [tenths[0], tenths[-1]],
        "system": median(system),
        "faults": median(faults),
        "memory": peak_memory() - _worker.memory_before,
        "parts": parts,
        "operators": operators,
    }


def name_of(part: str, operator: str) -> str:
    """A line of the table: the feed-forward layers without their routers by kind, the rest by part."""
    if part != LAYERS:
        return part
    return next((f"{LAYERS}: {kind}" for kind, names in KINDS.items() if operator in names), f"{LAYERS}: other")


def peak_memory() -> int:
    """Bytes that this process has held at most (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


# ---- tables ----


def table(results: Mapping[str, Result]) -> str:
    """A line for each model."""
    first = next(iter(results.values()))["step"]
    rows: list[tuple[str, ...]] = [
        ("model", "step, ms", "of 8 in 10 rounds", "÷ first", "in the system", "page faults", "operators", "memory, MB")
    ]
    for model, own in results.items():
        low, high = (1000 * seconds for seconds in own["most"])
        cells = (f"{1000 * own['step']:.1f}", f"{low:.1f} to {high:.1f}", f"{own['step'] / first:.2f}")
        calls = sum(calls for *_, calls in own["operators"])
        more = (f"{1000 * own['system']:.1f}", f"{own['faults']:.0f}", f"{calls:.0f}", f"{own['memory'] / 1e6:.0f}")
        rows.append((MODELS[model].label, *cells, *more))
    return format_rows(rows)


def parts_table(results: Mapping[str, Result]) -> str:
    """Milliseconds of the parts, a column for each model, and how much they are above the first one's."""
    names = sorted({name for own in results.values() for name in own["parts"]})
    labels = [MODELS[model].label for model in results]
    rows: list[tuple[str, ...]] = [("part, ms", *labels, *(f"{label}, more" for label in labels[1:]))]
    for name in names:
        cells = [1000 * own["parts"].get(name, 0.0) for own in results.values()]
        rows.append((name, *(f"{cell:.1f}" for cell in cells), *(f"{cell - cells[0]:+.1f}" for cell in cells[1:])))
    return format_rows(rows)


def operators_table(results: Mapping[str, Result], other: str = "moe32", lines: int = 15) -> str:
    """The operators whose milliseconds, of all parts, differ most between the first model and another."""
    base = next(iter(results))
    (first, calls), (last, more_calls) = by_operator(results[base]), by_operator(results[other])
    names = sorted({*first, *last}, key=lambda name: -abs(last[name] - first[name]))
    labels = (MODELS[base].label, MODELS[other].label)
    heads = (head for label in labels for head in (f"{label}, ms", "calls"))
    rows: list[tuple[str, ...]] = [("operator", *heads, "more, ms")]
    for name in names[:lines]:
        before, after = f"{1000 * first[name]:.2f}", f"{1000 * last[name]:.2f}"
        more = f"{1000 * (last[name] - first[name]):+.2f}"
        rows.append((name, before, f"{calls[name]:.0f}", after, f"{more_calls[name]:.0f}", more))
    return format_rows(rows)


def by_operator(own: Result) -> tuple[Counter[str], Counter[str]]:
    """Seconds and calls of each operator, in all parts."""
    seconds, calls = Counter[str](), Counter[str]()
    for _, operator, taken, number in own["operators"]:
        seconds[operator] += taken
        calls[operator] += number
    return seconds, calls


if __name__ == "__main__":
    sys.exit(main())
