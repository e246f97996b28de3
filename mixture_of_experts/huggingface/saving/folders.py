"""Changes saved models file by file, with at most one layer and one shard in memory.

A folder is written under another name beside its target, and renamed when it is finished.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from mixture_of_experts.huggingface.blocks.sparse import find_blocks, put_layers
from mixture_of_experts.huggingface.feed_forward import layers_by_path
from mixture_of_experts.huggingface.private_transformers import as_saved, load_some
from mixture_of_experts.huggingface.replacement.replace import find, upcycle
from mixture_of_experts.huggingface.router_config import take_over
from mixture_of_experts.huggingface.saving.configuration import NAME, layers_with_experts, quantization_of
from mixture_of_experts.huggingface.saving.export import plan_export
from mixture_of_experts.huggingface.saving.loader import saved_class
from mixture_of_experts.huggingface.saving.names import in_files
from mixture_of_experts.huggingface.saving.shards import INDEX, lacks, read_weights
from mixture_of_experts.ops.bits4 import PLAIN
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


def upcycle_folder(source: Path, target: Path, *, max_shard_size: int = 5 * 10**9, **settings: Any) -> None:
    """Upcycle a saved dense model; write the folder that `save_pretrained` would write.

    Args:
        source: a folder with `config.json` and safetensors.
        target: a new folder.
        max_shard_size: most bytes of a file of weights.
        settings: arguments of `upcycle`.

    Raises:
        ValueError, TypeError: as in `upcycle`; or the model has experts already, or the files lack some of its weights.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
    """
    config = read_config(source)
    if layers_with_experts(config):
        raise ValueError(f"{source} has experts already")
    model = read_model(source, config)
    state, places = model.state_dict(), find(model, settings.pop("layers", None), settings.get("adapters"))

    def change(path: str) -> dict[str, Tensor]:
        upcycle(model, layers=[path], **settings)
        return model.get_submodule(path).state_dict(prefix=f"{path}.")

    rewrite(model, state, [place.target for place in places], change, source, target, max_shard_size)


def export_folder(source: Path, target: Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Export a saved model with experts; weights get the names of the exported class's own checkpoints.

    Args:
        source: a folder that `save_pretrained` or `upcycle_folder` wrote.
        target: a new folder.
        max_shard_size: most bytes of a file of weights.

    Raises:
        ValueError: as in `export`; or the files lack some of the model's weights.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
    """
    model = read_experts(source, "export")
    plan = plan_export(model)
    rewrite(plan.stock, model.state_dict(), plan.layers, plan.block, source, target, max_shard_size)


def quantize_folder(
    source: Path, target: Path, *, max_shard_size: int = 10**9, loss_coef: float | None = None, **settings: Any
) -> None:
    """Quantise the experts of a saved model; write the folder that `save_pretrained` would write.

    A layer is in memory two or three times, and a file of the new folder twice. Nibbles are plain, as
    `ops/bits4.py` says, whatever machine writes them.

    Args:
        source: a folder that `save_pretrained` or another command wrote; or one of a stock model, whose sparse blocks
            become layers as by `from_transformers`.
        target: a new folder.
        max_shard_size: most bytes of a file of weights.
        loss_coef: coefficient of each layer's balancing loss; by default that of the folder, and for a stock model as
            in `from_transformers`.
        settings: arguments of `quantize_experts`.

    Raises:
        ValueError, TypeError: as in `quantize_experts` and `from_transformers`; or the model is quantised already, or
            the files lack some of its weights.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
    """
    config = read_config(source)
    stock = not layers_with_experts(config)
    if stock:
        model, weights = empty_model(config), read_weights(source)
        paths = find_blocks(model)
        blocks, state = tuple(f"{path}." for path in paths), model.state_dict(keep_vars=True)
        load(model, {name: state[name] for name in state if not name.startswith(blocks)}, weights)
    else:
        model, weights = read_model(source, config), {}
        paths = list(layers_by_path(model))
    state = model.state_dict()

    def change(path: str) -> dict[str, Tensor]:
        if stock:
            load(model, model.get_submodule(path).state_dict(prefix=f"{path}.", keep_vars=True), weights)
            put_layers(model, {path: {"balance_over": "batch", "loss_coef": loss_coef}})
        layer = model.get_submodule(path)
        if loss_coef is not None:
            layer.moe.loss_coef = loss_coef
            take_over(model)
        quantize_experts(layer.requires_grad_(False), **settings)
        for module in layer.modules():
            if isinstance(module, QuantizedExperts):
                module.rearrange(PLAIN)
        return layer.state_dict(prefix=f"{path}.")

    rewrite(model, state, paths, change, source, target, max_shard_size)


