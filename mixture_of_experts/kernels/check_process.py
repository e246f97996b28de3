"""Runs a kernel self-check in a new Python process, so that an illegal memory access or an infinite loop ends
that process instead of this one.

The new process is started with `sys.executable` rather than forked, and creates its own CUDA context. The process reads
a pickled check, which is a function without arguments, from stdin, and writes a `Verdict` to stdout as JSON. All other
output goes to stderr.
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
OUT_OF_MEMORY = "there was not enough memory for their self-check"
PROGRAM = "import sys; sys.path[:] = {}; from mixture_of_experts.kernels.check_process import main; main()"
UNRELATED_STATUSES = (1, -9, -15)  # 1: an error outside the check; -9 and -15: killed by SIGKILL or SIGTERM


class Verdict(NamedTuple):
    """The outcome of a self-check.

    Attributes:
        fault: description of the fault, or None if the check passed.
        is_final: whether repeating the check on this machine would produce the same outcome.
    """

    fault: str | None
    is_final: bool = True


def run_in_process(device: torch.device, find_fault: Callable[[], str | None]) -> Verdict:
    """Run a check on a device in a new process. A crash or a timeout counts as a fault."""
    if getattr(sys, "frozen", False):
        return Verdict("a frozen application has no Python interpreter to run their self-check", is_final=False)
    try:
        request = pickle.dumps((device, find_fault))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, ENVIRONMENT_VARIABLE: "auto"},  # prevents the check from starting another one
        )
    except Exception as reason:
        return Verdict(f"their self-check could not be started ({type(reason).__name__}: {reason})", is_final=False)
    try:
        output, _ = process.communicate(request, timeout=TIMEOUT_SECONDS)
    except BaseException as reason:
        process.kill()
        threading.Thread(target=process.communicate, daemon=True).start()  # a process with a hung kernel exits slowly
        if isinstance(reason, subprocess.TimeoutExpired):
            return Verdict(f"their self-check did not finish within {TIMEOUT_SECONDS} s", is_final=False)
        raise
    try:
        return Verdict(*json.loads(output))
    except ValueError:
        status = process.returncode
        return Verdict(f"their self-check exited with status {status}", status not in UNRELATED_STATUSES)


def find_verdict(find_fault: Callable[[], str | None]) -> Verdict:
    """Run a check in this process."""
    try:
        return Verdict(find_fault())
    except torch.OutOfMemoryError:
        return Verdict(OUT_OF_MEMORY, is_final=False)
    except Exception as reason:  # compilers and drivers may raise any exception
        return Verdict(f"they raised {type(reason).__name__}: {str(reason).partition(chr(10))[0]}")


def main() -> None:
    """Run the check that `run_in_process` sends to this process, and write its verdict to stdout."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # all other output goes to stderr
        device, find_fault = pickle.load(sys.stdin.buffer)
        torch.empty(1, device=device)  # an error here is not caused by the kernels, and exits with status 1
        update_requests({main: ("auto", False)}, ())
        json.dump(find_verdict(find_fault), output)
    os._exit(0)  # a normal exit may fail if the CUDA context is broken
