"""The first hour on a card, by one command: what only a GPU can show, in pieces of ten minutes at most, and one report.

    python -m benchmarks.first_hour                       # into the folder first_hour/, report.md last
    python -m benchmarks.first_hour --only "cases/*"      # pieces whose name matches
    python -m benchmarks.first_hour --list

Each piece runs in a process of its own, which may end as it likes: the others run all the same, and what it had written
stays. The same command goes on where it was interrupted; remove a file to have its piece run anew. Names of files begin
with the card's, and a folder with results of another card or torch is refused.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, kept
from benchmarks.pieces import ROOT, Device, pieces

LIMIT = 600  # seconds of a piece


def file_of(folder: Path, name: str, machine: dict[str, Any]) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9]+', '-', machine['card'])}.{re.sub('[ /]', '.', name)}.jsonl"


def run_all(folder: Path, only: str | None, device: Device, command: list[str], limit: float = LIMIT) -> list[str]:
    """Run every piece that is not whole; returns the names of those that ended badly."""
    folder.mkdir(parents=True, exist_ok=True)
    machine, bad = device.describe(), []
    for path in folder.glob("*.jsonl"):
        kept.read(path, machine)  # or it is refused
    for name in pieces(device):
        path = file_of(folder, name, machine)
        if kept.read(path, machine).whole or (only and not fnmatch(name, only)):
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        reason = run_piece([*command, "--piece", name, "--folder", str(folder)], path, machine, limit)
        if reason:
            bad.append(name)
            print(f"  {reason}: {path.with_suffix('.log')}", flush=True)
    return bad


def run_piece(command: list[str], path: Path, machine: dict[str, Any], limit: float) -> str | None:
    """Run a piece in its process, and again while it ends badly but writes; returns what ended it badly at last."""
    stop = time.monotonic() + limit
    while True:
        before = kept.read(path, machine)
        with path.with_suffix(".log").open("a") as log:
            try:
                options = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT, "check": False}
                ended = subprocess.run(command, timeout=stop - time.monotonic(), **options).returncode
            except subprocess.TimeoutExpired:
                kept.blame(path, machine)
                return f"it took more than {limit:.0f} seconds"
        if ended == 0:
            return None
        kept.blame(path, machine)
        if kept.read(path, machine).end == before.end or time.monotonic() > stop:
            return f"it ended with {ended}"


def report(folder: Path, device: Device) -> str:
    """One page of all that is there."""
    return "\n".join(lines(folder, device)) + "\n"


def lines(folder: Path, device: Device) -> Iterator[str]:
    machine = device.describe()
    yield f"# First hour on {machine['card']}\n"
    yield ", ".join(f"{key} {value}" for key, value in machine.items())
    for name in pieces(device):
        path = file_of(folder, name, machine)
        there, log = kept.read(path, machine), path.with_suffix(".log")
        yield f"\n## {name}\n"
        for key, value in there.found.items():
            if key == "record" and "ended" not in value:
                yield from gpu.lines(value)
            else:
                yield f"- {key}: {told(value)}"
        if not there.whole:
            said = log.read_text().strip().splitlines()[-5:] if log.exists() else []
            yield "\n".join(["did not end" if log.exists() else "was not run", *said])


def told(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {told(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return "\n  " + "\n  ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None, device: Device | None = None, command: list[str] | None = None) -> int:
    made = argparse.ArgumentParser("python -m benchmarks.first_hour", description="What only a GPU can show.")
    made.add_argument("--folder", type=Path, default=Path("first_hour"), help="where results are kept")
    made.add_argument("--only", metavar="PATTERN", help="pieces whose name matches")
    made.add_argument("--list", action="store_true", help="print the pieces and stop")
    made.add_argument("--piece", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if device is None:
        if not torch.cuda.is_available():
            print("there is no GPU here: torch.cuda.is_available() is False")
            return 2
        device = Device()
    folder = options.folder.resolve()
    if options.list:
        print("\n".join(pieces(device)))
    elif options.piece:
        machine = device.describe()
        kept.keep(pieces(device)[options.piece](device), file_of(folder, options.piece, machine), machine)
    else:
        try:
            bad = run_all(folder, options.only, device, command or [sys.executable, "-m", "benchmarks.first_hour"])
        except kept.OtherMachineError as reason:
            print(reason)
            return 2
        text = report(folder, device)
        (folder / "report.md").write_text(text)
        print(text)
        return int(bool(bad))
    return 0


if __name__ == "__main__":
    sys.exit(main())
