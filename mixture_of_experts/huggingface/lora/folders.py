"""Merges PEFT adapters into saved models, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mixture_of_experts.huggingface.feed_forward import find_layers
from mixture_of_experts.huggingface.private_peft import ADAPTER_FILE, get_active_copy, is_peft_wrapper, strip_wrappers
from mixture_of_experts.huggingface.saving.folders import read_experts_model, rewrite_folder
from mixture_of_experts.quantize import QuantizedExperts


def merge_folder(source: Path, target: Path, *, adapter: Path, max_shard_size: int = 10**9) -> None:
    """Merge LoRA adapters into a saved MoE model. The result is the same as with PEFT's
    `merge_and_unload(safe_merge=True)`.

    PEFT copies all adapted weights at once, whereas this function copies one layer at a time.

    Args:
        source: a folder written by `save_pretrained` or another command. The model's experts must not be quantized.
        target: path of the new folder, which must not exist yet.
        adapter: a folder to which PEFT saved adapters.
        max_shard_size: maximum size of a weight file, in bytes.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has no experts, or its experts are quantized; an adapter cannot be merged, adapts tied
            embeddings, or produces non-finite weights; or the names or shapes of the model's weights do not match the
            files.
        FileNotFoundError: `source` is not a folder, or `adapter` contains no adapters.
        FileExistsError: `target` already exists.
        OSError: a file cannot be written, for example because the disk is full.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("merging adapters requires PEFT: pip install 'peft>=0.21'") from error
    if not (adapter / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"{adapter} has no {ADAPTER_FILE}; pass the folder where PEFT saved the adapters")
    model = read_experts_model(source, "merge adapters into", adapter)
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        raise ValueError(
            f"{source} has quantized experts, so adapters cannot be merged into it; pass the folder of the unquantized "
            "model"
        )
    state = model.state_dict()
    adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    if unknown := adapted.load_adapter(str(adapter), "default").unexpected_keys:  # PEFT would ignore these keys
        raise ValueError(
            f"{adapter} contains {unknown[0]}, but the model in {source} has no weight with that name; pass the model "
            "that the adapter was trained on"
        )
    merged = find_merged_weights(adapted.get_base_model())
    adapted.base_model.unload()  # the wrappers referenced by `merged` keep their factors
    if tied := sorted({*merged} & {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}):
        raise ValueError(
            f"{tied[0]} is a tied weight, and merging would untie it; train without adapters on embeddings"
        )

    def read(name: str) -> Tensor:
        return merged[name]() if name in merged else state[name]

    def change(path: str) -> dict[str, Tensor]:
        return {name: read(name) for name in model.get_submodule(path).state_dict(prefix=f"{path}.")}

    rewrite_folder(model, read, list(find_layers(model)), change, source, target, max_shard_size)


def find_merged_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return functions that compute the merged weights, one for each weight that PEFT adapted. The keys are the names
    of the weights in the model without adapters."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path, module in model.named_modules():
        name = strip_wrappers(path)
        if not is_peft_wrapper(module):
            continue
        if "modules_to_save" in module._modules:
            copy = get_active_copy(module)
            found |= {f"{name}.{key}": partial(copy.state_dict().__getitem__, key) for key in copy.state_dict()}
        elif "base_layer" in module._modules and hasattr(module, "merge"):
            found |= {f"{name}.{key}": partial(merge_weight, module, key) for key in list_adapted(module)}
        elif hasattr(module, "unload_and_optionally_merge_module"):  # for example, PEFT's wrapper for trainable tokens
            raise ValueError(
                f"{name} contains a {type(module).__name__}, which cannot be merged on disk; load the model and call "
                "PEFT's merge_and_unload()"
            )
    return found


def list_adapted(wrapper: Any) -> list[str]:
    """Return the names of the weights that a PEFT wrapper adapts, relative to the wrapped module."""
    name = getattr(wrapper, "parameter_name", None)
    return [name] if name else [name for name, _ in wrapper.get_base_layer().named_parameters(recurse=False)]


def merge_weight(wrapper: Any, name: str) -> Tensor:
    """Return a copy of a weight with its adapters merged. The wrapped module is not changed."""
    base = wrapper.get_base_layer()
    before = {name: weight.data for name, weight in base.named_parameters(recurse=False)}
    wrapper.merge(safe_merge=True)  # safe_merge assigns new tensors instead of adding in place
    found = base.get_parameter(name).data
    for name, weight in before.items():
        base.get_parameter(name).data = weight
    wrapper.merged_adapters.clear()
    return found
