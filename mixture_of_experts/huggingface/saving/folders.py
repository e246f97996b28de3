"""Changes saved models file by file, with at most one layer and one shard in memory.

A folder is written under another name beside its target, and renamed when it is finished.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig

from mixture_of_experts.huggingface.blocks.convert import to_layer
from mixture_of_experts.huggingface.blocks.sparse import from_transformers
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward
from mixture_of_experts.huggingface.private_transformers import as_saved, load_some
from mixture_of_experts.huggingface.replacement.replace import find, upcycle
from mixture_of_experts.huggingface.saving.configuration import NAME, layers_with_experts
from mixture_of_experts.huggingface.saving.export import below, plan_export
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
    with finished(target) as folder:
        config = read_config(source)
        if layers_with_experts(config):
            raise ValueError(f"{source} has experts already")
        config.dtype = config.dtype if dtype is None else dtype
        model, weights = empty_model(config), WeightFiles(source, dtype)
        weights.check_whole(model)
        places = find(model, settings.pop("layers", None), settings.get("adapters"))
        writer = Shards(folder, max_shard_size)
        written: set[str] = set()
        for place in tqdm(places, desc="layers", unit="layer"):
            name = place.target
            parts = [f"{place.name}.{path}" for path in place.adapter.linears()]
            inside = {n: p for n, p in model.named_parameters() if any(below(path, n) for path in parts)}
            read = {parameter: weights.named(parameter, model) for parameter in inside}
            for parameter, stored in read.items():
                parent, _, leaf = parameter.rpartition(".")
                value = nn.Parameter(weights[stored].clone(), requires_grad=inside[parameter].requires_grad)
                setattr(model.get_submodule(parent), leaf, value)
            upcycle(model, layers=[name], **settings)
            written.update(read.values())
            made = {key: value for key, value in model.state_dict().items() if below(name, key)}
            for key, value in as_saved(model, made).items():
                writer.add(weights.without_head(key, model), value)
            model.get_submodule(place.name).to("meta")
        finish(model, weights, written, writer, source)


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
    with finished(target) as folder:
        model, weights = empty_with_experts(source, "export")
        plan = plan_export(model)
        writer, written = Shards(folder, max_shard_size), set()
        for path, layer in tqdm(plan.layers.items(), desc="layers", unit="layer"):
            written |= weights.fill(layer, path, model)
            for name, value in as_saved(plan.stock, plan.block(path)).items():
                writer.add(name, value)
            for module in (layer, plan.stock.get_submodule(path)):
                module.to("meta")
        finish(plan.stock, weights, written, writer, source)


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
    with finished(target) as folder:
        config = read_config(source)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method", NAME)
        if method != NAME:
            raise ValueError(f"{source} is quantised already ({method}): give the folder of the model before that")
        if layers_with_experts(config):
            stock, (model, weights) = None, empty_with_experts(source, "quantize")
        else:
            stock, weights, model = empty_model(config), WeightFiles(source), from_transformers(empty_model(config))
            weights.check_whole(stock)
        writer, written = Shards(folder, max_shard_size), set()
        layers = {path: module for path, module in model.named_modules() if isinstance(module, MoEFeedForward)}
        for path, layer in tqdm(layers.items(), desc="layers", unit="layer"):
            written |= weights.fill(layer, path, model) if stock is None else fill_by_block(layer, path, stock, weights)
            quantize_experts(layer.requires_grad_(False), **settings)
            for module in layer.modules():
                if isinstance(module, QuantizedExperts):
                    module.rearrange(PLAIN)
            for key, value in as_saved(model, named(path, layer)).items():
                writer.add(weights.without_head(key, model), value)
            layer.to("meta")
        finish(model, weights, written, writer, source)


def named(path: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module by the names in the model around it."""
    return {f"{path}.{key}": value for key, value in module.state_dict(keep_vars=True).items()}


def fill_by_block(layer: Any, path: str, stock: Any, weights: WeightFiles) -> set[str]:
    """Fill a layer from the files of the block that it stands for; return the names of its weights there."""
    block, own = stock.get_submodule(path), named(path, stock.get_submodule(path))
    for name, tensor in own.items():  # which is loaded in the dtype of its file
        tensor.data = tensor.data.to(weights[weights.named(name, stock)].dtype)
    names = in_files(stock, own).keys() & weights.keys()
    load_some(stock, {name: weights[name] for name in names})
    layer.moe.load_state_dict(to_layer(block, "batch").state_dict(), assign=True)
    block.to("meta")
    for name, rest in layer.named_buffers():
        if rest.is_meta:  # of `Replaced`
            layer.get_submodule(name.rpartition(".")[0]).weight = torch.zeros_like(rest, device="cpu")
    return {*names}


