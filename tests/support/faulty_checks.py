"""Self-checks that end badly, for new processes, which have none of the tests' patches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mixture_of_experts.dispatch import queues
from mixture_of_experts.kernels import verdict_file

find_queue_fault = queues._find_queue_fault


def raise_error(error: Exception) -> None:
    raise error


FAULTS: dict[str, Callable[[], Any]] = {
    "is right": partial(print, "a message on stdout"),
    "is wrong": partial(print, "a message on stdout"),
    "raises": partial(raise_error, RuntimeError("a compiler gives up\nfor some reason")),
    "lacks memory": partial(raise_error, torch.OutOfMemoryError("no memory")),
    "aborts": os.abort,
    "exits": partial(os._exit, 7),
    "hangs": partial(time.sleep, 3600),
}


def check_faulty_kernels(fault: str, file: str, device: torch.device) -> str | None:
    """Check the kernels of queues with a fault in their launches, and write the id of this process to a file."""
    from mixture_of_experts.kernels import queueing

    Path(file).write_text(str(os.getpid()))
    launch = queueing.launch_kernel

    def launch_faulty_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        FAULTS[fault]()
        launch(kernel, grid, **arguments)
        if fault == "is wrong" and "position" in arguments:
            arguments["position"].add_(1)

    queueing.launch_kernel = launch_faulty_kernel
    return find_queue_fault(device)


def use_fake_card(driver: str, name: str = "some card") -> None:
    """Let this process have a card that can only be described."""
    verdict_file.DRIVER = Path(driver)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(name=name, major=9, minor=0)  # type: ignore


def write_verdicts(driver: str, faults: list[str | None]) -> None:
    """Write verdicts of one kind, one after the other."""
    use_fake_card(driver)
    for fault in faults:
        verdict_file.VerdictFile(torch.device("cuda"), "some kernels", "kind").write(fault)
