"""Clocks, power and driver of a GPU, as reported by nvidia-smi. A measurement runs without it."""

from __future__ import annotations

import csv
import subprocess

CONSTANT = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")  # the same for a whole comparison
CHANGING = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "pstate")


def query(fields: tuple[str, ...], gpu: str, command: str = "nvidia-smi") -> dict[str, str]:
    """Return the fields of a GPU, identified by its UUID or index, or an empty dict if they are unavailable."""
    arguments = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = next(csv.reader(done.stdout.splitlines(), skipinitialspace=True), [])
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
