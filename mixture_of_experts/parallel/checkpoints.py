"""Checkpoints by `torch.distributed.checkpoint` that load on another number of ranks, and survive a kill.

A checkpoint is a folder. It is written beside the earlier ones under a temporary name and gets its own when it is
whole, so that whatever dies and when, the newest folder `step-N` is complete.
"""

from __future__ import annotations

import io
import pickle
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
NAME = re.compile(r"step-(\d+)(\.old)?")


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
        keep: how many of the newest checkpoints stay; 0: all. The one that is written always does.
        process_group: the ranks that save together; a gloo group where the default one is NCCL and must not be used.

    Returns:
        The new checkpoint's folder.
    """
    folder = Path(folder)
    path = folder / f"step-{step:09d}"
    temporary, replaced = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    packed = _pack(dict(extra or {}))
    first = _on_first(process_group)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    _wait(process_group)
    state = _state(model, optimizer)
    if first:
        state["extra"] = packed
    with _quietly():
        save(state, checkpoint_id=temporary, process_group=process_group, no_dist=not dist.is_initialized())
    _wait(process_group)
    if first:
        if path.exists():  # the same step saved twice: the earlier one counts until the new one has its name
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in checkpoints(folder)[:-keep] if keep else ():
            if old != path:
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
    found = [(path, match) for path in Path(folder).glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for path, match in sorted(found, key=lambda pair: (int(pair[1][1]), pair[1][2] is None))]


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
    """As bytes: nested, empty and plain things come back as they were; what would not is refused now."""
    file = io.BytesIO()
    torch.save(extra, file)
    packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    try:
        _unpack(packed)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"extra ({', '.join(map(str, extra))}) holds what torch.load(weights_only=True) does not read: give "
            "numbers, strings, tensors, and lists, tuples and dicts of them"
        ) from error
    return packed


def _unpack(packed: Tensor) -> dict[str, Any]:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


def _on_first(group: dist.ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _wait(group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group)
