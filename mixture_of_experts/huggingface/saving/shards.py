"""Reads the weight files of a checkpoint and their index. All files must be in the folder and contain the weights that
the index lists."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ONE_FILE = "model.safetensors"
INDEX_FILE = f"{ONE_FILE}.index.json"


@contextmanager
def name_unreadable_file(path: Path) -> Iterator[None]:
    """Context manager that turns any error into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} is missing, damaged or invalid ({problem}); download it again, or save the model again"
        ) from error


def make_missing_error(name: str) -> ValueError:
    return ValueError(f"the files have no {name}; load the model with transformers and save it, which renames weights")


def check_float(name: str, stored: Tensor) -> None:
    """Raise ValueError if the tensor stored for a floating-point weight does not have a floating-point dtype."""
    if not stored.is_floating_point():
        raise ValueError(
            f"{name} is stored with dtype {stored.dtype}, but the model expects floating-point weights; convert the "
            "weight as its publisher describes, or save the model again"
        )


def check_all_used(folder: Path, unexpected: Collection[str]) -> None:
    """Raise ValueError if the files contain weights that do not exist in the model."""
    if names := sorted(unexpected):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"the files contain {names[0]}{more}, but the model described by {folder / 'config.json'} has no such "
            "weights; correct config.json, or load and save the model with transformers to drop them"
        )


def read_index(index: Path) -> dict[str, str]:
    """Return the `weight_map` of an index, which maps each weight name to a file. Raise ValueError if a file is outside
    of the index's folder."""
    with name_unreadable_file(index):
        weight_map: dict[str, str] = {**json.loads(index.read_text())["weight_map"]}
        for file in sorted({*weight_map.values()}):
            if PureWindowsPath(file).name != file:
                raise ValueError(f"the weight_map refers to {file!r}, which is outside the folder")
    return weight_map


def check_shard_names(file: Path, names: Collection[str], weight_map: Mapping[str, str]) -> None:
    """Raise ValueError if a file contains weights that are not in the index, or lacks weights that the index assigns to
    it."""
    if unknown := sorted(set(names) - weight_map.keys()):
        raise ValueError(
            f"{file} contains {unknown[0]}, which is not in its index; download both again, or save the model again"
        )
    if missing := sorted(name for name in weight_map if weight_map[name] == file.name and name not in names):
        raise make_missing_error(missing[0])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a folder, keyed by name. Each weight is read from the file to which the index assigns it.

    As in `transformers`, the index is ignored if the folder contains `model.safetensors`. The weights are views of
    memory-mapped files, so only the parts that are used are read.
    """
    index, weight_map, weights = folder / INDEX_FILE, None, {}
    if index.exists() and not (folder / ONE_FILE).exists():
        weight_map = read_index(index)
    for name in [ONE_FILE] if weight_map is None else sorted({*weight_map.values()}):
        with name_unreadable_file(folder / name):
            held = load_file(folder / name)
        if weight_map is not None:
            check_shard_names(folder / name, held, weight_map)
            held = {key: value for key, value in held.items() if weight_map[key] == name}
        weights |= held
    return weights


def check_shards(folder: str, files: Sequence[str]) -> None:
    """Check the weight files that `transformers` is about to read. The files are in a local folder or were downloaded
    from the hub.

    `transformers` does not check the file names in an index. If two files contain the same weight, `transformers` uses
    the weight from the last file, regardless of the index.

    Raises:
        ValueError: a file is outside of the folder, or the files do not match their index.
    """
    paths = [Path(file) for file in files]
    if Path(folder).is_dir():
        for path in paths:
            if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
                raise ValueError(f"the weight_map of {folder} refers to {path}, which is outside the folder")
    names = {path.name for path in paths}
    for index in sorted(paths[0].parent.glob("*.safetensors.index.json")) if paths else []:
        weight_map = read_index(index)
        if {*weight_map.values()} == names:  # transformers reads this index
            for path in paths:
                check_shard(path, weight_map)


def check_shard(path: Path, weight_map: Mapping[str, str]) -> None:
    """Raise ValueError if a file does not match its index. This function reads only the names of the weights."""
    with name_unreadable_file(path), safe_open(path, framework="pt") as file:
        names = list(file.keys())
    check_shard_names(path, names, weight_map)
    if strays := sorted(name for name in names if weight_map[name] != path.name):
        raise ValueError(
            f"{path} contains {strays[0]}, which its index assigns to {weight_map[strays[0]]}; download the files "
            "again, or save the model again"
        )
