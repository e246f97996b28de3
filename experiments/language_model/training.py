"""Trains several models on the same batches, in a run that can be stopped at any time, and saves checkpoints."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .corpus import Batches, Corpus, held_out_windows
from .settings import Settings
from .trainee import Trainee, make_trainee

CHECKPOINT = "checkpoint.pt"
WRITTEN = {"settings", "corpus", "step", "data_position", "rng", "trainees"}
REMEDIES = "pass --resume to continue, --overwrite to start over, or another --out"


def learning_rate_at(step: int, settings: Settings) -> float:
    """Return the learning rate: linear warm-up over 1/20 of the steps, then half a cosine down to 1/20 of the peak."""
    warmup = settings.steps / 20
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (settings.steps - warmup)
    return settings.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


class Training:
    """A run, with its models, their shared batches and the current step."""

    trainee: type[Trainee] = Trainee

    def __init__(self, settings: Settings, corpus: Corpus, out: Path):
        self.settings, self.corpus, self.out = settings, corpus, out
        self.step = 0
        self.batches = Batches(corpus.train, settings.context, settings.batch_size, settings.seed)
        self.windows = held_out_windows(corpus.held_out, settings.context, settings.eval_windows)
        self.trainees = [make_trainee(name, settings, self.trainee) for name in settings.models]
        torch.manual_seed(settings.seed)

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.steps

    def run(self, stop_at: int | None = None) -> None:
        """Train up to the last step or `stop_at`, and save a checkpoint."""
        stop = min(self.settings.steps, stop_at or self.settings.steps)
        with self._progress() as bar:
            while self.step < stop:
                self._train_step()
                bar.update()
                bar.set_postfix({t.name: f"{t.history.train[-1]:.3f} bits" for t in self.trainees}, refresh=False)
                if self.step % self.settings.eval_every == 0 or self.finished:
                    self._evaluate()
                if self.step % self.settings.checkpoint_every == 0 or self.step == stop:
                    self.save()

    def _train_step(self) -> None:
        windows = self.batches.next()
        for trainee in self.trainees:
            trainee.train_step(windows, learning_rate_at(self.step, self.settings))
        self.step += 1

    def _evaluate(self) -> None:
        results = (f"{trainee.name} {trainee.evaluate(self.windows):.4f}" for trainee in self.trainees)
        text = f"step {self.step}: held-out bits per byte: {', '.join(results)}"  # all processes evaluate
        if self.first:
            tqdm.write(text)

    @contextmanager
    def _progress(self) -> Iterator[tqdm]:
        """Show a progress bar, or only the evaluation lines if the output is not a terminal."""
        hidden = None if self.first else True
        with tqdm(total=self.settings.steps, initial=self.step, unit="step", disable=hidden) as bar:
            yield bar

    first = True  # whether this process reports, if there are several

    def say(self, text: object) -> None:
        """Print once, for any number of processes."""
        if self.first:
            print(text, flush=True)

    def close(self) -> None:
        """Release resources. A single process has none."""

    def has_checkpoint(self) -> bool:
        return (self.out / CHECKPOINT).exists()

    def refuse_to_overwrite(self) -> None:
        """Raise an error if `out` contains an unfinished run, which a forgotten option would otherwise delete."""
        path = self.out / CHECKPOINT
        if path.exists():
            state = read_checkpoint(path)
            if state["step"] < state["settings"]["steps"]:
                raise SystemExit(f"{path} belongs to an unfinished run: {REMEDIES}")

    def save(self) -> None:
        """Save the complete state of the run to one file."""
        cuda = torch.cuda.get_rng_state(self.settings.device) if self.settings.device.startswith("cuda") else None
        state = {
            "settings": asdict(self.settings),
            "corpus": self.corpus.digest,
            "step": self.step,
            "data_position": self.batches.position,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "trainees": {trainee.name: trainee.state_dict() for trainee in self.trainees},
        }
        assert state.keys() == WRITTEN
        self.out.mkdir(parents=True, exist_ok=True)
        save_atomically(state, self.out / CHECKPOINT)

    def load(self) -> None:
        """Resume from the checkpoint in `out`."""
        state = read_checkpoint(self.out / CHECKPOINT)
        self._check_same_run(state)
        for trainee in self.trainees:
            trainee.load_state_dict(state["trainees"][trainee.name])
        self.step, self.batches.position = state["step"], state["data_position"]
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] is not None and self.settings.device.startswith("cuda"):
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.settings.device)

    def _check_same_run(self, state: dict[str, Any]) -> None:
        path = self.out / CHECKPOINT
        for f in fields(Settings):
            was, now = state["settings"][f.name], getattr(self.settings, f.name)
            if was != now and not f.metadata.get("free"):
                raise ValueError(f"{path} belongs to a run with {f.name} = {was}, not {now}: resume with its settings")
        if state["corpus"] != self.corpus.digest:
            raise ValueError(f"{path} belongs to a run on another text: use the same text to resume")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that `Training.save` wrote. Other and damaged files raise a ValueError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        problem = "" if isinstance(state, dict) and state.keys() == WRITTEN else "it has the wrong contents"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        raise ValueError(f"{path} is damaged, or is no checkpoint of this program ({problem}): {REMEDIES}")
    return state


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a file atomically: if the process is killed, `path` contains either the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
