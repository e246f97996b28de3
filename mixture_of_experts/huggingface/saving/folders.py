"""Converts saved models layer by layer, keeping only a few copies of one layer and one output file in memory.

Each folder is written under a temporary name next to its target, and is renamed when it is complete.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from mixture_of_experts.huggingface.blocks.model_conversion import plan_stock_export
from mixture_of_experts.huggingface.feed_forward import SparseFeedForward, find_layers
from mixture_of_experts.huggingface.private_transformers import convert_to_saved, make_shape_error
from mixture_of_experts.huggingface.replacement.replace import find_networks, upcycle
from mixture_of_experts.huggingface.saving.configuration import MODEL_TYPE, read_layer_entries, read_quantization
from mixture_of_experts.huggingface.saving.engine_folders import CHAT_TEMPLATES_FOLDER, complete_folder
from mixture_of_experts.huggingface.saving.exporting import plan_export, untie_weights
from mixture_of_experts.huggingface.saving.loader import find_saved_class
from mixture_of_experts.huggingface.saving.restore import insert_experts
from mixture_of_experts.huggingface.saving.shards import (
    INDEX_FILE,
    check_all_used,
    check_float,
    make_missing_error,
    read_weights,
)
from mixture_of_experts.huggingface.saving.weight_names import own_names

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")
ADAPTER_CONFIG_FILE = "adapter_config.json"
NOT_COPIED = ("config.json", ADAPTER_CONFIG_FILE)  # in addition to files of weights


def upcycle_folder(source: Path, target: Path, *, max_shard_size: int = 5 * 10**9, **settings: Any) -> None:
    """Upcycle a saved dense model. The new folder contains what `save_pretrained` would write for the upcycled model.

    Args:
        source: a folder with `config.json` and safetensors files.
        target: path of the new folder, which must not exist yet.
        max_shard_size: maximum size of a weight file, in bytes.
        settings: additional arguments, which are passed to `upcycle`.

    Raises:
        ValueError, TypeError: as in `upcycle`. Also raised if the model already has experts, or if the names or shapes
            of its weights do not match the files.
        FileNotFoundError: `source` is not a folder.
        FileExistsError: `target` already exists.
        OSError: a file cannot be written, for example because the disk is full.
    """
    config = read_config(source)
    if read_layer_entries(config):
        raise ValueError(f"{source} already has experts")
    model = read_model(source, config)
    state, locations = model.state_dict(), find_networks(model, settings.pop("layers", None), settings.get("adapters"))

    def change(path: str) -> dict[str, Tensor]:
        upcycle(model, layers=[path], **settings)
        return model.get_submodule(path).state_dict(prefix=f"{path}.")

    paths = [location.moe_path for location in locations]
    rewrite_folder(model, state.__getitem__, paths, change, source, target, max_shard_size)


def export_folder(source: Path, target: Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Export a saved MoE model as a stock model. The weights have the same names as in checkpoints of the stock class.

    A model that `from_transformers` converted is converted back, as in `to_transformers`.

    Args:
        source: a folder written by `save_pretrained` or another command.
        target: path of the new folder, which must not exist yet.
        max_shard_size: maximum size of a weight file, in bytes.

    Raises:
        ValueError: as in `export` and `to_transformers`. Also raised if the names or shapes of the model's weights do
            not match the files.
        FileNotFoundError: `source` is not a folder.
        FileExistsError: `target` already exists.
        OSError: a file cannot be written, for example because the disk is full.
    """
    model = read_experts_model(source, "export")
    blocks = any(isinstance(layer, SparseFeedForward) for layer in find_layers(model).values())
    plan = plan_stock_export(model) if blocks else plan_export(model)
    untie_weights(plan.stock_model, model)
    rest = plan.convert_rest(model.state_dict())
    stock, read = plan.stock_model, rest.__getitem__

    def finish(folder: Path) -> None:
        complete_folder(folder, stock.config)

    rewrite_folder(stock, read, plan.layers, plan.convert_layer, source, target, max_shard_size, finish)


