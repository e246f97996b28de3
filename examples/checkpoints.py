"""Checkpoints of models that are sharded over ranks. They load on any number of ranks and survive a kill."""

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
# store hyperparameters for each parameter, because parameter groups may depend on the number of ranks
BY_PARAMETER = states.StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizers, *, step: int, extra: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint `folder/step-N`, and delete all others except the newest `keep`.

    All ranks must share the file system. Incomplete checkpoints have temporary names, which `list_checkpoints` ignores.
    """
    path = Path(folder) / f"step-{step:09d}"
    temporary, replaced = path.with_suffix(".tmp"), path.with_suffix(".old")
    written = io.BytesIO()
    torch.save(extra, written)
    torch.load(io.BytesIO(written.getvalue()), weights_only=True)  # fail now, on all ranks, if `extra` cannot be read
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a save that was killed
        temporary.mkdir(parents=True)
        (temporary / "extra.pt").write_bytes(written.getvalue())
    dist.barrier()
    dcp.save(collect_state(model, optimizer), checkpoint_id=temporary)
    if first:
        if path.exists():  # saved before: keep the old checkpoint until the new one is in place
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in {*list_checkpoints(folder)[:-keep]} - {path}:
            shutil.rmtree(old)
    dist.barrier()
    return path


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """Load the newest checkpoint into a model and optimizer of any layout, on any number of ranks. Returns `extra`."""
    found = list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint: it has no folder named step-N")
    extra = torch.load(found[-1] / "extra.pt", map_location="cpu", weights_only=True)
    state, reader = collect_state(model, optimizer), CheckedReader(found[-1])
    reader.read_metadata()  # `dcp.load` of torch 2.10 does not report these errors
    dcp.load(state, storage_reader=reader, planner=CheckedPlanner())
    states.set_model_state_dict(model, state["model"])
    states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=BY_PARAMETER)
    return extra


class CheckedReader(dcp.FileSystemReader):
    """Checks a checkpoint before torch unpickles its `.metadata`, which could otherwise run any code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        path = Path(self.path)
        try:
            places = MetadataUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load().storage_data.values()
            for place in places:
                size, needed = (path / place.relative_path).stat().st_size, place.offset + place.length
                if size < needed:
                    raise ValueError(f"{place.relative_path} has {size} bytes, but {needed} were written")
        except Exception as error:
            raise ValueError(f"{path} is damaged, or is no checkpoint ({error}): load an earlier one") from error
        return super().read_metadata(*args, **kwargs)


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles only the classes that checkpoint metadata contains."""

    def find_class(self, module: str, name: str) -> Any:
        of_checkpoints = module.startswith("torch.distributed.checkpoint.") and name in METADATA
        of_torch = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if of_checkpoints or of_torch or (module, name) in OTHER_ALLOWED_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata refers to {module}.{name}, which is not allowed")


METADATA = {"Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"}
METADATA |= {"BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING", "_StorageInfo"}
OTHER_ALLOWED_GLOBALS = {("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")}
OTHER_ALLOWED_GLOBALS |= {("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath")}  # in Python 3.13


class CheckedPlanner(dcp.DefaultLoadPlanner):
    """Loads entries that are not tensors with `weights_only=True`, because torch would unpickle them."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first. A replaced checkpoint precedes its replacement."""
    found = [(path, re.fullmatch(r"step-(\d+)(\.old)?", path.name)) for path in Path(folder).glob("step-*")]
    complete = [(int(match[1]), match[2] is None, path) for path, match in found if match]
    return [path for *_, path in sorted(complete)]


def collect_state(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """Return this rank's part of the state that training changes."""
    of_optimizer = states.get_optimizer_state_dict(model, optimizer, options=BY_PARAMETER)
    return {"model": states.get_model_state_dict(model), "optimizer": of_optimizer}
