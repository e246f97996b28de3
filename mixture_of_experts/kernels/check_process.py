"""Runs the self-check of kernels in a new Python process, so that an illegal memory access or an endless kernel ends
that process instead of this one.

The new process shares nothing with this one: it is started by `sys.executable`, not forked, and creates a CUDA context
of its own. It reads the check, a picklable function without arguments, from its stdin, and writes a `Verdict` as JSON
to its stdout. What it prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from mixture_of_experts.support.implementations import ENVIRONMENT_VARIABLE, update_requests

TIMEOUT_SECONDS = 300  # a check compiles about a dozen programs, which takes up to a minute
OUT_OF_MEMORY = "there is not enough memory to check them"
PROGRAM = "import sys; sys.path[:] = {}; from mixture_of_experts.kernels.check_process import main; main()"
UNRELATED_STATUSES = (1, -9, -15)  # an error outside of the check; SIGKILL and SIGTERM, which others send


class Verdict(NamedTuple):
    """The fault of the kernels, or None, and whether another check on the same machine would find the same."""

    fault: str | None
    is_final: bool = True


def run_in_process(device: torch.device, find_fault: Callable[[], str | None]) -> Verdict:
    """Run a check on a device in a new process. A process that dies or does not end has found a fault."""
    if getattr(sys, "frozen", False):
        return Verdict("a frozen application has no Python interpreter to check them with", is_final=False)
    try:
        request = pickle.dumps((device, find_fault))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, ENVIRONMENT_VARIABLE: "auto"},  # the check must not start another one
        )
    except Exception as reason:
        return Verdict(f"their check cannot be started ({type(reason).__name__}: {reason})", is_final=False)
    try:
        output, _ = process.communicate(request, timeout=TIMEOUT_SECONDS)
    except BaseException as reason:
        process.kill()
        threading.Thread(target=process.communicate, daemon=True).start()  # its end may take long if a kernel hangs
        if isinstance(reason, subprocess.TimeoutExpired):
            return Verdict(f"their check did not end within {TIMEOUT_SECONDS} s", is_final=False)
        raise
    try:
        return Verdict(*json.loads(output))
    except ValueError:
        status = process.returncode
        return Verdict(f"they ended the process of their check (status {status})", status not in UNRELATED_STATUSES)


def find_verdict(find_fault: Callable[[], str | None]) -> Verdict:
    """Run a check in this process."""
    try:
        return Verdict(find_fault())
    except torch.OutOfMemoryError:
        return Verdict(OUT_OF_MEMORY, is_final=False)
    except Exception as reason:  # compilers and drivers may raise anything
        return Verdict(f"they raise {type(reason).__name__}: {str(reason).partition(chr(10))[0]}")


def main() -> None:
    """Serve `run_in_process` in the new process."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # what others print is not the verdict
        device, find_fault = pickle.load(sys.stdin.buffer)
        torch.empty(1, device=device)  # an error here is not one of the kernels, so it has status 1
        update_requests({main: ("auto", False)}, ())
        json.dump(find_verdict(find_fault), output)
    os._exit(0)  # a broken CUDA context may not end in order