def rewrite_folder(
    model: Any,
    read: Callable[[str], Tensor],
    paths: Collection[str],
    change: Callable[[str], dict[str, Tensor]],
    source: Path,
    target: Path,
    max_shard_size: int,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a new folder next to the target, and rename it to the target when it is complete. If an error occurs, the
    new folder is removed.

    The new folder contains the weights that `change` returns for the layers at `paths`, the model's other weights,
    which `read` returns, and copies of the source's other files, such as the tokenizer. `finish` may modify the folder
    before it is renamed. If the process is killed by SIGKILL, a folder named `.NAME.xxxx.unfinished` without
    `config.json` remains.
    """
    if target.exists() or target.is_symlink():  # `exists` is False for a link to a missing file
        raise FileExistsError(f"{target} already exists; choose another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    place: Any = dict(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent)
    with tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as name:
        folder, changed = Path(name), tuple(f"{path}." for path in paths)
        shards = ShardWriter(folder, max_shard_size, target)
        for path in tqdm(paths, desc="layers", unit="layer"):
            shards.add_layer(convert_to_saved(model, change(path)))
            model.get_submodule(path).to("meta")
        tied = model.all_tied_weights_keys
        kept = [name for name in model.state_dict() if not name.startswith(changed) and name not in tied]
        # convert one block at a time, because `read` may return copies
        for _, names in groupby(kept, key=find_block_prefix):
            shards.add_weights(convert_to_saved(model, {name: read(name) for name in names}))
        shards.close()
        for file in source.iterdir():
            with naming_unwritable_file(target / file.name):
                if file.name == CHAT_TEMPLATES_FOLDER:
                    shutil.copytree(file, folder / file.name)
                elif file.is_file() and file.name not in NOT_COPIED and not file.name.endswith(WEIGHT_SUFFIXES):
                    shutil.copy2(file, folder / file.name)
        model.config.architectures = [type(model).__name__]
        with naming_unwritable_file(target / "config.json"):
            model.config.save_pretrained(folder)
            if finish is not None:
                finish(folder)
        folder.chmod(0o755)  # temporary folders are accessible only to their owner
        folder.rename(target)


def find_block_prefix(name: str) -> str:
    """Return the prefix of a weight name up to and including the first number, which identifies the weight's block. If
    the name contains no number, return "". Blocks are saved independently of each other."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


@contextmanager
def naming_unwritable_file(path: Path) -> Iterator[None]:
    """Context manager that turns write errors, such as those caused by a full disk, into an OSError that names the
    target file and suggests a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # SafetensorError is not an OSError
        raise OSError(
            f"cannot write {path} ({error}); free up disk space, or choose a target on another disk. The unfinished "
            "target was removed"
        ) from error


def read_experts_model(source: Path, action: str, adapter: Path | None = None) -> Any:
    """Like `read_model`, but raise ValueError if the model in the folder has no experts. `adapter` is the folder of the
    adapters to merge into the model."""
    config = read_config(source, adapter)
    if not read_layer_entries(config):
        raise ValueError(
            f"{source} has no experts from this package, so there is nothing to {action}; add experts to a stock model "
            "with from_transformers or upcycle"
        )
    return read_model(source, config)


def read_model(source: Path, config: Any) -> Any:
    """Load and return the model in a folder. The weights keep their stored dtypes and 4-bit layout. All weights are
    memory-mapped, so only the parts that are used are read."""
    weights = read_weights(source)
    if read_layer_entries(config):
        config = copy.copy(config)
        config.quantization_config = {**read_quantization(config), "repack": False}
    settings: Any = dict(config=config, state_dict=dict(weights), dtype="auto", output_loading_info=True)
    try:
        model, info = find_saved_class(config).from_pretrained(None, **settings)
    except RuntimeError as error:
        raise find_wrong_shape(config, weights) or ValueError(
            f"the weights of {source} do not match its config.json; download both again, or correct config.json "
            f"({error})"
        ) from error
    check_all_used(source, info["unexpected_keys"])
    for name in sorted({*info["missing_keys"]}.difference(model.all_tied_weights_keys)):
        raise make_missing_error(name)
    state = model.state_dict(keep_vars=True)
    for name, tensor in own_names(model, state).items():
        if name in weights and tensor.is_floating_point():
            check_float(name, weights[name])
    for name, tensor in state.items():
        if name in weights and weights[name].dtype != tensor.dtype:  # transformers uses a single dtype for all weights
            tensor.data = weights[name]
    return model


def find_wrong_shape(config: Any, weights: Mapping[str, Tensor]) -> ValueError | None:
    """Return an error that names a weight whose shape in the files differs from its shape in the model, or None if all
    shapes match. The error that `transformers` raises does not name the weight."""
    model = make_empty_model(config)
    if entries := read_layer_entries(config):
        insert_experts(model, entries)
    for name, value in own_names(model, model.state_dict()).items():
        if name in weights and weights[name].shape != value.shape:
            return make_shape_error(name, weights[name].shape, value.shape)
    return None


def read_config(source: Path, adapter: Path | None = None) -> Any:
    """Return the configuration in a folder, without accessing the hub or running code from the folder. Raise ValueError
    if the model was quantized by another library, or if the folder contains adapters and is not `adapter`."""
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source} is not a folder, and models are not downloaded automatically; download the model first"
        )
    if (source / ADAPTER_CONFIG_FILE).exists() and not (adapter is not None and adapter.samefile(source)):
        raise ValueError(
            f"{source} also contains adapters ({ADAPTER_CONFIG_FILE}), which from_pretrained applies to the model; "
            "merge them first, or move the adapter files to another folder"
        )
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    method = read_quantization(config).get("quant_method", MODEL_TYPE)
    if method != MODEL_TYPE:
        raise ValueError(f"{source} is already quantized ({method}); pass the folder of the unquantized model")
    return config


def make_empty_model(config: Any) -> Any:
    """Build the saved model on the meta device."""
    with torch.device("meta"):
        model: Any = find_saved_class(config)(config)
    return model.to(config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32).eval()


class ShardWriter:
    """Writes weights to files, and starts a new file when the current file is full. Error messages refer to the target,
    because the folder is later renamed to it."""

    folder: Path
    max_size: int
    target: Path

    def __init__(self, folder: Path, max_size: int, target: Path) -> None:
        self.folder, self.max_size, self.target = folder, max_size, target
        self.pending: dict[str, Tensor] = {}
        self.shard_names: list[list[str]] = []  # names of the weights in each file
        self.total_size: int = 0  # in bytes

    def add_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            waits = sum(waiting.nbytes for waiting in self.pending.values())
            if self.pending and waits + value.nbytes > self.max_size:
                self.write_shard()
            self.pending[name] = value.detach().contiguous()

    def add_layer(self, weights: Mapping[str, Tensor]) -> None:
        """Add the weights of a layer. If the current file cannot hold another layer of this size, it is written
        immediately, so that these weights are freed before the next layer is converted."""
        self.add_weights(weights)
        size = sum(value.nbytes for value in weights.values())
        if size + sum(waiting.nbytes for waiting in self.pending.values()) > self.max_size:
            self.write_shard()

    def write_shard(self) -> None:
        file = f"part-{len(self.shard_names)}.safetensors"
        with naming_unwritable_file(self.target / file):
            save_file(self.pending, self.folder / file, metadata={"format": "pt"})
        self.shard_names.append(list(self.pending))
        self.total_size += sum(value.nbytes for value in self.pending.values())
        self.pending = {}

    def close(self) -> None:
        """Write the last file, and rename all files so that their names contain the total number of files."""
        if self.pending:
            self.write_shard()
        n, weight_map = len(self.shard_names), {}
        for i, names in enumerate(self.shard_names):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"
            (self.folder / f"part-{i}.safetensors").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if n > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            with naming_unwritable_file(self.target / INDEX_FILE):
                (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
