"""A file of results in JSON lines, which survives whatever ends the process that writes it.

The first line describes the machine. A task is announced before it runs and its result is appended afterwards, so that
a task that ended its process, or was killed because it hung, can be identified. A last line without an end was being
written when the process was killed, and is ignored.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO


class OtherMachineError(Exception):
    """The results were measured on another machine."""


@dataclass
class StoredResults:
    """The content of a file.

    Attributes:
        found: the results by the names of their tasks.
        started: the task that was announced and has no result.
        limit: the number of seconds that this task may take.
        complete: whether all tasks have a result.
        end: the offset in bytes at which the last readable line ends.
    """

    found: dict[str, Any] = field(default_factory=dict)
    started: str | None = None
    limit: float | None = None
    complete: bool = False
    end: int = 0


def read(path: Path, machine: dict[str, Any]) -> StoredResults:
    """Return the results in a file, which must be from this machine. There are none if the file does not exist."""
    stored = StoredResults()
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        entry = parse_line(line)
        if entry is None:
            break  # this line and all after it are measured again
        if stored.end == 0 and entry.get("machine") != json.loads(json.dumps(machine)):
            raise OtherMachineError(
                f"the results in {path} are from {entry.get('machine')}, but this machine is {machine}; pass another "
                "--folder, or remove the file"
            )
        stored.end += len(line)
        stored.complete |= "complete" in entry
        stored.started, stored.limit = entry.get("started"), entry.get("limit")
        if "name" in entry:
            stored.found[entry["name"]] = entry["result"]
    return stored


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the entry in a line, or None if the line is incomplete or unreadable."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def record_failure(path: Path, machine: dict[str, Any], reason: str) -> None:
    """If a task was announced and has no result, store why it ended."""
    stored = read(path, machine)
    if stored.started is not None:
        with path.open("a") as file:
            file.truncate(stored.end)
            write(file, {"name": stored.started, "result": {"ended": reason}})


def write(file: TextIO, entry: dict[str, Any]) -> None:
    """Append an entry, and wait until it is on the disk."""
    file.write(json.dumps(entry, default=str) + "\n")
    file.flush()
    os.fsync(file.fileno())
