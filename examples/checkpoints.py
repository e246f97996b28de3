"""Checkpoints of models that are spread over ranks: they load on another number of ranks, and survive a kill."""

import io
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as states
from torch import nn
from torch.optim import Optimizer

Optimizers = Optimizer | tuple[Optimizer, ...]
# hyperparameters by parameter, not by group: another number of ranks may group parameters otherwise
BY_PARAMETER = states.StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizers, *, step: int, extra: dict[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-N`, on a file system that all ranks share; the newest `keep` checkpoints stay, and this one.

    It has a temporary name until it is whole, so that whatever dies and when, what `checkpoints` finds is complete.
    """
    path = Path(folder) / f"step-{step:09d}"
    temporary, replaced = path.with_suffix(".tmp"), path.with_suffix(".old")
    written = io.BytesIO()
    torch.save(extra, written)
    torch.load(io.BytesIO(written.getvalue()), weights_only=True)  # what could not be read is an error now, everywhere
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
        temporary.mkdir(parents=True)
        (temporary / "extra.pt").write_bytes(written.getvalue())
    dist.barrier()
    dcp.save(collect_state(model, optimizer), checkpoint_id=temporary)
    if first:
        if path.exists():  # the same step saved twice: the earlier one counts until the new one has its name
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in {*list_checkpoints(folder)[:-keep]} - {path}:
            shutil.rmtree(old)
    dist.barrier()
    return path


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """Read the newest into a model and optimizer of whatever layout, on any number of ranks; returns `extra`."""
    found = list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint, no folder step-N")
    extra = torch.load(found[-1] / "extra.pt", map_location="cpu", weights_only=True)
    state, reader = collect_state(model, optimizer), CheckedReader(found[-1])
    reader.read_metadata()  # `load` of torch 2.10 keeps to itself what this raises
    dcp.load(state, storage_reader=reader, planner=CheckedPlanner())
    states.set_model_state_dict(model, state["model"])
    states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=BY_PARAMETER)
    return extra


class CheckedReader(dcp.FileSystemReader):
    """Looks at a checkpoint before anything of it is taken: torch unpickles `.metadata`, whatever that may call."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        path = Path(self.path)
        try:
            places = MetadataUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load().storage_data.values()
            for place in places:
                size, needed = (path / place.relative_path).stat().st_size, place.offset + place.length
                if size < needed:
                    raise ValueError(f"{place.relative_path} has {size} bytes, and {needed} were written")
        except Exception as error:
            raise ValueError(f"{path} is damaged, or is no checkpoint ({error}): load one before it") from error
        return super().read_metadata(*args, **kwargs)


class MetadataUnpickler(pickle.Unpickler):
    """Makes what metadata consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        of_checkpoints = module.startswith("torch.distributed.checkpoint.") and name in METADATA
        of_torch = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if of_checkpoints or of_torch or (module, name) in OTHER_ALLOWED_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}")


METADATA = {"Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"}
METADATA |= {"BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING", "_StorageInfo"}
OTHER_ALLOWED_GLOBALS = {("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")}
OTHER_ALLOWED_GLOBALS |= {("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath")}  # as Python 3.13 has them


class CheckedPlanner(dcp.DefaultLoadPlanner):
    """Numbers that are no tensors are read as weights are: torch would unpickle them."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; one that was being replaced stands before the new one."""
    found = [(path, re.fullmatch(r"step-(\d+)(\.old)?", path.name)) for path in Path(folder).glob("step-*")]
    complete = [(int(match[1]), match[2] is None, path) for path, match in found if match]
    return [path for *_, path in sorted(complete)]


def collect_state(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """All that changes in training, each rank's part of it."""
    of_optimizer = states.get_optimizer_state_dict(model, optimizer, options=BY_PARAMETER)
    return {"model": states.get_model_state_dict(model), "optimizer": of_optimizer}
