"""Changes saved models file by file, with at most one layer and one shard in memory.

A folder is written under another name beside its target, and renamed when it is finished.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from mixture_of_experts.huggingface.blocks.convert import to_layer
from mixture_of_experts.huggingface.blocks.sparse import from_transformers
from mixture_of_experts.huggingface.feed_forward import layers_by_path
from mixture_of_experts.huggingface.private_transformers import as_saved, load_some
from mixture_of_experts.huggingface.replacement.replace import find, upcycle
from mixture_of_experts.huggingface.saving.configuration import NAME, layers_with_experts, quantization_of
from mixture_of_experts.huggingface.saving.export import plan_export
from mixture_of_experts.huggingface.saving.loader import saved_class
from mixture_of_experts.huggingface.saving.names import in_files
from mixture_of_experts.huggingface.saving.restore import put_experts
from mixture_of_experts.ops.bits4 import PLAIN
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts

INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


def upcycle_folder(
    source: Path, target: Path, *, max_shard_size: int = 5 * 10**9, dtype: torch.dtype | None = None, **settings: Any
) -> None:
    """Upcycle a saved dense model; write the folder that `save_pretrained` would write.

    Args:
        source: a folder with `config.json` and safetensors.
        target: a new folder.
        max_shard_size: most bytes of a file of weights.
        dtype: of the weights that are written; by default they keep theirs.
        settings: arguments of `upcycle`, without `models`.

    Raises:
        ValueError, TypeError: as in `upcycle`; or the model has experts already, or the files lack some of its weights.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
    """
    with finished(target, max_shard_size) as writer:
        config = read_config(source)
        if layers_with_experts(config):
            raise ValueError(f"{source} has experts already")
        config.dtype = dtype or config.dtype
        model = empty_model(config)
        weights = WeightFiles(source, model)
        weights.fill(model)
        places = find(model, settings.pop("layers", None), settings.get("adapters"))
        around = {place.target: place.name for place in places}

        def change(path: str) -> dict[str, Tensor]:
            upcycle(model, layers=[path], **settings)
            state = model.get_submodule(path).to(dtype=dtype).state_dict(prefix=f"{path}.")
            model.get_submodule(around[path]).to("meta")
            return state

        rewrite(model, weights, around, change, writer, dtype)


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
    with finished(target, max_shard_size) as writer:
        model, weights = empty_with_experts(source, "export")
        plan = plan_export(model)
        weights.fill(model)

        def change(path: str) -> dict[str, Tensor]:
            state = plan.block(path)
            for module in (plan.layers[path], plan.stock.get_submodule(path)):
                module.to("meta")
            return state

        rewrite(plan.stock, weights, plan.layers, change, writer)


def quantize_folder(source: Path, target: Path, *, max_shard_size: int = 10**9, **settings: Any) -> None:
    """Quantise the experts of a saved model; write the folder that `save_pretrained` would write.

    A layer is in memory two or three times, and a file of the new folder twice. Nibbles are plain, as
    `ops/bits4.py` says, whatever machine writes them.

    Args:
        source: a folder that `save_pretrained` or another command wrote; or one of a stock model, whose sparse blocks
            become layers as by `from_transformers`.
        target: a new folder.
        max_shard_size: most bytes of a file of weights.
        settings: arguments of `quantize_experts`.

    Raises:
        ValueError, TypeError: as in `quantize_experts` and `from_transformers`; or the model is quantised already, or
            the files lack some of its weights.
        FileNotFoundError: the source is no folder.
        FileExistsError: the target exists.
    """
    with finished(target, max_shard_size) as writer:
        config = read_config(source)
        method = quantization_of(config).get("quant_method", NAME)
        if method != NAME:
            raise ValueError(f"{source} is quantised already ({method}): give the folder of the model before that")
        if layers_with_experts(config):
            stock, (model, weights) = None, empty_with_experts(source, "quantize")
            weights.fill(model)
        else:
            stock, model = empty_model(config), from_transformers(empty_model(config))
            weights = WeightFiles(source, stock)
        layers = layers_by_path(model)

        def change(path: str) -> dict[str, Tensor]:
            layer = layers[path]
            if stock is not None:
                fill_by_block(layer, path, stock, weights)
            quantize_experts(layer.requires_grad_(False), **settings)
            for module in layer.modules():
                if isinstance(module, QuantizedExperts):
                    module.rearrange(PLAIN)
            state = layer.state_dict(prefix=f"{path}.")
            layer.to("meta")
            return state

        rewrite(model, weights, layers, change, writer)


def fill_by_block(layer: Any, path: str, stock: Any, weights: WeightFiles) -> None:
    """Fill a layer from the files of the block that it stands for."""
    block = stock.get_submodule(path)
    own = block.state_dict(prefix=f"{path}.", keep_vars=True)
    for name, tensor in own.items():  # which is loaded in the dtype of its file
        tensor.data = tensor.data.to(weights[weights.names[name][0]].dtype)
    load_some(stock, {stored: weights[stored] for name in own for stored in weights.names[name]})
    layer.moe.load_state_dict(to_layer(block, "batch").state_dict(), assign=True)
    block.to("meta")
    for name, rest in layer.named_buffers():
        if rest.is_meta:  # of `Replaced`
            layer.get_submodule(name.rpartition(".")[0]).weight = torch.zeros_like(rest, device="cpu")


def rewrite(
    model: Any,
    weights: WeightFiles,
    paths: Collection[str],
    change: Callable[[str], dict[str, Tensor]],
    writer: Shards,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder: the layers at some paths as `change` returns them, by the names in the changed model; all other
    weights as they are, or in `dtype`."""
    for path in tqdm(paths, desc="layers", unit="layer"):
        for key, value in as_saved(model, change(path)).items():
            writer.add(weights.without_head(key, model), value)
    changed = tuple(f"{path}." for path in paths)
    kept = {name for name in model.state_dict() if not name.startswith(changed)}
    gone = {stored for name, all_stored in weights.names.items() if name not in kept for stored in all_stored}
    for stored in tqdm([stored for stored in weights.files if stored not in gone], desc="others", unit="weight"):
        value = weights[stored]
        writer.add(stored, value.to(dtype) if value.is_floating_point() else value)
    finish(model, writer, weights.folder)


