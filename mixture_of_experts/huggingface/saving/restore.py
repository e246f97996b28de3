"""Builds layers with experts in a dense model from the description in its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from mixture_of_experts.experts import StackedExperts
from mixture_of_experts.huggingface.blocks.model_conversion import replace_blocks
from mixture_of_experts.huggingface.distributed.plans import set_gate_process_groups, update_parallel_plans
from mixture_of_experts.huggingface.feed_forward import Replaced, find_layers
from mixture_of_experts.huggingface.private_transformers import (
    clear_weight_conversions,
    use_own_names_on_save,
    was_loaded,
)
from mixture_of_experts.huggingface.replacement.dense_ffn import Adapter, DenseFFN, NetworkLocation
from mixture_of_experts.huggingface.replacement.replace import (
    build_moe,
    find_networks,
    make_gate_factory,
    replace_networks,
    set_attribute,
)
from mixture_of_experts.huggingface.saving.layer_settings import (
    EXPERT_FORMS,
    GATE_CLASSES,
    GateFactory,
    apply_changes,
    build_gate,
)
from mixture_of_experts.moe import MoE
from mixture_of_experts.quantize import QuantizedExperts


def insert_experts(
    model: nn.Module,
    layers: list[dict[str, Any]],
    gate: GateFactory | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> None:
    """Change a dense model such that the weights of a model with experts can be loaded. Its own weights are lost.

    Raises:
        ValueError: a gate is not described and no `gate` is passed; none of the layers has a location in this model; a
            layer does not have a setting that is described as changed, or does not accept its value; or a gate or a
            form of experts does not exist.
        TypeError, ValueError: `gate` does not create a new gate for each layer.
    """
    entries: dict[str, dict[str, Any]] = {}
    for entry in layers:
        if gate is None and entry.get("gate", "block") is None:
            raise ValueError(
                f"config.json cannot describe the gate of {', '.join(entry['layers'])}, which is a "
                f"{entry['gate_class']}; call mixture_of_experts.huggingface.from_pretrained with gate= set to the "
                "function that was passed to replace_ffn"
            )
        entries |= {place: entry for name in entry["layers"] if (place := find_layer_path(model, name)) is not None}
    if not entries:
        raise ValueError(f"{type(model).__name__} has none of the layers {[entry['layers'] for entry in layers]}")
    if blocks := {place: entry for place, entry in entries.items() if "block" in entry}:
        replace_blocks(model, blocks)
    if networks := [place for place, entry in entries.items() if "block" not in entry]:
        gate_factory = None if gate is None else make_gate_factory(gate, 1, model)
        replace_networks(
            model, find_networks(model, networks, adapters), partial(build_described_layer, entries, gate_factory)
        )
    for place, entry in entries.items():
        layer: Any = model.get_submodule(place)
        for path, form in entry.get("forms", {}).items():
            with naming_rejected_description(f"describes {path!r} as {form!r}", EXPERT_FORMS):
                apply_form(layer, path, form)
        apply_changes(layer, entry.get("changed", {}))
    update_parallel_plans(model)


def build_described_layer(
    entries: Mapping[str, Any], gate: GateFactory | None, location: NetworkLocation, dense: DenseFFN
) -> MoE:
    """Return the layer described by the entry for the location of a dense network."""
    entry = entries[location.moe_path]
    coefs = {name: entry[name] for name in ("loss_coef", "z_loss_coef", "loss_coefs")}

    def build_described_gate(*sizes: int) -> nn.Module:
        with naming_rejected_description(f"describes the gate {entry['gate']!r}", GATE_CLASSES):
            return build_gate(entry["gate"])

    sizes = entry["num_experts"], gate or build_described_gate, entry["hidden_dim"]
    return build_moe(dense, *sizes, coefs, entry.get("shared_expert"))


def apply_form(layer: Any, path: str, form: Any) -> None:
    """Replace stacked experts of a layer by the described form, given as a class name or as a class with arguments."""
    arguments = {"class": form} if isinstance(form, str) else dict(form)
    make, stacked = EXPERT_FORMS[arguments.pop("class")], layer.get_submodule(path)
    if not isinstance(stacked, StackedExperts):
        raise TypeError(f"expected {path} to be stacked experts, but it is a {type(stacked).__name__}")
    set_attribute(layer, path, make(stacked, **arguments))


@contextmanager
def naming_rejected_description(description: str, classes: Iterable[str]) -> Iterator[None]:
    """Turn errors while building what config.json describes into a ValueError that names the entry and the classes."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.json {description}, which cannot be built ({type(error).__name__}: {error}); the available "
            f"classes are {', '.join(classes)}. Correct this entry, or save the model again"
        ) from error


def finish_loading(model: Any, repack: bool = True) -> None:
    """Finish a model whose weights were loaded.

    Raises for a checkpoint that lacks weights of layers, which transformers leaves uninitialized, except for weights
    that a `device_map` left on disk. With `repack`, copies 4-bit weights in another layout into that of this machine;
    those already in its layout stay mapped. Makes gates balance over the ranks that have different tokens, and makes
    the model save weights under its own names, whatever the names in the files were."""
    model.name_or_path = model.config.name_or_path
    clear_weight_conversions(model)
    use_own_names_on_save(model)
    for path, layer in find_layers(model).items():
        state = layer.moe.state_dict(prefix=f"{path}.moe.", keep_vars=True)
        lacks = [name for name, value in state.items() if not (was_loaded(value) or value.is_meta)]
        if lacks:
            raise ValueError(
                f"the checkpoint does not contain {', '.join(lacks[:4])}{' and more' if len(lacks) > 4 else ''}; to "
                "load a dense model, use its own class and upcycle it"
            )
    for module in model.modules():
        if isinstance(module, QuantizedExperts) and repack:
            module.repack()
        if isinstance(module, Replaced):
            for weight in module.buffers(recurse=False):
                weight.zero_()  # the weight may be uninitialized memory
    set_gate_process_groups(model)


def find_layer_path(model: Any, name: str) -> str | None:
    """Return the path of a described layer in this model. With a head, paths have an additional first component.

    Returns None if the model lacks this part; for example, it may be only the encoder of an encoder-decoder model.
    """
    paths, head = dict(model.named_modules()), f"{model.base_model_prefix}."
    return next((path for path in (name, head + name, name.removeprefix(head)) if path in paths), None)
