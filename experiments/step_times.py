"""Time and memory of a training step of each model of `scaling`, measured alone, interleaved, in one thread.

    OMP_NUM_THREADS=1 python -m experiments.step_times                   # --size 0.3m: of a larger transformer

Every round takes a step of each model, in another order each time, and also times parts of it by themselves: the
feed-forward layers forward and backward, their routers alone, and the optimizer with the clipping of gradients.
Seconds are of the processor, so that other programs slow them by what they take of the caches and no more. The table
has medians; the file --out, which `scaling.py --report` reads, has them in seconds, and memory in bytes.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from corpus import Batches, load_corpus
from report import format_rows
from settings import Settings
from torch import nn
from training import Trainee, make_trainee

from mixture_of_experts import MoE

from .scaling import RECORDS, base_settings
from .scaling_plan import MODELS, Run
from .sizes import SIZES


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    settings = base_settings(args.size)
    seconds = measure_times(args.models, settings, args.rounds)
    times = {model: {part: median(values) for part, values in parts.items()} for model, parts in seconds.items()}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for model in args.models:
            times[model]["memory"] = pool.apply(measure_memory, (model, settings))
    print(table(times, seconds))
    out = args.out or RECORDS / f"step_times_{args.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(times, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="0.07m", help="millions of active parameters")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=60, help="steps of each model")
    parser.add_argument("--out", type=Path, help="by default the file among the records that the report reads")
    return parser.parse_args(argv)


def make(model: str, base: Settings) -> Trainee:
    settings = Run(model, seed=0, learning_rate=0.01, steps=1).settings(base)
    return make_trainee(settings.models[0], settings)


def measure_times(models: Sequence[str], settings: Settings, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, by model and part of a step."""
    batches = Batches(load_corpus().train, settings.context, settings.batch_size, seed=0)
    tasks: list[tuple[str, str, Callable[[], object]]] = []
    for model in models:
        trainee = make(model, settings)
        tasks.append((model, "step", lambda trainee=trainee: trainee.train_step(batches.next(), 0.01)))
        tasks += [(model, part, task) for part, task in parts_of(trainee).items()]
    seconds: dict[str, dict[str, list[float]]] = {model: {} for model in models}
    for i in range(rounds + 3):
        random.Random(i).shuffle(tasks)
        for model, part, task in tasks:
            begin = time.process_time()
            task()
            if i >= 3:  # the first rounds warm caches and allocate the optimizer's state
                seconds[model].setdefault(part, []).append(time.process_time() - begin)
    return seconds


def parts_of(trainee: Trainee) -> dict[str, Callable[[], object]]:
    """Parts of a step that can be run by themselves."""
    settings, twin = trainee.settings, make_like(trainee)
    x = torch.randn(settings.batch_size, settings.context, settings.dim, requires_grad=True)
    gradient = torch.randn_like(x)

    def layers() -> None:
        for block in twin.model.blocks:
            out, aux_loss = block.ffn(x)
            ((out * gradient).sum() + aux_loss).backward()

    def routers() -> None:
        for block in twin.model.blocks:
            routing = block.ffn.gate(x)
            (routing.weight.sum() + routing.balance_loss).backward()

    def optimizer() -> None:
        nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
        twin.optimizer.step()

    layers()
    for parameter in twin.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    tasks: dict[str, Callable[[], object]] = {"layers": layers, "optimizer": optimizer}
    return tasks | ({"routers": routers} if isinstance(twin.model.blocks[0].ffn, MoE) else {})


def make_like(trainee: Trainee) -> Trainee:
    """Another one with the same settings: the parts leave gradients that are not those of a step."""
    return make_trainee(trainee.name, trainee.settings)


def measure_memory(model: str, settings: Settings) -> int:
    """Bytes by which the peak memory of a process grows from a few steps of training."""
    torch.set_num_threads(1)
    batches = Batches(torch.randint(256, (100_000,), dtype=torch.uint8), settings.context, settings.batch_size, seed=0)
    before = peak_memory()
    trainee = make(model, settings)
    for _ in range(5):
        trainee.train_step(batches.next(), 0.01)
    return peak_memory() - before


def peak_memory() -> int:
    """Bytes that this process has held at most (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def table(times: dict[str, dict[str, float]], seconds: dict[str, dict[str, list[float]]]) -> str:
    """Milliseconds of the parts, a line for each model."""
    parts = ("layers", "routers", "optimizer")
    rows = [("model", "step, ms", "of 8 in 10 rounds", *(f"{part}, ms" for part in parts), "memory, MB")]
    for model, own in times.items():
        tenths = quantiles(seconds[model]["step"], n=10)
        rows.append(
            (
                MODELS[model].label,
                f"{1000 * own['step']:.1f}",
                f"{1000 * tenths[0]:.1f} to {1000 * tenths[-1]:.1f}",
                *(f"{1000 * own[part]:.1f}" if part in own else "" for part in parts),
                f"{own['memory'] / 1e6:.0f}",
            )
        )
    return format_rows(rows)


if __name__ == "__main__":
    sys.exit(main())
