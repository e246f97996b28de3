"""Inserts `MoE` layers into a dense model, as described in its configuration."""

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
    """Insert `MoE` layers into a dense model, so that saved weights of these layers can be loaded. The weights of the
    replaced networks are lost.

    Raises:
        ValueError: `gate` is not passed although a gate's description is missing, none of the described layers exists
            in this model, a layer does not have a described setting or does not accept its value, or a described gate
            or form of experts does not exist.
        TypeError, ValueError: `gate` does not return a new gate for each layer.
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
        raise ValueError(
            f"{type(model).__name__} has none of the layers in config.json: {[entry['layers'] for entry in layers]}"
        )
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
    """Build the layer that replaces the dense network at `location`, as described in its entry."""
    entry = entries[location.moe_path]
    coefs = {name: entry[name] for name in ("loss_coef", "z_loss_coef", "loss_coefs")}

    def build_described_gate(*sizes: int) -> nn.Module:
        with naming_rejected_description(f"describes the gate {entry['gate']!r}", GATE_CLASSES):
            return build_gate(entry["gate"])

    sizes = entry["num_experts"], gate or build_described_gate, entry["hidden_dim"]
    return build_moe(dense, *sizes, coefs, entry.get("shared_expert"))


def apply_form(layer: Any, path: str, form: Any) -> None:
    """Convert the stacked experts at `path` to the described form. `form` is a class name, or a dictionary with the
    class name and its arguments."""
    arguments = {"class": form} if isinstance(form, str) else dict(form)
    make, stacked = EXPERT_FORMS[arguments.pop("class")], layer.get_submodule(path)
    if not isinstance(stacked, StackedExperts):
        raise TypeError(f"expected {path} to be stacked experts, but it is a {type(stacked).__name__}")
    set_attribute(layer, path, make(stacked, **arguments))


@contextmanager
def naming_rejected_description(description: str, classes: Iterable[str]) -> Iterator[None]:
    """Context manager that turns errors about a description in config.json into a ValueError. The error message
    contains the description and the available classes."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.json {description}, which cannot be built ({type(error).__name__}: {error}); the available "
            f"classes are {', '.join(classes)}. Correct this entry, or save the model again"
        ) from error


def finish_loading(model: Any, repack: bool = True) -> None:
    """Finish loading a model after `transformers` has loaded its weights.

    Raise ValueError if the checkpoint lacks any of the layers' weights, which `transformers` would leave uninitialized.
    Weights that a `device_map` offloaded to disk are not checked. If `repack` is True, 4-bit weights in another layout
    are copied to the layout for this machine, whereas weights already in this layout remain memory-mapped. Gates are
    set up to balance load across the data-parallel ranks, and the model is set up to save weights under its own names,
    regardless of the names in the files.
    """
    model.name_or_path = model.config.name_or_path
    clear_weight_conversions(model)
    use_own_names_on_save(model)
    for path, layer in find_layers(model).items():
        state = layer.moe.state_dict(prefix=f"{path}.moe.", keep_vars=True)
        lacks = [name for name, value in state.items() if not (was_loaded(value) or value.is_meta)]
        if lacks:
            raise ValueError(
                f"the checkpoint does not contain {', '.join(lacks[:4])}{' and more' if len(lacks) > 4 else ''}; load "
                "a dense model with its own class, and then upcycle it"
            )
    for module in model.modules():
        if isinstance(module, QuantizedExperts) and repack:
            module.repack()
        if isinstance(module, Replaced):
            for weight in module.buffers(recurse=False):
                weight.zero_()  # the buffer may contain uninitialized memory
    set_gate_process_groups(model)


def find_layer_path(model: Any, name: str) -> str | None:
    """Return a layer's path in this model, given its path in the description. In models with a head, paths have an
    additional first component.

    Return None if the model does not contain this layer, for example because it is only the encoder of an
    encoder-decoder model.
    """
    paths, head = dict(model.named_modules()), f"{model.base_model_prefix}."
    return next((path for path in (name, head + name, name.removeprefix(head)) if path in paths), None)
