"""Whether training survives what happens to it: many steps, half precision, and a kill at any moment.

    python -m experiments.durability                     # all of it, on one core in about half an hour, and the table
    python -m experiments.durability steps --steps 2000  # one of: steps, fp16, kills, ranks
    python -m experiments.durability --report            # the table of what is finished

- `steps`: `experiments/train_lm.py` for 20,000 steps. Its memory, and a run that was stopped in the middle and resumed.
- `fp16`: the same model under autocast to float16 for 20,000 steps. The scale of `torch.amp.GradScaler`.
- `kills`: twenty times SIGKILL at a random moment, also while it starts and while it saves; then resumed.
- `ranks`: the same with two ranks of which one is killed, or both. The one that is left has to end by itself.

Finished parts are in `--out` and are not done again; a part that was interrupted goes on.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoints import checkpoints

from .language_model.corpus import Batches, Corpus, load_corpus
from .language_model.report import format_rows
from .language_model.settings import Settings
from .language_model.trainee import Trainee, make_trainee
from .language_model.training import CHECKPOINT, Training

ROOT = Path(__file__).parent.parent
ROUTERS = ("gshard", "mixtral_bias")  # one that draws numbers and has capacity; a dropless one with an expert bias
SIZES = dict(models=("moe",), num_experts=8, dim=16, width=32, layers=1, heads=2, context=32, batch_size=4)
SETTINGS = Settings(**SIZES, learning_rate=0.003, eval_every=500, eval_windows=8, checkpoint_every=500)
LEFT_ALONE = 60.0  # seconds in which a rank has to end after another one was killed
LINE = re.compile(r"(\d+) (\d+)\n")


# ---- the program under test, which says how far it is ----


def child(log: Path, options: Sequence[str]) -> int:
    """`train_lm`, which adds a line to a file after each step: the step, and its memory in bytes."""
    from . import train_lm

    step = Training._train_step
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def logged(self: Training) -> None:
        step(self)
        os.write(file, f"{self.step} {resident_bytes()}\n".encode())

    Training._train_step = logged  # type: ignore[method-assign]
    return train_lm.main(options)


def resident_bytes() -> int:
    """Memory of this process; 0 where there is no /proc."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def log_of(path: Path) -> list[tuple[int, int]]:
    """Step and memory of every line."""
    text = path.read_text() if path.exists() else ""
    return [(int(step), int(memory)) for step, memory in LINE.findall(text)]


def options_of(settings: Settings, out: Path) -> list[str]:
    """The settings as options of `train_lm.py`."""
    options = ["--out", str(out), "--models", *settings.models, "--router", settings.router]
    for name in (*(name for name in SIZES if name != "models"), *("learning_rate", "steps"), *FREQUENCIES):
        options += ["--" + name.replace("_", "-"), str(getattr(settings, name))]
    return [*options, "--text", *map(str, text_files())]


FREQUENCIES = ("eval_every", "eval_windows", "checkpoint_every")


def text_files() -> list[Path]:
    """A package of Python's own, which does not change while this is worked on."""
    return sorted(Path(asyncio.__file__).parent.glob("*.py"))


def start(log: Path, options: Sequence[str], **place: str) -> subprocess.Popen[str]:
    """The program in a process of its own; `place` are the variables that say which rank it is."""
    command = [sys.executable, "-m", "experiments.durability", "child", str(log), *options]
    package = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package, **place}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, text=True)
    process.stderr = errors  # a file, and no pipe that fills
    return process


def said(process: subprocess.Popen[str]) -> str:
    """What a process that has ended wrote as errors; asked for once."""
    assert process.stderr is not None
    with process.stderr as file:
        file.seek(0)
        return file.read()


def run(log: Path, options: Sequence[str], ranks: int = 1) -> None:
    """The program to its end."""
    processes = start_ranks(log, options, ranks)
    for process in processes:
        code, errors = process.wait(), said(process)
        if code:
            raise SystemExit(f"{' '.join(options)} ended with {code}:\n{errors[-3000:]}")