def load(stock: Any, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Load weights of a stock model, in the dtypes of their files."""
    found = {}
    for name, tensor in own.items():
        stored = {file: weights[file] for file in in_files(stock, {name: tensor}) if file in weights}
        for value in stored.values():
            tensor.data = tensor.data.to(value.dtype)
        if not stored and name not in stock.all_tied_weights_keys:
            raise lacks(name)
        found |= stored
    load_some(stock, found)


def rewrite(
    model: Any,
    state: Mapping[str, Tensor],
    paths: Collection[str],
    change: Callable[[str], dict[str, Tensor]],
    source: Path,
    target: Path,
    max_shard_size: int,
) -> None:
    """Write a folder beside the target, which is renamed to it at the end; after an error it is removed.

    It has the layers at some paths as `change` returns them; all other weights of the changed model as they are in
    `state`; and copies of the source's other files: tokenizer and so on. A killed process leaves
    `.NAME.xxxx.unfinished`, without a `config.json`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: give another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    place: Any = dict(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent)
    with tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as name:
        folder, changed = Path(name), tuple(f"{path}." for path in paths)
        shards = Shards(folder, max_shard_size)
        for path in tqdm(paths, desc="layers", unit="layer"):
            shards.add(as_saved(model, change(path)))
            model.get_submodule(path).to("meta")
        kept = [name for name in model.state_dict() if not name.startswith(changed)]
        tied = model.all_tied_weights_keys
        shards.add(as_saved(model, {name: state[name] for name in kept if name not in tied}))
        shards.close()
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS) and file.name != "config.json":
                shutil.copy2(file, folder / file.name)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        folder.chmod(0o755)  # it is made for its owner alone
        folder.rename(target)


def read_experts(source: Path, verb: str) -> Any:
    """The model with experts of a folder, as `read_model` returns it."""
    config = read_config(source)
    if not layers_with_experts(config):
        raise ValueError(
            f"{source} has no experts of this package: there is nothing to {verb}. A stock model gets them by "
            "from_transformers or upcycle"
        )
    return read_model(source, config)


def read_model(source: Path, config: Any) -> Any:
    """The model of a folder, in the dtypes of its files. Its weights are parts of them, of which only what is used is
    read."""
    weights = read_weights(source)
    settings: Any = dict(config=config, state_dict=dict(weights), dtype="auto", output_loading_info=True)
    model, info = saved_class(config).from_pretrained(None, **settings)
    for name in sorted({*info["missing_keys"]}.difference(model.all_tied_weights_keys)):
        raise lacks(name)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights and weights[name].dtype != tensor.dtype:  # transformers gives all of them one
            tensor.data = weights[name]
    return model


def read_config(source: Path) -> Any:
    """The configuration of a folder whose model is not quantised otherwise; no name on the hub is looked up, and no
    code of the folder runs."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder, and nothing is downloaded: fetch the model into one first")
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    method = quantization_of(config).get("quant_method", NAME)
    if method != NAME:
        raise ValueError(f"{source} is quantised already ({method}): give the folder of the model before that")
    return config


def empty_model(config: Any) -> Any:
    """The model that was saved, without memory for its weights."""
    with torch.device("meta"):
        model: Any = saved_class(config)(config)
    return model.to(config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32).eval()


class Shards:
    """Writes files of weights, each as soon as it is full."""

    folder: Path
    max_size: int

    def __init__(self, folder: Path, max_size: int) -> None:
        self.folder, self.max_size = folder, max_size
        self.waiting: dict[str, Tensor] = {}
        self.files: list[list[str]] = []  # the names of their weights
        self.total_size: int = 0  # in bytes

    def add(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            waits = sum(waiting.nbytes for waiting in self.waiting.values())
            if self.waiting and waits + value.nbytes > self.max_size:
                self.write()
            self.waiting[name] = value.detach().contiguous()

    def write(self) -> None:
        save_file(self.waiting, self.folder / f"part-{len(self.files)}.safetensors", metadata={"format": "pt"})
        self.files.append(list(self.waiting))
        self.total_size += sum(value.nbytes for value in self.waiting.values())
        self.waiting = {}

    def close(self) -> None:
        """Write the last file, and name all files by their number."""
        self.write()
        n, weight_map = len(self.files), {}
        for i, names in enumerate(self.files):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"
            (self.folder / f"part-{i}.safetensors").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if n > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
