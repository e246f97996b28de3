"""Tasks that measure one thing each, and the loop that runs those of a piece in one process.

The device is synchronized after each task, so that an asynchronous failure is attributed to the task that caused it. A
device that has failed fails in every later call of the process (an illegal memory access destroys the CUDA context), so
the process exits at once, and `task_processes.py` continues with the next task in a new one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks import results_file
from benchmarks.contestants import MissingError

DEVICE_LOST = 70  # exit status of a process whose device has failed
MIN_LIMIT = 150.0  # seconds that every task may take: compilers, autotuning and self-checks are slow at first use
LIMIT_FACTOR = 6.0  # a task may take this many times its estimate


class Task(NamedTuple):
    """Attributes:
    name: unique within a piece.
    compute: returns the result, which JSON can represent.
    seconds: how long the task is expected to take on a GPU.
    """

    name: str
    compute: Callable[[], Any]
    seconds: float

    @property
    def limit(self) -> float:
        """The number of seconds after which the task is considered to hang."""
        return max(MIN_LIMIT, LIMIT_FACTOR * self.seconds)


#: yields tasks, and is sent the result of each (None if the tasks are only listed)
Tasks = Generator[Task, Any, None]


class TaskDevice(Protocol):
    """What the loop needs of a device."""

    def synchronize(self) -> None: ...

    def release_memory(self) -> None: ...


class WrongResultError(Exception):
    """A contestant computes something else."""


def run_tasks(tasks: Tasks, path: Path, machine: dict[str, Any], device: TaskDevice) -> None:
    """Run the tasks that have no result in the file, and store each result. Exit if the device fails."""
    stored = results_file.read(path, machine)
    with path.open("a") as file:
        file.truncate(stored.end)
        if not stored.end:
            results_file.write(file, {"machine": machine})
        result: Any = None
        while (task := find_next_task(tasks, result)) is not None:
            if task.name not in stored.found:
                results_file.write(file, {"started": task.name, "limit": task.limit})
                print(task.name, flush=True)  # so that the log shows which output belongs to which task
                result, is_lost = run_isolated(task, device)
                stored.found[task.name] = result
                results_file.write(file, {"name": task.name, "result": result})
                if is_lost:
                    exit_at_once()
            result = stored.found[task.name]
        results_file.write(file, {"complete": True})


def run_isolated(task: Task, device: TaskDevice) -> tuple[Any, bool]:
    """Return the result of a task, and whether the device has failed since."""
    result = run_task(task.compute)
    if (lost := run_task(device.synchronize)) is None:
        device.release_memory()
        return result, False
    cause = result if isinstance(result, dict) and "ended" in result else lost
    return {"ended": f"the device failed: {cause['ended']}"}, True


def exit_at_once() -> None:
    """Exit without cleaning up, because destructors may wait for the device forever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DEVICE_LOST)


def find_next_task(tasks: Tasks, result: Any) -> Task | None:
    """Send the result of the last task, and return the next task, or None at the end."""
    try:
        return tasks.send(result)
    except StopIteration:
        return None


def list_tasks(tasks: Tasks) -> list[Task]:
    """Return all tasks without running them."""
    return list(iter(tasks))


def run_task(compute: Callable[[], Any]) -> Any:
    """Return the result of a task, or why it has none: `missing` (it cannot run in this environment), `wrong` or
    `ended`."""
    try:
        return compute()
    except MissingError as reason:
        return {"missing": str(reason)}
    except WrongResultError as reason:
        return {"wrong": str(reason)}
    except Exception as reason:  # compilers, drivers and other libraries may raise anything
        return {"ended": describe_exception(reason)}


def find_failure(result: Any) -> tuple[str, str] | None:
    """Return why a task has no result, as one of `missing`, `wrong` and `ended` with its reason, or None if it has."""
    if isinstance(result, dict) and len(result) == 1:
        ((status, reason),) = result.items()
        if status in ("missing", "wrong", "ended"):
            return status, reason
    return None


def describe_exception(reason: Exception) -> str:
    """Return the type and the first line of an exception."""
    return f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"
