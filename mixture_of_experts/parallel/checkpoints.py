"""Checkpoints by `torch.distributed.checkpoint` that load on another number of ranks, and survive a kill.

A checkpoint is a folder. It is written beside the earlier ones under a temporary name and gets its own when it is
whole, so that whatever dies and when, the newest folder `step-N` is complete.
"""

from __future__ import annotations

import io
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

# hyperparameters by parameter, not by group: another number of ranks may group parameters otherwise
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
Optimizers = Optimizer | tuple[Optimizer, ...] | None
NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `folder/step-N`; all ranks call it together, on a file system that they share.

    Args:
        folder: where the checkpoints of a run are.
        model, optimizer: of any layout; several optimizers as a tuple.
        step: N, which orders the checkpoints.
        extra: other things to keep, such as `torch.load(..., weights_only=True)` reads; the first rank's are written.
        keep: how many of the newest checkpoints stay.
        process_group: the ranks that save together; a gloo group where the default one is NCCL and must not be used.

    Returns:
        The new checkpoint's folder.
    """
    folder = Path(folder)
    path, temporary = folder / f"step-{step:09d}", folder / f"step-{step:09d}.tmp"
    first = _on_first(process_group)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    _wait(process_group)
    state = _state(model, optimizer)
    if first:
        state["extra"] = _pack(dict(extra or {}))
    with _quietly():
        save(state, checkpoint_id=temporary, process_group=process_group, no_dist=not dist.is_initialized())
    _wait(process_group)
    if first:
        shutil.rmtree(path, ignore_errors=True)  # the same step saved twice
        temporary.rename(path)
        for old in checkpoints(folder)[:-keep] if keep else ():
            shutil.rmtree(old)
    _wait(process_group)
    return path


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into a model and optimizer of whatever layout, on any number of ranks; returns `extra`.

    Args:
        path: a checkpoint, or a folder of them, of which the newest is read.
    """
    path = Path(path)
    if not (path / ".metadata").exists():
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path} is no checkpoint and holds none (folders step-N)")
        path = found[-1]
    reader = FileSystemReader(path)
    size = reader.read_metadata().state_dict_metadata["extra"].size  # type: ignore[union-attr]
    state = {**_state(model, optimizer), "extra": torch.empty(size, dtype=torch.uint8)}
    with _quietly():
        load(state, storage_reader=reader, process_group=process_group, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=OPTIONS)
    return _unpack(state["extra"])


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _state(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
    return state


@contextmanager
def _quietly() -> Iterator[None]:
    """A process without process groups is told that it is one, which is meant; torch 2.9 warns of its own storages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def _pack(extra: dict[str, Any]) -> Tensor:
    """As bytes: nested, empty and plain things come back as they were."""
    file = io.BytesIO()
    torch.save(extra, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpack(packed: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


def _on_first(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _wait(group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group)