def empty_with_experts(source: Path, verb: str) -> tuple[Any, WeightFiles]:
    """The model with experts of a folder, without memory for its weights, and its files, which have them all."""
    config = read_config(source)
    layers = layers_with_experts(config)
    if not layers:
        raise ValueError(
            f"{source} has no experts of this package: there is nothing to {verb}. A stock model gets them by "
            "from_transformers or upcycle"
        )
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    model, weights = empty_model(config), WeightFiles(source)
    put_experts(model, layers)
    weights.check_whole(model)
    return model, weights


@contextmanager
def finished(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which is renamed to it at the end; after an error it is removed.

    A killed process leaves `.NAME.xxxx.unfinished`, without a `config.json`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: give another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
    try:
        yield folder
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


def finish(model: Any, weights: WeightFiles, written: Collection[str], writer: Shards, source: Path) -> None:
    """Write the other weights, the model's configuration, and copies of the other files: tokenizer and so on."""
    for stored in tqdm([stored for stored in weights if stored not in written], desc="others", unit="weight"):
        writer.add(stored, weights[stored])
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


class WeightFiles(Mapping[str, Tensor]):
    """The weights of a folder by name, in `dtype` or their own; each is read only when it is asked for."""

    files: dict[str, str]

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        index = folder / INDEX
        if index.exists():
            with readable(index):
                files = check_weight_map(json.loads(index.read_text())["weight_map"])
        elif (folder / "model.safetensors").exists():
            with opened(folder / "model.safetensors") as file:
                files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}: save the model with safetensors")
        self.folder = folder
        self.dtype = dtype
        self.files = dict(sorted(files.items(), key=lambda item: item[1]))

    def __getitem__(self, name: str) -> Tensor:
        with opened(self.folder / self.files[name]) as file:
            weight = file.get_tensor(name)
        return weight.to(self.dtype) if self.dtype is not None and weight.is_floating_point() else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def named(self, name: str, model: Any) -> str:
        """The name of a model's weight in the files, which differs from the model's own name for some classes."""
        for stored in in_files(model, {name: model.get_parameter_or_buffer(name)}):
            if stored in self.files:
                return stored
        raise ValueError(
            f"{self.folder} has no {name}: load the model by transformers and save it, which renames weights"
        )

    def fill(self, layer: nn.Module, path: str, model: Any) -> set[str]:
        """Fill a layer of a model, at a path; return the names of its weights in the files."""
        names = {key: self.named(f"{path}.{key}", model) for key in layer.state_dict()}
        layer.load_state_dict({key: self[stored] for key, stored in names.items()}, assign=True)
        return {*names.values()}

    def check_whole(self, model: Any) -> None:
        """Raise ValueError if a weight of the model is in none of the files, and tied to none that is."""
        for name in sorted(model.state_dict().keys() - set(model.all_tied_weights_keys)):
            self.named(name, model)

    def without_head(self, name: str, model: Any) -> str:
        """The name without its first word, if the files are of a model without a head; else the name itself."""
        prefix = f"{model.base_model_prefix}."
        return name if any(below(model.base_model_prefix, n) for n in self.files) else name.removeprefix(prefix)


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
        size = value.numel() * value.element_size()
        if self.waiting and self.size + size > self.max_size:
            self.write()
        self.waiting[name] = value.detach().contiguous()
        self.size += size
        self.total += size

    def write(self) -> None:
        save_file(self.waiting, self.part(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.waiting))
        self.waiting, self.size = {}, 0

    def part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"

    def close(self) -> None:
        """Write the last file, and name all files by their number."""
        self.write()
        n = len(self.files)
        if n == 1:
            self.part(0).rename(self.folder / "model.safetensors")
            return
        files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for i, file in enumerate(files):
            self.part(i).rename(self.folder / file)
        names = {name: file for file, held in zip(files, self.files, strict=True) for name in held}
        index = {"metadata": {"total_size": self.total}, "weight_map": names}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
