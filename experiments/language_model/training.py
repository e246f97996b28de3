"""Training that can be stopped at any moment: a run of several models on the same batches, and its checkpoint."""

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
REMEDIES = "give --resume to go on, --overwrite to start again, or --out"


def learning_rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine down to a twentieth of the peak."""
    warmup = settings.steps / 20
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (settings.steps - warmup)
    return settings.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


class Training:
    """A run: its models, the batches they share and the step they have reached."""

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
        """Train up to the last step, or to `stop_at`; leaves a checkpoint."""
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
        """A progress bar; where the output is not a terminal, the lines of the evaluations are the progress."""
        hidden = None if self.first else True
        with tqdm(total=self.settings.steps, initial=self.step, unit="step", disable=hidden) as bar:
            yield bar

    first = True  # of several processes the one that reports

    def say(self, text: object) -> None:
        """Print, once however many processes there are."""
        if self.first:
            print(text, flush=True)

    def close(self) -> None:
        """Nothing to take leave of."""

    def has_checkpoint(self) -> bool:
        return (self.out / CHECKPOINT).exists()

    def refuse_to_overwrite(self) -> None:
        """An unfinished run is not thrown away by forgetting an option."""
        path = self.out / CHECKPOINT
        if path.exists():
            state = read_checkpoint(path)
            if state["step"] < state["settings"]["steps"]:
                raise SystemExit(f"{path} is of an unfinished run: {REMEDIES}")

    def save(self) -> None:
        """Everything that the rest of the run depends on, in one file."""
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
        """Go on from the checkpoint in `out`."""
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
                raise ValueError(f"{path} is of a run with {f.name} = {was}, not {now}: resume with the same settings")
        if state["corpus"] != self.corpus.digest:
            raise ValueError(f"{path} is of a run on another text: resume with the same text")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Training.save` wrote; a ValueError for a file that is damaged, or is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        problem = "" if isinstance(state, dict) and state.keys() == WRITTEN else "it holds other things than one"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        raise ValueError(f"{path} is damaged, or is no checkpoint of this program ({problem}): {REMEDIES}")
    return state


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a file so that, whenever the process dies, `path` holds either the old content or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
