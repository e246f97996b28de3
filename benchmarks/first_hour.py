"""The first hour on a card, by one command: what only a GPU can show, in pieces, and one report of what it decides.

    python -m benchmarks.first_hour                       # into the folder first_hour/, report.md anew after each piece
    python -m benchmarks.first_hour --only "cases/*"      # pieces whose name matches
    python -m benchmarks.first_hour --list

Each piece runs in a process of its own, which may end as it likes: the others run all the same, and what it had written
stays. The same command goes on where it was interrupted; remove a file to have its piece run anew. Names of files begin
with the card's, and a folder with results of another card or torch is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks import decisions, results_file
from benchmarks.gpu_device import Device
from benchmarks.gpu_tasks import ROOT, pieces
from mixture_of_experts.kernels.launching import find_card_family
from mixture_of_experts.ops.triton import schedule

TIME_LIMIT = 300  # seconds without a line of a piece


def get_file(folder: Path, name: str, machine: dict[str, Any]) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9]+', '-', machine['card'])}.{re.sub('[ /]', '.', name)}.jsonl"


def run_all(folder: Path, only: str | None, device: Device, command: list[str], limit: float = TIME_LIMIT) -> list[str]:
    """Run every piece that is not whole; returns the names of those that ended badly."""
    folder.mkdir(parents=True, exist_ok=True)
    machine, bad = device.describe(), []
    for path in folder.glob("*.jsonl"):
        results_file.read(path, machine)  # or it is refused
    for name in pieces(device):
        path = get_file(folder, name, machine)
        if results_file.read(path, machine).complete or (only and not fnmatch(name, only)):
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        reason = run_piece([*command, "--piece", name, "--folder", str(folder)], path, machine, limit)
        if reason:
            bad.append(name)
            print(f"  {reason}: {path.with_suffix('.log')}", flush=True)
        (folder / "report.md").write_text(report(folder, device))
    return bad


def run_piece(command: list[str], path: Path, machine: dict[str, Any], limit: float) -> str | None:
    """Run a piece in its process, and again after each task that ended it; returns what ended it where no task had
    begun."""
    while (code := run_process(command, path, limit)) != 0:
        reason = f"nothing was written for {limit:.0f} seconds" if code is None else f"its process ended with {code}"
        if not results_file.record_failure(path, machine, reason):
            return reason
    return None


def run_process(command: list[str], path: Path, limit: float) -> int | None:
    """How a process ended; None if it wrote no line for so many seconds. All that it has started ends with it."""
    log = path.with_suffix(".log")
    with log.open("a") as file:
        options = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    written, since = 0, time.monotonic()
    try:
        while time.monotonic() < since + limit:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(1.0, limit))
            size = sum(each.stat().st_size for each in (log, path) if each.exists())
            written, since = (size, time.monotonic()) if size != written else (written, since)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report(folder: Path, device: Device) -> str:
    """One page of all that is there: decisions first."""
    machine, entries = device.describe(), schedule.find_entries(torch.device(device.name), torch.bfloat16)
    kepts = {name: results_file.read(get_file(folder, name, machine), machine) for name in pieces(device)}
    decided = decisions.lines({name: there.found for name, there in kepts.items()}, entries)
    rest = (line for name, there in kepts.items() for line in lines(name, there, get_file(folder, name, machine)))
    return "\n".join([f"# First hour on {machine['card']}", "", format_value(machine), *decided, *rest]) + "\n"


def lines(name: str, there: results_file.StoredResults, path: Path) -> Iterator[str]:
    """What a piece has found but times, which the decisions and its file have; and the end of its log if it failed."""
    yield f"\n## {name}\n"
    yield from (
        f"- {key}: {format_value(value)}"
        for key, value in there.found.items()
        if key != "record" and " tiles " not in key
    )
    log = path.with_suffix(".log")
    if not there.complete:
        yield "did not end" if log.exists() else "was not run"
    if log.exists() and (not there.complete or "'ended'" in str(there.found)):
        yield from (f"      {said}" for said in log.read_text().strip().splitlines()[-8:])


def format_value(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return "\n  " + "\n  ".join(map(str, value)) if value else "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None, device: Device | None = None, command: list[str] | None = None) -> int:
    made = argparse.ArgumentParser("python -m benchmarks.first_hour", description="What only a GPU can show.")
    made.add_argument("--folder", type=Path, default=Path("first_hour"), help="where results are kept")
    made.add_argument("--only", metavar="PATTERN", help="pieces whose name matches")
    made.add_argument("--list", action="store_true", help="print the pieces and stop")
    made.add_argument("--piece", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if device is None:
        if not torch.cuda.is_available() or find_card_family(torch.cuda.get_device_capability()) is None:
            print("there is no GPU here that the kernels are written for")
            return 2
        device = Device()
    folder = options.folder.resolve()
    if options.list:
        print("\n".join(pieces(device)))
    elif options.piece:
        machine = device.describe()
        results_file.run_tasks(pieces(device)[options.piece](device), get_file(folder, options.piece, machine), machine)
    else:
        for number in (signal.SIGTERM, signal.SIGHUP):  # as a lost connection does: the piece ends too
            signal.signal(number, lambda *_: sys.exit(1))
        try:
            bad = run_all(folder, options.only, device, command or [sys.executable, "-m", "benchmarks.first_hour"])
        except results_file.OtherMachineError as reason:
            print(reason)
            return 2
        text = report(folder, device)
        (folder / "report.md").write_text(text)
        print(text)
        return int(bool(bad))
    return 0


if __name__ == "__main__":
    sys.exit(main())
