"""Changes saved models file by file, with at most one layer and one shard in memory.

A folder is written under a temporary name in the parent folder of its target, and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from mixture_of_experts.huggingface.blocks.model_conversion import find_sparse_blocks, replace_blocks
from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.private_transformers import (
    convert_to_saved,
    find_unexpected_names,
    load_partial_weights,
    make_shape_error,
)
from mixture_of_experts.huggingface.replacement.replace import find_networks, upcycle
from mixture_of_experts.huggingface.router_config import override_router_coef
from mixture_of_experts.huggingface.saving.configuration import MODEL_TYPE, read_layer_entries, read_quantization
from mixture_of_experts.huggingface.saving.engine_folders import complete_folder
from mixture_of_experts.huggingface.saving.exporting import plan_export
from mixture_of_experts.huggingface.saving.loader import find_saved_class
from mixture_of_experts.huggingface.saving.restore import insert_experts
from mixture_of_experts.huggingface.saving.shards import (
    INDEX_FILE,
    check_all_used,
    check_float,
    make_missing_error,
    read_weights,
)
from mixture_of_experts.huggingface.saving.weight_names import map_to_file_names, own_names
from mixture_of_experts.ops.int4 import PORTABLE_BLOCK
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


def upcycle_folder(source: Path, target: Path, *, max_shard_size: int = 5 * 10**9, **settings: Any) -> None:
    """Upcycle a saved dense model and write the folder that `save_pretrained` would write.

    Args:
        source: a folder with `config.json` and safetensors.
        target: a new folder.
        max_shard_size: maximum size of a weight file, in bytes.
        settings: arguments of `upcycle`.

    Raises:
        ValueError, TypeError: as in `upcycle`; or the model has experts already, or its weights and those of the
            files differ in names or shapes.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
        OSError: a file cannot be written, as on a full disk.
    """
    config = read_config(source)
    if read_layer_entries(config):
        raise ValueError(f"{source} has experts already")
    model = read_model(source, config)
    state, locations = model.state_dict(), find_networks(model, settings.pop("layers", None), settings.get("adapters"))

    def change(path: str) -> dict[str, Tensor]:
        upcycle(model, layers=[path], **settings)
        return model.get_submodule(path).state_dict(prefix=f"{path}.")

    rewrite_folder(model, state, [location.moe_path for location in locations], change, source, target, max_shard_size)


def export_folder(source: Path, target: Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Export a saved model with experts; weights get the names used in the exported class's own checkpoints.

    Args:
        source: a folder that `save_pretrained` or `upcycle_folder` wrote.
        target: a new folder.
        max_shard_size: maximum size of a weight file, in bytes.

    Raises:
        ValueError: as in `export`; or the model's weights and those of the files differ in names or shapes.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
        OSError: a file cannot be written, as on a full disk.
    """
    model = read_experts_model(source, "export")
    plan = plan_export(model)
    stock, rest = plan.stock_model, plan.convert_rest(model.state_dict())

    def finish(folder: Path) -> None:
        complete_folder(folder, stock.config.attribute_map)

    rewrite_folder(stock, rest, plan.layers, plan.convert_layer, source, target, max_shard_size, finish)


def quantize_folder(
    source: Path, target: Path, *, max_shard_size: int = 10**9, loss_coef: float | None = None, **settings: Any
) -> None:
    """Quantize the experts of a saved model and write the folder that `save_pretrained` would write.

    Two or three copies of a layer and two copies of an output file are in memory at a time. Nibbles are stored in the
    plain layout of `ops/int4.py`, independent of the machine that writes them.

    Args:
        source: a folder that `save_pretrained` or another command wrote; or a folder of a stock model, whose sparse
            blocks are converted to layers as by `from_transformers`.
        target: a new folder.
        max_shard_size: maximum size of a weight file, in bytes.
        loss_coef: coefficient of each layer's balancing loss. Default: the one saved in the folder, or as in
            `from_transformers` for a stock model.
        settings: arguments of `quantize_experts`.

    Raises:
        ValueError, TypeError: as in `quantize_experts` and `from_transformers`; or the model is already quantized, or
            its weights and those of the files differ in names or shapes.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
        OSError: a file cannot be written, as on a full disk.
    """
    config = read_config(source)
    stock = not read_layer_entries(config)
    if stock:
        model, weights = make_empty_model(config), read_weights(source)
        paths = find_sparse_blocks(model)
        blocks, state = tuple(f"{path}." for path in paths), model.state_dict(keep_vars=True)
        check_all_used(source, find_unexpected_names(model, weights.keys() - map_to_file_names(model, state)))
        load_weights(model, {name: state[name] for name in state if not name.startswith(blocks)}, weights)
    else:
        model, weights = read_model(source, config), {}
        paths = list(find_layers(model))
    state = model.state_dict()

    def change(path: str) -> dict[str, Tensor]:
        if stock:
            load_weights(model, model.get_submodule(path).state_dict(prefix=f"{path}.", keep_vars=True), weights)
            replace_blocks(model, {path: {"balance_over": "batch", "loss_coef": loss_coef}})
        layer = model.get_submodule(path)
        if loss_coef is not None:
            layer.moe.loss_coef = loss_coef
            override_router_coef(model)
        quantize_experts(layer.requires_grad_(False), **settings)
        for module in layer.modules():
            if isinstance(module, QuantizedExperts):
                module.repack(PORTABLE_BLOCK)
        return layer.state_dict(prefix=f"{path}.")

    rewrite_folder(model, state, paths, change, source, target, max_shard_size)