def empty_with_experts(source: Path, verb: str) -> tuple[Any, WeightFiles]:
    """The model with experts of a folder, without memory for its weights, and its files, which have them all."""
    config = read_config(source)
    layers = layers_with_experts(config)
    if not layers:
        raise ValueError(
            f"{source} has no experts of this package: there is nothing to {verb}. A stock model gets them by "
            "from_transformers or upcycle"
        )
    vars(config).pop("quantization_config", None)
    model = empty_model(config)
    put_experts(model, layers)
    return model, WeightFiles(source, model)


@contextmanager
def finished(target: Path, max_shard_size: int) -> Iterator[Shards]:
    """Writes a new folder beside the target, which is renamed to it at the end; after an error it is removed.

    A killed process leaves `.NAME.xxxx.unfinished`, without a `config.json`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: give another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
    try:
        yield Shards(folder, max_shard_size)
        folder.chmod(0o755)  # mkdtemp makes it for its owner alone
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def read_config(source: Path) -> Any:
    """The configuration of a folder; no name on the hub is looked up."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder, and nothing is downloaded: fetch the model into one first")
    return AutoConfig.from_pretrained(source, local_files_only=True)


def empty_model(config: Any) -> Any:
    """The model that was saved, without memory for its weights."""
    if not config.architectures:
        raise ValueError(
            'config.json does not name the class of the model: write it there, such as "architectures": '
            '["LlamaForCausalLM"]'
        )
    with torch.device("meta"):
        model: Any = saved_class(config)(config)
    return model.to(config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32).eval()


def finish(model: Any, writer: Shards, source: Path) -> None:
    """Write the model's configuration, and copies of the other files: tokenizer and so on."""
    writer.close()
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name != "config.json":
            shutil.copy2(file, writer.folder / file.name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(writer.folder)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn any error into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is missing, damaged or no such file ({problem}): fetch or save it again") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    with readable(path), safe_open(path, "pt") as file:
        yield file


def check_weight_map(files: Any) -> dict[str, str]:
    """The names of files by names of weights, which must lie in the folder."""
    for file in files.values():
        if os.path.isabs(file) or ".." in re.split(r"[/\\]", file):
            raise ValueError(f"{file!r} of its weight_map is outside of the folder")
    return files


class WeightFiles:
    """The weights of a folder by name. They are parts of the files, of which only what is used is read.

    Args:
        model: an empty model. Its weights have other names in the files of some classes, which `names` tells.

    Raises:
        ValueError: a weight of the model is in none of the files, and tied to none that is.
    """

    files: dict[str, str]  # the names of files, by names of weights

    def __init__(self, folder: Path, model: Any) -> None:
        index, single = folder / INDEX, folder / "model.safetensors"
        if index.exists():
            with readable(index):
                files = check_weight_map(json.loads(index.read_text())["weight_map"])
        elif single.exists():
            with opened(single) as file:
                files = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}: save the model with safetensors")
        self.folder = folder
        self.files = dict(sorted(files.items(), key=lambda item: item[1]))

        self.names: dict[str, list[str]] = {}
        for name in sorted(model.state_dict().keys() - set(model.all_tied_weights_keys)):
            stored = in_files(model, {name: model.get_parameter_or_buffer(name)})
            self.names[name] = [name for name in stored if name in self.files]
            if not self.names[name]:
                raise ValueError(
                    f"{folder} has no {name}: load the model by transformers and save it, which renames weights"
                )

    def __getitem__(self, name: str) -> Tensor:
        with opened(self.folder / self.files[name]) as file:
            return file.get_tensor(name)

    def fill(self, model: Any) -> None:
        """Give an empty model its weights."""
        model.load_state_dict({name: self[stored[0]] for name, stored in self.names.items()}, strict=False, assign=True)

    def without_head(self, name: str, model: Any) -> str:
        """The name without its first word, if the files are of a model without a head; else the name itself."""
        prefix = f"{model.base_model_prefix}."
        return name if any(n.startswith(prefix) for n in self.files) else name.removeprefix(prefix)


class Shards:
    """Writes files of weights, each as soon as it is full."""

    size: int
    total: int

    def __init__(self, folder: Path, max_size: int) -> None:
        self.folder = folder
        self.max_size = max_size
        self.waiting: dict[str, Tensor] = {}
        self.size = self.total = 0
        self.files: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        if self.waiting and self.size + value.nbytes > self.max_size:
            self.write()
        self.waiting[name] = value.detach().contiguous()
        self.size += value.nbytes
        self.total += value.nbytes

    def write(self) -> None:
        save_file(self.waiting, self.part(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.waiting))
        self.waiting, self.size = {}, 0

    def part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"

    def close(self) -> None:
        """Write the last file, and name all files by their number."""
        self.write()
        n, names = len(self.files), {}
        if n == 1:
            self.part(0).rename(self.folder / "model.safetensors")
            return
        for i, held in enumerate(self.files):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
            self.part(i).rename(self.folder / file)
            names |= dict.fromkeys(held, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": names}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
