"""Results in a file, line by line: each is written as it comes, and survives whatever ends the process.

The first line says on which machine it was written. A task is announced before it runs: one that crashed its process
twice, or hung, is not tried again; one that was interrupted is. Half a line at the end of a file is what a process that
was killed has left.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

#: yields names of results and what computes them, and is sent each result
Tasks = Generator[tuple[str, Callable[[], Any]], Any, None]
TRIES = 2  # of a task that crashes its process


class OtherMachineError(Exception):
    """The results are of another machine."""


@dataclass
class Kept:
    """What a file holds.

    Attributes:
        found: the results by name.
        begun: the task that has begun and not ended.
        crashed: how often each task crashed its process.
        whole: whether all tasks have ended.
        end: where the last whole line ends, in bytes.
    """

    found: dict[str, Any] = field(default_factory=dict)
    begun: str | None = None
    crashed: Counter[str] = field(default_factory=Counter)
    whole: bool = False
    end: int = 0


def read(path: Path, machine: dict[str, Any]) -> Kept:
    """What a file holds that this machine has written; nothing if there is no file."""
    kept = Kept()
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n"):
            break
        said = json.loads(line)
        if kept.end == 0 and said.get("machine") != json.loads(json.dumps(machine)):
            raise OtherMachineError(
                f"{path} was written on {said.get('machine')}, this is {machine}: use another folder"
            )
        kept.end += len(line)
        kept.whole |= "whole" in said
        kept.begun = said.get("begun")
        if "crashed" in said:
            kept.crashed[said["crashed"]] += 1
        if "name" in said:
            kept.found[said["name"]] = said["result"]
    return kept


def blame(path: Path, machine: dict[str, Any], times: int = 1) -> None:
    """Note that the task that has begun crashed its process; so many times, as one that hangs is not tried again."""
    kept = read(path, machine)
    if kept.begun is not None:
        with path.open("a") as file:
            file.truncate(kept.end)
            for _ in range(times):
                write(file, {"crashed": kept.begun})


def keep(tasks: Tasks, path: Path, machine: dict[str, Any]) -> None:
    """Run the tasks that have no result in the file, and write each result as it comes."""
    kept = read(path, machine)
    with path.open("a") as file:
        file.truncate(kept.end)
        if not kept.end:
            write(file, {"machine": machine})
        result: Any = None
        while (task := following(tasks, result)) is not None:
            name, compute = task
            if name not in kept.found:
                if kept.crashed[name] < TRIES:
                    write(file, {"begun": name})
                    kept.found[name] = attempt(compute)
                else:
                    kept.found[name] = {"ended": "it crashed its process, or hung"}
                write(file, {"name": name, "result": kept.found[name]})
            result = kept.found[name]
        write(file, {"whole": True})


def following(tasks: Tasks, result: Any) -> tuple[str, Callable[[], Any]] | None:
    """The next task after the result of the last one; None at the end."""
    try:
        return tasks.send(result)
    except StopIteration:
        return None


def attempt(compute: Callable[[], Any]) -> Any:
    """The result of a task, or what ended it."""
    try:
        return compute()
    except Exception as reason:  # of a compiler, a driver, a rival's assert
        return {"ended": told(reason)}


def told(reason: Exception) -> str:
    """What was raised, in a line."""
    return f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"


def write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, default=str) + "\n")
    file.flush()
    os.fsync(file.fileno())
