"""Trains the runs of a plan in parallel processes, and records every finished run.

A record is a line of JSON. Interrupted runs resume from their checkpoints, and finished runs are never repeated.
"""

import json
import multiprocessing
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .language_model.corpus import Corpus
from .language_model.routers import ROUTERS
from .language_model.settings import Settings
from .language_model.trainee import Trainee
from .language_model.training import CHECKPOINT, Training
from .scaling_plan import Plan, Record, Run, final_bits
from .text import Text
from .upcycling import upcycle

STRETCH = 100  # number of steps over which each recorded training loss is averaged


class Records:
    """A JSON Lines file of finished runs that share one text and base settings."""

    def __init__(self, path: Path, base: Settings):
        self.path, self.base = path, base
        self.finished: dict[Run, Record] = {}
        if path.exists():
            for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
                if not line.endswith("\n"):
                    break  # the writer was killed, so this run is repeated
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise SystemExit(f"{path}, line {number}, is no record ({error}): delete the line") from error
                run = Run(*record["run"])
                if self._is_of(record, run):
                    self.finished[run] = record

    def add(self, run: Run, record: Record) -> None:
        """Append a record to the file, and remove an incomplete last line."""
        self.finished[run] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.read_text() if self.path.exists() else ""
        with open(self.path, "a") as file:
            file.truncate(len(written[: written.rfind("\n") + 1].encode()))  # remove an incomplete line
            file.write(json.dumps(record) + "\n")

    def check_text(self, digest: str) -> None:
        """Raise an error if the finished runs used another text, because such runs are not comparable."""
        for record in self.finished.values():
            if record["corpus"] != digest:
                sources = ", ".join(record.get("sources", ())) or "another version of Python"
                raise SystemExit(
                    f"{self.path} contains runs on another text than this machine's, the sources of {sources}: install "
                    "them into a folder (pip install --no-deps --target) and put it first on PYTHONPATH, pass "
                    "--report to see these runs, or pass a new file as --records to start over"
                )

    def _is_of(self, record: Record, run: Run) -> bool:
        expected = json.loads(json.dumps(asdict(run.settings(self.base))))
        free = {f.name for f in fields(Settings) if f.metadata.get("free")}
        return all(expected[name] == value for name, value in record["settings"].items() if name not in free)


def train_all(plan: Plan, records: Records, text: Text, out: Path, processes: int) -> None:
    """Train all runs of the plan that have no record yet."""
    context = multiprocessing.get_context("spawn")
    steps_done = context.Value("q", 0)
    arguments = (steps_done, text, records.base, out)
    with (
        ProcessPoolExecutor(processes, context, prepare_worker, arguments) as pool,
        tqdm(unit="step", smoothing=0.01) as bar,
    ):
        running: dict[Future[Record], Run] = {}
        before = set(records.finished)
        while True:
            for run in next_runs(plan, records, running, processes):
                running[pool.submit(train, run)] = run
            if not running:
                return
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                records.add(run, {**future.result(), "sources": text.sources})
                if run not in {further.start for further in plan.runs(records.finished)}:
                    shutil.rmtree(out / str(run), ignore_errors=True)
                tqdm.write(f"{run}: {final_bits(records.finished[run]):.4f} bits a byte held out")
            bar.n = steps_done.value
            bar.total = steps_known(plan, records, before)
            bar.set_postfix_str(", ".join(map(str, running.values())), refresh=False)
            bar.refresh()


def steps_known(plan: Plan, records: Records, before: Collection[Run]) -> int:
    """Return the total steps of the runs planned so far, except those that were finished `before`."""
    return sum(run.steps for run in plan.runs(records.finished) if run not in before)


def next_runs(plan: Plan, records: Records, running: dict[Any, Run], processes: int) -> Iterator[Run]:
    """Yield the plan's next runs that are neither finished nor running, one for each idle process."""
    waiting = [run for run in plan.runs(records.finished) if run not in records.finished]
    waiting = [run for run in waiting if run not in running.values()]
    yield from waiting[: processes - len(running)]


# ---- in a worker process ----

_worker: tuple[Any, Corpus, Settings, Path]


def prepare_worker(steps_done: Any, corpus: Corpus, base: Settings, out: Path) -> None:
    """Store what all runs of this process share."""
    global _worker
    torch.set_num_threads(1)
    _worker = steps_done, corpus, base, out


class CountedTraining(Training):
    """Training without output, which counts its steps for the main process's progress bar."""

    first = False
    steps_done: Any

    def _train_step(self) -> None:
        super()._train_step()
        self._count(1)

    def load(self) -> None:
        super().load()
        self._count(self.step)

    def _count(self, steps: int) -> None:
        with self.steps_done.get_lock():
            self.steps_done.value += steps


def train(run: Run) -> Record:
    """Train a run, resuming from its checkpoint if it has one."""
    steps_done, corpus, base, out = _worker
    training = CountedTraining(run.settings(base), corpus, out / str(run))
    training.steps_done = steps_done
    if training.has_checkpoint():
        training.load()
    elif run.start:
        begin_from(run.start, training)
    training.run()
    return record_of(run, training)


def begin_from(start: Run, training: Training) -> None:
    """Upcycle the model of a finished dense run, and continue with the next batches.

    If the checkpoint of the dense run is missing, because another machine trained it, train it again in the new run's
    folder.
    """
    _, corpus, base, out = _worker
    kept = (out / str(start) / CHECKPOINT).exists()
    dense = Training(start.settings(base), corpus, out / str(start) if kept else training.out / "start")
    if dense.has_checkpoint():
        dense.load()
    dense.run()
    upcycle(training.trainees[0].model, dense.trainees[0].model)
    training.batches.position = dense.batches.position


def record_of(run: Run, training: Training) -> Record:
    """Return all data about a finished run that tables and pictures need."""
    (trainee,) = training.trainees
    summary = trainee.summary()
    return {
        "run": list(run),
        "settings": asdict(training.settings),
        "corpus": training.corpus.digest,
        "torch": torch.__version__,
        "total_parameters": summary["total_parameters"],
        "active_parameters": summary["active_parameters"],
        "training_seconds": round(summary["training_seconds"], 1),
        "held_out": [[step, round(bits, 5)] for step, bits in trainee.history.held_out],
        "train": stretch_means(trainee.history.train),
        **summarize_load(trainee),
    }


def stretch_means(losses: list[float]) -> list[float]:
    """Return the mean training loss of every `STRETCH` steps."""
    return [round(part.mean().item(), 4) for part in torch.tensor(losses, dtype=torch.float64).split(STRETCH)]


def summarize_load(trainee: Trainee) -> dict[str, Any]:
    """Return the highest and lowest expert loads and the dropped share in the last quarter of the steps.

    All three are averaged over the layers.
    """
    loads = trainee.history.loads[-max(1, len(trainee.history.loads) // 4) :]
    counts = torch.stack(loads).double().sum(0)  # (layers, experts)
    if not counts.numel():
        return {}
    settings = trainee.settings
    sent = len(loads) * settings.batch_size * settings.context * ROUTERS[settings.router].choices
    return {
        "busiest": ratio(counts.amax(-1), counts),
        "idlest": ratio(counts.amin(-1), counts),
        "dropped": round(1 - counts.sum(-1).mean().item() / sent, 5),
    }


def ratio(load: Tensor, counts: Tensor) -> float:
    """Return each layer's `load` divided by its mean load, averaged over the layers."""
    return round((load / counts.mean(-1)).mean().item(), 3)
