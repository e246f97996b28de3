"""Saves LoRA adapters in formats that stock models can load: in PEFT's layout, or with separate factors for each
expert.

Axes: e (experts), d (model dimension), h (hidden dimension), k (rank).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from mixture_of_experts.experts import StackedExperts
from mixture_of_experts.huggingface.blocks.model_conversion import find_sparse_blocks, replace_blocks
from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.private_peft import (
    ADAPTER_FILE,
    find_missed_targets,
    find_renamed_weights,
    strip_wrappers,
    write_stack_factors,
)
from mixture_of_experts.huggingface.private_transformers import map_to_published_names
from mixture_of_experts.huggingface.replacement.dense_ffn import split_gate_up

if TYPE_CHECKING:
    from mixture_of_experts.huggingface.lora.stock_adapter import LowRankUpdate, StockAdapter

#: names of an expert's w1, w3 and w2, keyed by model type, for models whose checkpoints stack the experts
STACKED_EXPERT_NAMES = {"gpt_oss": ("w1", "w3", "w2")}


def save_adapter(
    model: Any,
    folder: str | PathLike[str],
    *,
    layout: Literal["peft", "per_expert", "mixture_of_experts"] = "peft",
    adapter: str | None = None,
    base_model: str | None = None,
) -> None:
    """Save a LoRA adapter so that it can be loaded into the stock model that `to_transformers` or `export` creates from
    the base model.

    PEFT's own `save_pretrained` writes an adapter for a model with this package's layers. With the adapter written by
    `save_adapter`, the stock model returns the same outputs as `model`, up to rounding. Scaling factors are folded into
    the weights.

    Args:
        model: a `PeftModel`. The model is not modified. Its base model is either a model modified by
            `from_transformers`, `upcycle` or `replace_ffn`, or a stock model with adapters on its stacked experts.
        folder: the folder in which to save `adapter_config.json` and `adapter_model.safetensors`.
        layout: "peft" writes an adapter that `PeftModel.from_pretrained` loads into the stock model, and that vLLM
            loads for gpt-oss. If both the gate and up projections are adapted, the rank of their joint adapter is the
            sum of the two ranks. "per_expert" writes separate factors for each expert and projection, named as in the
            stock class's checkpoints. vLLM reads this layout for all other models. "mixture_of_experts" converts in the
            opposite direction, and writes an adapter for the model that `from_transformers` creates.
        adapter: name of the adapter to save. Default: the active adapter.
        base_model: folder or name of the stock model, which is stored in `adapter_config.json`.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a `PeftModel`.
        ValueError: `layout` is unknown; `adapter` does not exist, is not a LoRA adapter or does not adapt any experts;
            PEFT skipped some of its `target_parameters`; the adapter contains weights of a module that has no
            counterpart in the stock model; or the layout cannot represent the adapter. Nothing is written in these
            cases.

    Example:
        >>> import copy, tempfile
        >>> import torch
        >>> from peft import LoraConfig, PeftModel, get_peft_model
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> from mixture_of_experts.huggingface import from_transformers, save_adapter
        >>> config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
        >>> stock, tokens = MixtralForCausalLM(config).eval(), torch.randint(64, (2, 10))
        >>> lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.w1", "experts.w2"])
        >>> adapted = get_peft_model(from_transformers(copy.deepcopy(stock)), lora)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(adapted, folder)
        ...     again = PeftModel.from_pretrained(stock, folder)
        >>> again(tokens).logits.shape
        torch.Size([2, 10, 64])
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("saving adapters requires PEFT: pip install 'peft>=0.21'") from error
    from mixture_of_experts.huggingface.lora.stock_adapter import read_adapter

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"expected model to be a PeftModel, but got a {type(model).__name__}; wrap it with get_peft_model"
        )
    writers = {"peft": write_for_stock_model, "per_expert": write_per_expert, "mixture_of_experts": write_for_layers}
    if layout not in writers:
        raise ValueError(f"expected layout to be one of {', '.join(map(repr, writers))}, but got {layout!r}")
    name = choose_adapter(model, adapter)
    found = read_adapter(model, name)
    if not found.experts:
        raise ValueError(
            f"the adapter {name!r} of {type(model.get_base_model()).__name__} does not adapt any experts; save it with "
            "save_pretrained, or add stacked weights, such as 'experts.w1', to target_parameters"
        )
    settings = dict(
        task_type=model.peft_config[name].task_type, base_model_name_or_path=base_model, inference_mode=True
    )
    writers[layout](found, Path(folder), settings)


def choose_adapter(model: Any, adapter: str | None) -> str:
    """Return the name of the adapter to save. Raise ValueError if the adapter does not exist or cannot be saved."""
    name: Any = model.active_adapter if adapter is None else adapter
    config = model.peft_config.get(name) if isinstance(name, str) else None
    if config is None:
        raise ValueError(f"there is no adapter {name!r}; set adapter= to one of {', '.join(model.peft_config)}")
    if config.peft_type != "LORA":
        raise ValueError(f"only LoRA adapters can be saved, but the adapter {name!r} has type {config.peft_type.value}")
    if config.bias != "none":
        raise ValueError(
            f"the adapter {name!r} trains biases (bias={config.bias!r}), but only the matrices A and B can be saved; "
            "train with bias='none', or call merge_and_unload() and save the whole model"
        )
    if missing := find_missed_targets(model):
        raise ValueError(
            f"the adapter {name!r} does not adapt {', '.join(missing)}, because PEFT found no such weights; correct "
            "target_parameters (this package's experts have the weights w1, w3 and w2)"
        )
    return name


