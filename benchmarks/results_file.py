"""Results in a file, line by line: each is written as it comes, and survives whatever ends the process.

The first line says on which machine it was written. A task is announced before it runs: one that ended its process, or
hung, is not tried again; one that was interrupted is. Half a line at the end of a file is what a process that was
killed has left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

#: yields names of results and what computes them, and is sent each result
Tasks = Generator[tuple[str, Callable[[], Any]], Any, None]


class OtherMachineError(Exception):
    """The results are of another machine."""


@dataclass
class StoredResults:
    """What a file holds.

    Attributes:
        found: the results by name.
        begun: the task that has begun and not ended.
        whole: whether all tasks have ended.
        end: where the last whole line ends, in bytes.
    """

    found: dict[str, Any] = field(default_factory=dict)
    started: str | None = None
    complete: bool = False
    end: int = 0


def read(path: Path, machine: dict[str, Any]) -> StoredResults:
    """What a file holds that this machine has written; nothing if there is no file."""
    kept = StoredResults()
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n"):
            break
        said = json.loads(line)
        if kept.end == 0 and said.get("machine") != json.loads(json.dumps(machine)):
            raise OtherMachineError(
                f"{path} was written on {said.get('machine')}, this is {machine}: use another folder"
            )
        kept.end += len(line)
        kept.complete |= "whole" in said
        kept.started = said.get("begun")
        if "name" in said:
            kept.found[said["name"]] = said["result"]
    return kept


def record_failure(path: Path, machine: dict[str, Any], reason: str) -> bool:
    """Note what ended the task that has begun, and its process with it; False if none has."""
    kept = read(path, machine)
    if kept.started is not None:
        with path.open("a") as file:
            file.truncate(kept.end)
            write(file, {"name": kept.started, "result": {"ended": reason}})
    return kept.started is not None


def run_tasks(tasks: Tasks, path: Path, machine: dict[str, Any]) -> None:
    """Run the tasks that have no result in the file, and write each result as it comes."""
    kept = read(path, machine)
    with path.open("a") as file:
        file.truncate(kept.end)
        if not kept.end:
            write(file, {"machine": machine})
        result: Any = None
        while (task := find_next_task(tasks, result)) is not None:
            name, compute = task
            if name not in kept.found:
                write(file, {"begun": name})
                kept.found[name] = run_task(compute)
                write(file, {"name": name, "result": kept.found[name]})
            result = kept.found[name]
        write(file, {"whole": True})


def find_next_task(tasks: Tasks, result: Any) -> tuple[str, Callable[[], Any]] | None:
    """The next task after the result of the last one; None at the end."""
    try:
        return tasks.send(result)
    except StopIteration:
        return None


def run_task(compute: Callable[[], Any]) -> Any:
    """The result of a task, or what ended it."""
    try:
        return compute()
    except Exception as reason:  # of a compiler, a driver, a rival's assert
        return {"ended": describe_exception(reason)}


def describe_exception(reason: Exception) -> str:
    """What was raised, in a line."""
    return f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"


def write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, default=str) + "\n")
    file.flush()
    os.fsync(file.fileno())
