"""Quantises the experts of saved models, layer by layer, so that the model need not fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mixture_of_experts.huggingface.blocks.convert import to_layer
from mixture_of_experts.huggingface.blocks.sparse import from_transformers
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward
from mixture_of_experts.huggingface.private_transformers import as_saved, load_some
from mixture_of_experts.huggingface.saving.configuration import NAME, layers_with_experts
from mixture_of_experts.huggingface.saving.folders import (
    Shards,
    WeightFiles,
    copy_others,
    empty_model,
    empty_with_experts,
    finished,
    read_config,
)
from mixture_of_experts.huggingface.saving.names import in_files
from mixture_of_experts.ops import bits4
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts


def quantize_folder(source: Path, target: Path, *, max_shard_size: int = 10**9, **settings: Any) -> None:
    """Quantise the experts of a saved model; write the folder that `save_pretrained` would write.

    A layer is in memory two or three times, and a file of the new folder twice. Nibbles are plain, as
    `bits4.PLAIN` says, whatever machine writes them.

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
            of = (path, model, weights) if stock is None else (path, stock, weights)
            written |= (read_layer if stock is None else read_block)(layer, *of)
            quantize_experts(layer.requires_grad_(False), **settings)
            for module in layer.modules():
                if isinstance(module, QuantizedExperts):
                    module.rearrange(bits4.PLAIN)
            for key, value in as_saved(model, named(path, layer)).items():
                writer.add(weights.without_head(key, model), value)
            layer.to("meta")
        for stored in tqdm([stored for stored in weights if stored not in written], desc="others", unit="weight"):
            writer.add(stored, weights[stored])
        writer.close()
        copy_others(source, folder)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)


def named(path: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module by the names in the model around it."""
    return {f"{path}.{key}": value for key, value in module.state_dict().items()}


def read_layer(layer: nn.Module, path: str, model: Any, weights: WeightFiles) -> set[str]:
    """Fill a layer of a model with experts; return the names of its weights in the files."""
    names = {key: weights.named(f"{path}.{key}", model) for key in layer.state_dict()}
    layer.load_state_dict({key: weights[stored] for key, stored in names.items()}, assign=True)
    return {*names.values()}


def read_block(layer: Any, path: str, stock: Any, weights: WeightFiles) -> set[str]:
    """Fill a layer from the files of the block that it stands for; return the names of its weights there."""
    block, own = stock.get_submodule(path), named(path, stock.get_submodule(path))
    for name, tensor in own.items():  # which is loaded in its own dtype
        tensor.data = tensor.data.to(weights[weights.named(name, stock)].dtype)
    names = in_files(stock, own).keys() & weights.keys()
    load_some(stock, {name: weights[name] for name in names})
    layer.moe.load_state_dict(to_layer(block, "batch").state_dict(), assign=True)
    block.to("meta")
    for name, rest in layer.named_buffers():
        if rest.is_meta:  # of `Replaced`
            layer.get_submodule(name.rpartition(".")[0]).weight = torch.zeros_like(rest, device="cpu")
    return {*names}