def load_weights(stock: Any, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Load weights of a stock model in the dtypes of their files."""
    found = {}
    for name, tensor in tensors.items():
        stored = {file: weights[file] for file in map_to_file_names(stock, {name: tensor}) if file in weights}
        for file, value in stored.items():
            if tensor.is_floating_point():
                check_float(file, value)
            tensor.data = tensor.data.to(value.dtype)
        if not stored and name not in stock.all_tied_weights_keys:
            raise make_missing_error(name)
        found |= stored
    load_partial_weights(stock, found)


def rewrite_folder(
    model: Any,
    state: Mapping[str, Tensor],
    paths: Collection[str],
    change: Callable[[str], dict[str, Tensor]],
    source: Path,
    target: Path,
    max_shard_size: int,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder next to the target and rename it to the target at the end; it is removed after an error.

    It contains the layers at `paths` as returned by `change`, all other weights of the changed model as they are in
    `state`, and copies of the source's other files (tokenizer etc.). `finish` may change the folder before it is
    renamed. A process that is ended by SIGKILL leaves `.NAME.xxxx.unfinished` behind, without a `config.json`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: give another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    place: Any = dict(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent)
    with tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as name:
        folder, changed = Path(name), tuple(f"{path}." for path in paths)
        shards = ShardWriter(folder, max_shard_size, target)
        for path in tqdm(paths, desc="layers", unit="layer"):
            shards.add_weights(convert_to_saved(model, change(path)))
            model.get_submodule(path).to("meta")
        kept = [name for name in model.state_dict() if not name.startswith(changed)]
        tied = model.all_tied_weights_keys
        shards.add_weights(convert_to_saved(model, {name: state[name] for name in kept if name not in tied}))
        shards.close()
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and file.name != "config.json":
                with naming_unwritable_file(target / file.name):
                    shutil.copy2(file, folder / file.name)
        model.config.architectures = [type(model).__name__]
        with naming_unwritable_file(target / "config.json"):
            model.config.save_pretrained(folder)
            if finish is not None:
                finish(folder)
        folder.chmod(0o755)  # temporary folders are private to their owner
        folder.rename(target)


@contextmanager
def naming_unwritable_file(path: Path) -> Iterator[None]:
    """Make the error of a write, such as that of a full disk, name the file of the target and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has no OSError
        raise OSError(
            f"cannot write {path} ({error}): free disk space, or choose a target on another disk; nothing is left of "
            "this one"
        ) from error


def read_experts_model(source: Path, action: str) -> Any:
    """The model with experts in a folder, as returned by `read_model`."""
    config = read_config(source)
    if not read_layer_entries(config):
        raise ValueError(
            f"{source} has no experts of this package: there is nothing to {action}. A stock model gets them by "
            "from_transformers or upcycle"
        )
    return read_model(source, config)


def read_model(source: Path, config: Any) -> Any:
    """The model in a folder, in the dtypes of its files. Its weights are views of the files, of which only used parts
    are read."""
    weights = read_weights(source)
    settings: Any = dict(config=config, state_dict=dict(weights), dtype="auto", output_loading_info=True)
    try:
        model, info = find_saved_class(config).from_pretrained(None, **settings)
    except RuntimeError as error:
        raise find_wrong_shape(config, weights) or ValueError(
            f"the weights of {source} do not fit its config.json: fetch both again, or correct config.json ({error})"
        ) from error
    check_all_used(source, info["unexpected_keys"])
    for name in sorted({*info["missing_keys"]}.difference(model.all_tied_weights_keys)):
        raise make_missing_error(name)
    state = model.state_dict(keep_vars=True)
    for name, tensor in own_names(model, state).items():
        if name in weights and tensor.is_floating_point():
            check_float(name, weights[name])
    for name, tensor in state.items():
        if name in weights and weights[name].dtype != tensor.dtype:  # transformers uses a single dtype for all
            tensor.data = weights[name]
    return model


def find_wrong_shape(config: Any, weights: Mapping[str, Tensor]) -> ValueError | None:
    """The error for a weight that has another shape in the files than in the model: that of transformers names none."""
    model = make_empty_model(config)
    if entries := read_layer_entries(config):
        insert_experts(model, entries)
    for name, value in own_names(model, model.state_dict()).items():
        if name in weights and weights[name].shape != value.shape:
            return make_shape_error(name, weights[name].shape, value.shape)
    return None


def read_config(source: Path) -> Any:
    """The configuration in a folder, whose model must not be quantized by another library. The hub is not accessed, and
    no code in the folder runs."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder, and nothing is downloaded: fetch the model into one first")
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    method = read_quantization(config).get("quant_method", MODEL_TYPE)
    if method != MODEL_TYPE:
        raise ValueError(f"{source} is quantised already ({method}): give the folder of the model before that")
    return config


def make_empty_model(config: Any) -> Any:
    """The model that was saved, on the meta device."""
    with torch.device("meta"):
        model: Any = find_saved_class(config)(config)
    return model.to(config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32).eval()


class ShardWriter:
    """Writes weights to files, each as soon as it is full. Errors name the target, which the folder is renamed to."""

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

    def write_shard(self) -> None:
        file = f"part-{len(self.shard_names)}.safetensors"
        with naming_unwritable_file(self.target / file):
            save_file(self.pending, self.folder / file, metadata={"format": "pt"})
        self.shard_names.append(list(self.pending))
        self.total_size += sum(value.nbytes for value in self.pending.values())
        self.pending = {}

    def close(self) -> None:
        """Write the last file, and rename all files with their final numbers."""
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
