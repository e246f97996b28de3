"""The first hour on a GPU, with one command: measures what only a GPU can show, and reports what it decides.

    python -m benchmarks.first_hour                       # writes first_hour/report.md after each piece
    python -m benchmarks.first_hour --only "cases/*"      # only pieces whose names match
    python -m benchmarks.first_hour --list                # prints the pieces and how long each is expected to take

Each piece runs in a process of its own, and continues in a new process after a task that crashed, hung, or left the GPU
in a failed state. To continue an interrupted hour, run the same command again; to measure a piece again, remove its
file. File names begin with the name of the GPU. A folder with results of another GPU, driver or torch is rejected.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.requirements import OldTorchError, check_torch

if TYPE_CHECKING:
    from benchmarks.gpu_device import Device


def run_all(folder: Path, only: str | None, device: Device, command: list[str]) -> list[str]:
    """Run every piece that is incomplete, and return the names of those that remain incomplete."""
    from benchmarks import gpu_report, gpu_tasks, results_file, task_processes

    folder.mkdir(parents=True, exist_ok=True)
    machine, incomplete = device.describe(), []
    for path in folder.glob("*.jsonl"):
        results_file.read(path, machine)  # raises an error if the results are from another machine
    for name, piece in gpu_tasks.pieces(device).items():
        path = gpu_tasks.get_path(folder, name, machine)
        if results_file.read(path, machine).complete or (only and not fnmatch(name, only)):
            continue
        start, estimate = time.monotonic(), gpu_tasks.estimate_seconds(piece, device)
        print(f"{time.strftime('%H:%M:%S')} {name}, expected to take {estimate:.0f} s", flush=True)
        reason = task_processes.run_piece([*command, "--piece", name, "--folder", str(folder)], path, machine)
        print(f"  took {time.monotonic() - start:.0f} s", flush=True)
        if reason:
            incomplete.append(name)
            print(f"  {reason}: {path.with_suffix('.log')}", flush=True)
        gpu_report.write_report(folder, device)
    return incomplete


def list_pieces(device: Device) -> None:
    """Print all pieces and their estimates."""
    from benchmarks.gpu_tasks import estimate_seconds, pieces

    seconds = {name: estimate_seconds(piece, device) for name, piece in pieces(device).items()}
    width = max(map(len, seconds))
    print("\n".join(f"{name:{width}} {each:5.0f} s" for name, each in seconds.items()))
    print(f"{'all':{width}} {sum(seconds.values()):5.0f} s")


def run_one(name: str, folder: Path, device: Device) -> None:
    """Run a piece in this process."""
    from benchmarks import gpu_tasks, tasks

    machine = device.describe()
    tasks.run_tasks(gpu_tasks.pieces(device)[name](device), gpu_tasks.get_path(folder, name, machine), machine, device)


def find_device() -> Device | None:
    """Return the GPU of this machine, or None if the kernels do not support it."""
    from benchmarks.gpu_device import Device
    from mixture_of_experts.kernels.launching import find_card_family

    if not torch.cuda.is_available() or find_card_family(torch.cuda.get_device_capability()) is None:
        return None
    return Device()


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.first_hour", description="Measures what only a GPU can show."
    )
    parser.add_argument("--folder", type=Path, default=Path("first_hour"), help="where results are stored")
    parser.add_argument("--only", metavar="PATTERN", help="run only pieces whose names match")
    parser.add_argument("--list", action="store_true", help="print the pieces with their estimates, and exit")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, device: Device | None = None, command: list[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        check_torch(torch.__version__)  # before this package is imported, which may fail with an older torch
    except OldTorchError as reason:
        print(reason)
        return 2
    device = device or find_device()
    if device is None:
        print("first_hour needs an NVIDIA GPU of compute capability 8.0 to 12.x, and there is none that torch can use")
        return 2
    folder = options.folder.resolve()
    if options.list:
        list_pieces(device)
    elif options.piece:
        run_one(options.piece, folder, device)
    else:
        return run_hour(folder, options.only, device, command or [sys.executable, "-m", "benchmarks.first_hour"])
    return 0


def run_hour(folder: Path, only: str | None, device: Device, command: list[str]) -> int:
    """Run all pieces, print the report, and return the exit status."""
    from benchmarks import gpu_report, results_file

    def stop(*_: Any) -> None:
        sys.exit(1)

    for number in (signal.SIGTERM, signal.SIGHUP):  # such as a lost connection: the piece's process is killed too
        signal.signal(number, stop)
    try:
        incomplete = run_all(folder, only, device, command)
    except results_file.OtherMachineError as reason:
        print(reason)
        return 2
    print(gpu_report.write_report(folder, device))
    return int(bool(incomplete))


if __name__ == "__main__":
    sys.exit(main())
