"""Runs a piece in a process of its own, and in a new process after each task that ended the previous one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.tasks import DEVICE_LOST

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT = 120.0  # seconds that a process may take before its first task, and between two tasks


def run_piece(command: list[str], path: Path, machine: dict[str, Any]) -> str | None:
    """Run the command until the piece at `path` is complete.

    A task during which the process ends or hangs gets this as its result, and the next process continues with the task
    after it. Return None, or the reason why a process ended without storing any result, after which it is not tried
    again.
    """
    while True:
        before = len(results_file.read(path, machine).found)
        status = run_process(command, path, machine)
        if status == 0:
            return None
        limit = results_file.read(path, machine).limit or START_LIMIT
        reason = f"nothing was stored for {limit:.0f} seconds" if status is None else f"its process ended with {status}"
        results_file.record_failure(path, machine, reason)
        if status == DEVICE_LOST:
            print(f"  the device failed, continuing in a new process: {path.with_suffix('.log')}", flush=True)
        if len(results_file.read(path, machine).found) == before:
            return reason


def run_process(command: list[str], path: Path, machine: dict[str, Any]) -> int | None:
    """Run a process until it ends, and return its exit status, or None if a task exceeded its limit. All processes that
    it has started are killed."""
    with path.with_suffix(".log").open("a") as log:
        # verdicts of self-checks are shared by the pieces of this run, not with earlier runs
        environment = {**os.environ, "MIXTURE_OF_EXPERTS_CACHE": str(path.parent / "verdicts")}
        options: Any = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **options)
    size, since, limit = -1, time.monotonic(), START_LIMIT
    try:
        while time.monotonic() < since + limit:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(1.0, limit))
            if (now := path.stat().st_size if path.exists() else 0) != size:
                size, since = now, time.monotonic()
                limit = results_file.read(path, machine).limit or START_LIMIT
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
