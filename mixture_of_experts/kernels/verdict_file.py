"""Stores the verdicts of self-checks on disk, so that each kind of kernel is checked only once per machine.

Each verdict has its own file, which is replaced atomically, so that several processes may write at once. The file lists
everything that the verdict depends on, and its name is a hash of that list. A file with a different list is ignored.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch

CACHE_VARIABLE = "MIXTURE_OF_EXPERTS_CACHE"  # a folder; an empty string disables storage on disk
DRIVER = Path("/proc/driver/nvidia/version")


class VerdictFile:
    """The file that stores one verdict. No file is used for CPUs or for GPUs whose driver version is unknown.

    Args:
        device: device on which the kernels are checked.
        kernels: name of the kernels, as in `SelfCheck`.
        kind: kind of call that is checked. The kind's `repr` must be the same in all processes.
    """

    def __init__(self, device: torch.device, kernels: str, kind: Hashable) -> None:
        self.key: list[str] = [kernels, repr(kind)]
        self.path: Path | None = None
        default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mixture_of_experts")
        folder = os.path.expanduser(os.environ.get(CACHE_VARIABLE, default))
        if device.type == "cuda" and folder:
            try:
                self.key += describe_environment(device)
            except (OSError, ImportError):
                return  # verdicts are not stored if a version is unknown
            self.path = Path(folder, hashlib.sha256(json.dumps(self.key).encode()).hexdigest() + ".json")

    def read(self) -> list[str | None]:
        """Return a list that contains the stored fault, or an empty list if there is no valid file. If the kernels
        passed, the fault is None."""
        try:
            *key, fault = json.loads(self.path.read_bytes()) if self.path else []
        except (OSError, ValueError, TypeError):
            return []
        return [fault] if key == self.key and isinstance(fault, str | None) else []

    def write(self, fault: str | None) -> None:
        """Store a verdict if the folder is writable."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump([*self.key, fault], file)
            os.replace(file.name, self.path)
        except OSError:
            pass


def describe_environment(device: torch.device) -> list[str]:
    """Return everything that kernel results depend on: the card, the driver, the versions of torch and Triton, and the
    sources of this package."""
    card, sources = torch.cuda.get_device_properties(device), hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    versions = [torch.__version__, importlib.metadata.version("triton"), sources.hexdigest()]
    return [f"{card.name} {card.major}.{card.minor}", DRIVER.read_text(), *versions]