# PEFT layouts


def write_for_stock_model(found: StockAdapter, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the adapter in PEFT's layout for the stock model."""
    stacks = {  # stored in the layout of the stock model's weights
        f"{path}.{name}": (left, right) if found.blocks[path].is_transposed else (right.mT, left.mT)
        for path, updates in found.experts.items()
        for name, (left, right) in stack_updates(found, path, updates).items()
    }
    write_with_peft(found, stacks, folder, settings)


def write_for_layers(found: StockAdapter, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the adapter in PEFT's layout for the model that `from_transformers` creates from the stock model."""
    if found.whole_modules:
        raise ValueError(
            f"the adapter includes full copies of modules ({', '.join(sorted(found.whole_modules))}), which "
            "layout='mixture_of_experts' does not support; train without modules_to_save"
        )
    replace_blocks(found.model, {path: {"balance_over": "batch"} for path in find_sparse_blocks(found.model)})
    stacks = {}
    for layer_path, layer in find_layers(found.model).items():
        inner = next(name for name, module in layer.named_modules() if isinstance(module, StackedExperts))
        updates = [part for path, part in found.experts.items() if f"{path}.".startswith(f"{layer_path}.")]
        stacks |= {f"{layer_path}.{inner}.{name}": update for part in updates for name, update in part.items()}
    write_with_peft(found, stacks, folder, settings)


def write_with_peft(
    found: StockAdapter, stacks: Mapping[str, LowRankUpdate], folder: Path, settings: Mapping[str, Any]
) -> None:
    """Add PEFT adapters to the model on the meta device, assign their weights, and save them with PEFT.

    Args:
        found: the adapter to write. `found.model` is the model to adapt.
        stacks: the updates of the stacked weights, in the same layout as the weights, keyed by weight name.
        folder: the output folder.
        settings: additional settings for the adapter configuration.
    """
    from peft import get_peft_model

    # PEFT warns about rank patterns for stacks, so all stacks have the same rank
    rank = max(right.shape[1] for _, right in stacks.values())
    ranks = dict.fromkeys(stacks, rank) | {path: len(a) for path, (_, a) in found.linear.items()}
    whole = dict(modules_to_save=sorted(found.whole_modules) or None)
    targets = dict(target_modules=sorted(found.linear), target_parameters=sorted(stacks))
    # PEFT stores this name in the adapter's configuration
    found.model.name_or_path = settings["base_model_name_or_path"] or ""
    adapted: Any = get_peft_model(found.model, make_lora_config(rank, ranks, **settings, **targets, **whole))
    wrappers = find_wrappers(adapted)
    if wrappers.keys() != ranks.keys():
        raise ValueError(
            f"PEFT would adapt a different set of modules in {type(found.model).__name__} (the difference includes "
            f"{', '.join(sorted(wrappers.keys() ^ ranks.keys())[:4])}); adapt only experts and attention"
        )
    if not find_layers(found.model):
        check_loads(adapted.get_base_model())
    for path, (b, a) in found.linear.items():
        wrappers[path].lora_A["default"].weight = torch.nn.Parameter(a)
        wrappers[path].lora_B["default"].weight = torch.nn.Parameter(b)
    for name, (left, right) in stacks.items():
        missing = rank - right.shape[1]
        padded = pad(left, (0, missing)), pad(right, (0, 0, 0, missing))
        write_stack_factors(wrappers[name], "default", *padded)
    for path, state in found.whole_modules.items():
        adapted.get_base_model().get_submodule(path).modules_to_save["default"].load_state_dict(state, assign=True)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def check_loads(stock: Any) -> None:
    """Raise ValueError if PEFT would ignore some of a stock model's adapter weights when loading them."""
    names = [name for name, _ in stock.named_parameters() if ".lora_" in name]
    for renamed in find_renamed_weights(stock, names, "default"):
        raise ValueError(
            f"PEFT would rename an adapter weight to {renamed}, which {type(stock).__name__} does not have, and ignore "
            "it; call merge_and_unload() and save the whole model"
        )


def stack_updates(found: StockAdapter, path: str, updates: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """Combine the updates of w1, w3 and w2 into updates of a stock model's stacked weights.

    The updates of weights without an adapter are zero. The file must contain both stacked weights, because engines
    expect both and cannot tell from an adapter's names which of the two weights it belongs to.
    """
    whole = complete_updates(found, path, updates)
    first = {name: updates[name] for name in ("w1", "w3") if name in updates} or {"w1": whole["w1"]}
    if found.first_weight(path) == "up_proj":
        return {"up_proj": first["w1"], "down_proj": whole["w2"]}
    lefts, rights = zip(*first.values(), strict=True)
    shares_left = len(first) == 2 and torch.equal(*lefts)
    left = lefts[0] if shares_left else torch.cat(lefts, dim=-1)
    e, _, h = rights[0].shape
    right = rights[0].new_zeros(e, left.shape[-1], 2 * h)
    halves: dict[str, Tensor] = dict(zip(("w1", "w3"), split_gate_up(right, found.gate_up_order(path)), strict=True))
    start = 0
    for name, (_, part) in first.items():
        halves[name][:, start : start + part.shape[1]] = part
        start += 0 if shares_left else part.shape[1]
    more = len(found.blocks[path].experts.gate_up_proj) - e  # some classes have rows for zero-computation experts
    return {"gate_up_proj": (pad(left, (0,) * 5 + (more,)), pad(right, (0,) * 5 + (more,))), "down_proj": whole["w2"]}


def find_wrappers(adapted: Any) -> dict[str, Any]:
    """Return the PEFT wrappers of linear layers and stacked weights, keyed by the path of the layer or weight."""
    from peft.tuners.lora import layer

    found = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, layer.LoraLayer):
            parameter = [module.parameter_name] if isinstance(module, layer.ParamWrapper) else []
            found[".".join([strip_wrappers(name), *parameter])] = module
    return found


def make_lora_config(rank: int, ranks: Mapping[str, int], **settings: Any) -> Any:
    """Return a LoRA configuration in which every scaling factor is 1, so that scaling is correct even in engines that
    ignore `rank_pattern` and `alpha_pattern`."""
    from peft import LoraConfig

    other = {re.escape(path): k for path, k in ranks.items() if k != rank}
    return LoraConfig(r=rank, lora_alpha=rank, rank_pattern=other, alpha_pattern=dict(other), **settings)


# Inference engine layout


def write_per_expert(found: StockAdapter, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write separate factors for each expert and projection. vLLM requires the factors of all projections, so
    projections without an adapter get factors of zeros."""
    if found.whole_modules:
        raise ValueError(
            f"the adapter includes full copies of modules ({', '.join(sorted(found.whole_modules))}), which engines do "
            "not read from adapters; call merge_and_unload() and export the model, or train without modules_to_save"
        )
    pairs = dict(found.linear)
    for path, updates in found.experts.items():
        names = list_expert_names(found, path)
        for weight, (left, right) in complete_updates(found, path, updates).items():
            for name, a, b in zip(names[weight], left.mT, right.mT, strict=True):
                pairs[name] = b, a
    tensors = {}
    for path, (b, a) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.contiguous()
    targets = sorted({path.rpartition(".")[2] for path in pairs})
    ranks = {path: len(a) for path, (_, a) in pairs.items()}
    config = make_lora_config(max(ranks.values()), ranks, **settings, target_modules=targets)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)


def complete_updates(found: StockAdapter, path: str, updates: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """Return the updates of all projections of the experts at `path`. The updates of projections without an adapter are
    zero."""
    left, right = next(iter(updates.values()))
    e, k = len(left), right.shape[1]
    out_dim, in_dim = found.blocks[path].experts.down_proj.shape[1:]
    d, h = (in_dim, out_dim) if found.blocks[path].is_transposed else (out_dim, in_dim)
    projections = {"w1": (d, h), "w3": (d, h), "w2": (h, d)}
    if found.first_weight(path) == "up_proj":
        del projections["w3"]
    return {
        name: updates.get(name, (left.new_zeros(e, p, k), right.new_zeros(e, k, q)))
        for name, (p, q) in projections.items()
    }


def list_expert_names(found: StockAdapter, path: str) -> dict[str, list[str]]:
    """Return the names of each expert's w1, w3 and w2 in checkpoints of the stock class.

    To find the names, this function converts a state dict in which identifying numbers replace the weights. If the
    class's checkpoints contain stacked experts, this function returns the per-expert names that vLLM uses.
    """
    experts = found.blocks[path].experts
    e, first = len(experts.down_proj), found.first_weight(path)
    num_first = 2 if first == "gate_up_proj" else 1
    shape = (e, 1, num_first) if found.blocks[path].is_transposed else (e, num_first, 1)
    numbers = {
        f"{path}.{first}": torch.arange(e * num_first).view(shape),
        f"{path}.down_proj": -1 - torch.arange(e).view(e, 1, 1),
    }
    published: dict[str, Tensor] = map_to_published_names(found.model, numbers)
    names = {value.item(): name.removesuffix(".weight") for name, value in published.items() if value.numel() == 1}
    if len(names) == e * (num_first + 1):
        firsts = [[names[i * num_first + j] for i in range(e)] for j in range(num_first)]
        return dict(zip(("w1", "w3"), firsts, strict=False)) | {"w2": [names[-1 - i] for i in range(e)]}
    leaves = STACKED_EXPERT_NAMES.get(found.model.config.model_type, ("gate_proj", "up_proj", "down_proj"))
    return {
        weight: [f"{path}.{i}.{leaf}" for i in range(e)]
        for weight, leaf in zip(("w1", "w3", "w2"), leaves, strict=True)
    }
