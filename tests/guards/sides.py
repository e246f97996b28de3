"""The two sides of a comparison: checkouts of two trees, and processes that answer questions on each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .outcomes import Uncomputed
from .renames import TABLE

ROOT = Path(__file__).parents[2]
GUARDS = Path("tests/guards")


class Failure(NamedTuple):
    """The error that a question ended in."""

    reason: str
    traceback: str


class Side:
    """A process in a checkout. A question is the name of a function `module.function` of the guards, and its arguments
    in JSON."""

    def __init__(self, folder: Path, table: Path | None = None) -> None:
        """
        Args:
            folder: the checkout.
            table: renames since then, if it is the earlier commit's.
        """
        paths = os.pathsep.join([str(folder), str(folder / "tests")])
        quiet = {"KINETO_LOG_LEVEL": "99"}  # torch's profiler tells when it starts
        translation = {} if table is None else {TABLE: str(table)}
        environment = {**os.environ, **quiet, **translation, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.guards.answer"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, function: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([function, *arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process in {self.process.args} ended: what it wrote stands above")
        answer = json.loads(line)
        return answer["found"] if "found" in answer else Failure(answer["failed"], answer["traceback"])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Sides:
    """Both sides, which answer at the same time."""

    def __init__(self, before: Side, now: Side) -> None:
        self.before, self.now = before, now

    def ask(self, function: str, *arguments: Any) -> tuple[Any, Any]:
        """The answers of both, the earlier commit's first: an `Uncomputed` if it has none.

        Raises RuntimeError if this tree has none.
        """
        self.before.ask(function, *arguments)
        self.now.ask(function, *arguments)
        before, now = self.before.answer(), self.now.answer()
        if isinstance(now, Failure):
            raise RuntimeError(f"{function} fails in this tree:\n{now.traceback}")
        return Uncomputed(before.reason) if isinstance(before, Failure) else before, now


@contextmanager
def sides(commit: str) -> Iterator[Sides]:
    """An earlier commit, with the guards of this tree, and this tree as it is, uncommitted changes included."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "--extract", "--directory", folder], input=archive, check=True)
        shutil.copytree(ROOT / GUARDS, Path(folder) / GUARDS, dirs_exist_ok=True)
        both = [Side(Path(folder), ROOT / GUARDS / "renames.tsv"), Side(ROOT)]
        for side in both:
            stack.callback(side.end)
        yield Sides(*both)
