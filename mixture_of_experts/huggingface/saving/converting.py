"""Converts saved models to models with this package's layers, and writes them to new folders. Loading such a folder
memory-maps the weights, and a forward pass reads only the chosen experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.huggingface.blocks.model_conversion import find_sparse_blocks, replace_blocks
from mixture_of_experts.huggingface.feed_forward import find_layers, get_named_tensors
from mixture_of_experts.huggingface.private_transformers import (
    default_dtype,
    find_unexpected_names,
    get_loaded_dtypes,
    load_partial_weights,
)
from mixture_of_experts.huggingface.router_config import override_router_coef
from mixture_of_experts.huggingface.saving.configuration import read_layer_entries
from mixture_of_experts.huggingface.saving.folders import make_empty_model, read_config, read_model, rewrite_folder
from mixture_of_experts.huggingface.saving.loader import find_saved_class
from mixture_of_experts.huggingface.saving.restore import insert_experts
from mixture_of_experts.huggingface.saving.shards import (
    check_all_used,
    check_float,
    make_missing_error,
    read_weights,
)
from mixture_of_experts.huggingface.saving.weight_names import map_to_file_names
from mixture_of_experts.ops.int4 import BLOCKS, PORTABLE_BLOCK
from mixture_of_experts.quantize import QuantizedExperts, RoundingFunction, quantize_experts

Dtypes = Mapping[str, torch.dtype]


def convert_folder(
    source: Path,
    target: Path,
    *,
    bits: int | None = None,
    block: int | None = None,
    dtype: torch.dtype | None = None,
    loss_coef: float | None = None,
    max_shard_size: int = 10**9,
    group: int = 64,
    rounding: RoundingFunction | None = None,
) -> None:
    """Convert a saved model layer by layer. The new folder contains what `save_pretrained` would write for the
    converted model.

    `from_pretrained` memory-maps the stacked experts in the new folder, so models that do not fit into memory can still
    be run. The conversion holds at most three copies of a layer and one output file in memory.

    Args:
        source: the folder of a stock model, or a folder written by `save_pretrained` or another command. The sparse
            blocks of a stock model are converted as in `from_transformers`.
        target: path of the new folder, which must not exist yet.
        bits: number of bits per quantized expert weight, 8 or 4. Default: experts are not quantized.
        block: layout of 4-bit weights; see `QuantizedExperts`. Default: the layout for this machine's CPU, so that
            weights remain memory-mapped when they are loaded on this machine. Weights in another layout are rearranged
            in memory when they are loaded.
        dtype: dtype to which floating-point weights are cast, as in `from_pretrained(dtype=...)`. Default: weights keep
            their stored dtypes.
        loss_coef: coefficient of each layer's load-balancing loss. Default: the saved coefficient or, for a stock
            model, the same behavior as in `from_transformers`.
        max_shard_size: maximum size of a weight file, in bytes.
        group, rounding: see `quantize_experts`. These arguments are used only with `bits`.

    Raises:
        ValueError, TypeError: as in `quantize_experts` and `from_transformers`. Also raised if `bits` is passed for a
            model that is already quantized, or if the names or shapes of the model's weights do not match the files.
        FileNotFoundError: `source` is not a folder.
        FileExistsError: `target` already exists.
        OSError: a file cannot be written, for example because the disk is full.
    """
    if block not in (None, *BLOCKS):
        raise ValueError(f"expected block to be one of {', '.join(map(str, BLOCKS))} or None, but got {block!r}")
    config = read_config(source)
    stock = not read_layer_entries(config)
    if stock:
        model, paths, weights = read_stock_model(source, config)
    else:
        model, weights = read_model(source, config), {}
        paths = list(find_layers(model))
    dtypes = {} if dtype is None else plan_dtypes(config, dtype)
    if dtype is not None:
        for part in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
            if part is not None:
                part.dtype = dtype
    state = model.state_dict()

    def change(path: str) -> dict[str, Tensor]:
        if stock:
            load_weights(model, model.get_submodule(path).state_dict(prefix=f"{path}.", keep_vars=True), weights)
        for name, tensor in get_named_tensors(model.get_submodule(path)).items():
            tensor.data = cast_weight(f"{path}.{name}", tensor.data, dtypes)
        if stock:
            replace_blocks(model, {path: {"balance_over": "batch", "loss_coef": loss_coef}})
        layer = model.get_submodule(path)
        if loss_coef is not None:
            layer.moe.loss_coef = loss_coef
            override_router_coef(model)
        if bits is not None:
            quantize_experts(layer.requires_grad_(False), bits, group=group, rounding=rounding)  # pyright: ignore[reportArgumentType]
        for module in layer.modules():
            if isinstance(module, QuantizedExperts):
                module.repack(block)
        return layer.state_dict(prefix=f"{path}.")

    def read(name: str) -> Tensor:
        return cast_weight(name, state[name], dtypes)

    rewrite_folder(model, read, paths, change, source, target, max_shard_size)


def quantize_folder(
    source: Path, target: Path, *, bits: int = 8, block: int | None = PORTABLE_BLOCK, **settings: Any
) -> None:
    """Run `convert_folder` with different defaults: 8 bits, and a CPU-independent layout for 4-bit weights (see
    `ops/int4.py`). Every machine rearranges this layout in memory when it loads the weights."""
    convert_folder(source, target, bits=bits, block=block, **settings)


def read_stock_model(source: Path, config: Any) -> tuple[Any, list[str], dict[str, Tensor]]:
    """Read the weights of a stock model. The weights of its sparse blocks remain on the meta device.

    Returns:
        The model, the paths of the sparse blocks, and all weights in the folder, keyed by name.
    """
    model, weights = make_empty_model(config), read_weights(source)
    paths = find_sparse_blocks(model)
    blocks, held = tuple(f"{path}." for path in paths), model.state_dict(keep_vars=True)
    check_all_used(source, find_unexpected_names(model, weights.keys() - map_to_file_names(model, held)))
    load_weights(model, {name: held[name] for name in held if not name.startswith(blocks)}, weights)
    missing = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    model.tie_weights(missing, recompute_mapping=False)  # does not tie weights that differ in the files
    return model, paths, weights


def plan_dtypes(config: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype to which `from_pretrained(dtype=dtype)` casts each floating-point weight of a saved model, keyed
    by weight name."""
    model_class = find_saved_class(config)
    with torch.device("meta"), default_dtype(dtype, model_class):
        model = model_class(config)
        if entries := read_layer_entries(config):
            insert_experts(model, entries)
    return get_loaded_dtypes(model, dtype)


def cast_weight(name: str, weight: Tensor, dtypes: Dtypes) -> Tensor:
    return weight.to(dtypes.get(name, weight.dtype))


def load_weights(stock: Any, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a stock model, keeping the dtypes in which they are stored."""
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