def start_ranks(log: Path, options: Sequence[str], ranks: int) -> list[subprocess.Popen[str]]:
    if ranks == 1:
        return [start(log, options)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = ["--expert-parallel", str(ranks), *options]
    return [start(log if rank == 0 else Path(os.devnull), options, RANK=str(rank), **world) for rank in range(ranks)]


# ---- what a run has come to ----


def final_state(out: Path, ranks: int = 1) -> dict[str, Any]:
    """All that a checkpoint holds but for times."""
    if ranks == 1:
        state = torch.load(out / CHECKPOINT, weights_only=True)
        histories = [trainee["history"] for trainee in state["trainees"].values()]
    else:
        newest = checkpoints(out / "checkpoints")[-1]
        extra = torch.load(newest / "extra.pt", weights_only=True)
        histories = list(extra["histories"].values())
        with tempfile.TemporaryDirectory() as folder:
            dcp_to_torch_save(newest, Path(folder) / "whole.pt")
            state = {"extra": extra, **torch.load(Path(folder) / "whole.pt", weights_only=True)}
    for history in histories:
        del history["seconds"]
    return state


def step_reached(out: Path, ranks: int = 1) -> int:
    """That of the newest checkpoint; 0 without one."""
    if ranks > 1:
        found = checkpoints(out / "checkpoints")
        return int(re.sub(r"\D", "", found[-1].name)) if found else 0
    path = out / CHECKPOINT
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """The places in which two states are not the same to the bit."""
    if type(one) is not type(other):
        yield f"{where}: {type(one)} and {type(other)}"
    elif isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        yield from () if same else (where,)
    elif isinstance(one, dict):
        yield from () if one.keys() == other.keys() else (f"keys of {where}",)
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        yield from () if len(one) == len(other) else (f"length of {where}",)
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{where}[{index}]")
    elif one != other:
        yield f"{where}: {one} and {other}"


def check_equal(one: Path, other: Path, ranks: int = 1) -> None:
    if found := list(differences(final_state(one, ranks), final_state(other, ranks))):
        raise SystemExit(f"{one} and {other} have come to other numbers: {', '.join(found[:5])} ...")


# ---- the parts ----


def many_steps(out: Path, settings: Settings) -> list[dict[str, Any]]:
    """Memory of a long run; another one, stopped in the middle and resumed in a new process, has the same bits."""
    found = []
    for router in ROUTERS:
        settings = replace(settings, router=router)
        straight, resumed = out / router / "straight", out / router / "resumed"
        say(f"{router}: {settings.steps} steps without a stop, then stopped and resumed")
        run_once(straight, settings)
        if not step_reached(resumed):
            run(resumed / "log", [*options_of(settings, resumed), "--stop-at", str(settings.steps // 2)])
        run(resumed / "log", [*options_of(settings, resumed), "--resume"])
        check_equal(straight, resumed)
        growth = memory_growth(log_of(straight / "log"))
        found.append({"run": router, "steps": settings.steps, "MiB per 1,000 steps": round(growth, 3)})
    return found


def run_once(out: Path, settings: Settings, ranks: int = 1) -> None:
    """A run without a stop, unless it is there."""
    if step_reached(out, ranks) < settings.steps:
        (out / "log").unlink(missing_ok=True)
        run(out / "log", [*options_of(settings, out), "--overwrite"], ranks)


def memory_growth(log: Sequence[tuple[int, int]]) -> float:
    """MiB for every 1,000 steps, by least squares, after the first tenth, in which pools and caches fill."""
    later = log[len(log) // 10 :]
    return linear_regression(*zip(*later, strict=True)).slope * 1000 / 2**20


def half_precision(out: Path, settings: Settings) -> list[dict[str, Any]]:
    """Autocast to float16 with a scaled loss. The scale doubles after 200 good steps: it is tried all the time."""
    found = []
    for router in ROUTERS:
        trainee = make_trainee("moe", replace(settings, router=router))
        scales, losses = train_in_half(trainee, load_corpus(text_files()), settings)
        late = scales[len(scales) // 10 :]
        skipped = sum(after < before for before, after in pairwise(scales))
        if not min(late) >= 2**7 or not sum(losses[-100:]) < sum(losses[:100]):
            raise SystemExit(f"{router}: scale from {min(late)} to {max(late)}, loss {losses[0]} to {losses[-1]}")
        scale = f"2^{torch.tensor(min(late)).log2():.0f} to 2^{torch.tensor(max(late)).log2():.0f}"
        found.append({"run": router, "steps": settings.steps, "scale": scale, "skipped steps": skipped})
    return found


def train_in_half(trainee: Trainee, corpus: Corpus, settings: Settings) -> tuple[list[float], list[float]]:
    """The scale and the loss of every step."""
    batches = Batches(corpus.train, settings.context, settings.batch_size, settings.seed)
    scaler = torch.amp.GradScaler("cpu", growth_interval=200)
    scales, losses = [], []
    for _ in range(settings.steps):
        windows = batches.next()
        with torch.autocast("cpu", torch.float16):
            logits, aux_loss = trainee.model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()) + aux_loss
        scaler.scale(loss).backward()
        scaler.unscale_(trainee.optimizer)
        torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), 1.0)
        scaler.step(trainee.optimizer)
        scaler.update()
        trainee.optimizer.zero_grad()
        scales.append(scaler.get_scale())
        losses.append(loss.item())
    return scales, losses


def kills(out: Path, settings: Settings, times: int, ranks: int = 1) -> list[dict[str, Any]]:
    """Kill it at a random moment and resume it, again and again; then let it end."""
    settings = replace(settings, router="gshard", checkpoint_every=20)
    straight, killed = out / "straight", out / "killed"
    run_once(straight, settings, ranks)
    records = killed / "kills.jsonl"
    killed.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    for number in range(len(done), times):
        done.append(kill_once(killed, settings, random.Random(number), ranks))
        with records.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        say(f"kill {number + 1} of {times}: {done[-1]}")
    if step_reached(killed, ranks) >= settings.steps:
        raise SystemExit(f"the run ended before its {times} kills: give more --steps")
    run(killed / "log", [*options_of(settings, killed), "--resume"], ranks)
    check_equal(straight, killed, ranks)
    row = {"run": f"{ranks} ranks" if ranks > 1 else "one process", "kills": times, "steps": settings.steps}
    row |= {"steps lost at most": max(kill["lost"] for kill in done), "checkpoint every": settings.checkpoint_every}
    return [row | ({"alone at most": f"{max(kill['alone'] for kill in done)} s"} if ranks > 1 else {})]


def kill_once(out: Path, settings: Settings, draw: random.Random, ranks: int) -> dict[str, Any]:
    """One kill: of a fifth of them while the program starts, of the others after one to sixty steps, or at a save."""
    log = out / "log"
    before = len(log_of(log))
    processes = start_ranks(log, [*options_of(settings, out), "--resume"], ranks)
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 4))
    else:
        steps = draw.randint(1, 3 * settings.checkpoint_every)
        while len(log_of(log)) < before + steps and all(process.poll() is None for process in processes):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
    victims = draw.choice([[process] for process in processes] + [processes])
    if any(process.poll() is not None for process in processes):
        raise SystemExit("it ended before it was killed:\n" + "\n".join(said(process)[-2000:] for process in processes))
    met = len(log_of(log)) > before  # ranks that have not met wait for one another; then torchrun ends the others
    victims = victims if met else processes
    for process in victims:
        process.send_signal(signal.SIGKILL)
    alone = wait_for_the_others(processes, victims)
    steps = [step for step, _ in log_of(log)[before:]]
    reached = step_reached(out, ranks)
    lost = (steps[-1] if steps else reached) - reached
    if not 0 <= lost <= settings.checkpoint_every:
        raise SystemExit(f"{lost} steps lost, with a checkpoint every {settings.checkpoint_every}")
    return {"lost": lost, "checkpoint": reached, "killed": [processes.index(victim) for victim in victims], **alone}


def wait_for_the_others(processes: list[Any], victims: list[Any]) -> dict[str, Any]:
    """How long those that were not killed went on, and what they said; they have to end by themselves and say why."""
    begin, told = time.monotonic(), ""
    for process in processes:
        try:
            code = process.wait(LEFT_ALONE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"a rank went on for {LEFT_ALONE} s after another one was killed") from None
        errors = said(process)
        if process not in victims:
            told = next((line for line in reversed(errors.splitlines()) if "Error: " in line), "")
            if not code or not told:
                raise SystemExit(f"a rank ended with {code} after another one was killed: {errors[-2000:]}")
    return {"alone": round(time.monotonic() - begin, 1), "told": told} if len(processes) > 1 else {}


# ---- the command ----


def say(text: object) -> None:
    print(text, flush=True)


Part = Callable[[Path, argparse.Namespace], list[dict[str, Any]]]

PARTS: dict[str, Part] = {
    "steps": lambda out, args: many_steps(out, replace(SETTINGS, steps=args.steps or 20_000)),
    "fp16": lambda out, args: half_precision(out, replace(SETTINGS, steps=args.steps or 20_000)),
    "kills": lambda out, args: kills(out, replace(SETTINGS, steps=args.steps or 6_000), args.kills),
    "ranks": lambda out, args: kills(out, replace(SETTINGS, steps=args.steps or 3_000), args.kills, ranks=2),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["child"]:
        return child(Path(argv[1]), argv[2:])
    args = parse_arguments(argv)
    for name in args.parts or PARTS:
        result = args.out / f"{name}.json"
        if not result.exists() and not args.report:
            say(f"{name} ...")
            with seconds() as taken:
                rows = PARTS[name](args.out / name, args)
            result.write_text(json.dumps({"rows": rows, "seconds": taken[0]}, indent=2) + "\n")
        if result.exists():
            rows = json.loads(result.read_text())["rows"]
            say(f"\n{name}\n{format_rows([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)])}")
    return 0


@contextmanager
def seconds() -> Iterator[list[float]]:
    """The seconds that something took, once it has ended."""
    taken: list[float] = []
    begin = time.monotonic()
    yield taken
    taken.append(round(time.monotonic() - begin, 1))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="steps, fp16, kills or ranks; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/durability"), help="folder of runs and results")
    parser.add_argument("--steps", type=int, help="of each run, in place of the part's own number")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--report", action="store_true", help="print what is finished")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
