"""A process in which fake tensors may be on 'cuda' though torch is built for the CPU, backward included.

`fake_cuda()` gives an executor of one worker, in which `load` has run before torch was imported: it registers a CUDA
device guard that does nothing (`fake_cuda.cpp`, built once for each version of torch). A check submitted to it makes
its tensors under `FakeTensorMode`: there `.item()` raises, and so does an operator whose tensors are on two devices.
No card can be asked what it is, so a check says which one it stands for: `card((9, 0))`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def unsupported_reason() -> str | None:
    """Why there can be no fake CUDA here; None if there can."""
    if sys.platform != "linux":
        return f"the library of fake CUDA is built for Linux, this is {sys.platform}"
    spec = importlib.util.find_spec("torch")
    if spec is not None and (Path(spec.origin or "").parent / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built for CUDA and has a device guard of its own"
    return None if shutil.which("g++") else "fake CUDA needs g++"


def fake_cuda() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=load_fake_cuda)


def load_fake_cuda() -> None:
    """Register the device guard; torch must not have been imported."""
    assert "torch" not in sys.modules, "fake CUDA comes before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    library = Path(tempfile.gettempdir()) / f"fake_cuda-{os.getuid()}-{importlib.metadata.version('torch')}.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        build_library(torch, library)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def build_library(torch: Path, library: Path) -> None:
    half = library.with_suffix(f".{os.getpid()}")  # another process may be loading what is there
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(half)]
    command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    subprocess.run([*command, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
    half.replace(library)


class Properties(NamedTuple):
    """What is asked of a card, in a form that `torch.compile` can read."""

    major: int
    minor: int
    gcnArchName: str = ""  # noqa: N815  (AMD's GPUs have it)


@contextmanager
def set_card(capability: tuple[int, int], arch: str = "") -> Iterator[None]:
    """Within it the card's compute capability is this, and of a GPU of AMD its architecture."""
    import torch

    before, properties = torch.cuda.get_device_properties, Properties(*capability, arch)
    torch.cuda.get_device_properties = lambda device=None: properties
    try:
        yield
    finally:
        torch.cuda.get_device_properties = before
