"""Describes a model's `MoE` layers, so that they can be constructed before the weights are loaded.

The description is a list of entries. Each entry contains the names of some layers and the settings that these layers
share. The entries are generated on demand, so they include settings that were changed after a layer was inserted.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mixture_of_experts import gating
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, SparseFeedForward
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.recipes import list_gate_arguments
from mixture_of_experts.support.checked_module import CheckedModule
from mixture_of_experts.support.checks import check_size
from mixture_of_experts.support.private_torch import get_original_class, unwrap_module
from mixture_of_experts.unstack import unstack_experts
from mixture_of_experts.whole_model.router_discovery import iter_named_modules

GateFactory = Callable[[int, int], nn.Module]  # (dim, num_experts) -> gate

GATE_CLASSES: dict[str, Any] = {name: kind for name, kind in vars(gating).items() if name.endswith("Gating")}
ATTRIBUTE_NAMES = {"num_gates": "num_experts"}  # arguments that a gate stores under other names
# arguments that are True if the gate has the corresponding tensor
OPTIONAL_TENSORS = {"bias": "b_gating", "expert_bias": "expert_bias"}
#: arguments that an entry describes elsewhere, and run-specific arguments that are not saved
EXCLUDED_ARGUMENTS = ("self", "device", "dtype", "settings", "process_group", "forced", "loss_coef", "z_loss_coef")
FIXED_ARGUMENTS = {"ReLUGating": ("score", "normalize")}  # arguments that a gate passes to its base class
JSON_TYPES = (bool, int, float, str, type(None))
#: functions that convert stacked experts to other forms, keyed by class name
EXPERT_FORMS: dict[str, Callable[..., nn.Module]] = {
    "QuantizedExperts": QuantizedExperts,
    "UnstackedExperts": unstack_experts,
}


class LayerRecord:
    """The description of a layer. If a layer is copied, the copied record describes the copied layer. If only the
    record is copied, the copy describes the state of the original layer."""

    layer: Callable[[], MoEFeedForward | None] | None = None

    def __init__(self, layer: MoEFeedForward) -> None:
        #: settings of a layer when it was built from its description, before any changes
        self.built: dict[str, Any] = {
            path: value for path, value in read_layer_settings(layer).items() if is_json_value(value)
        }
        #: descriptions of the parts of which a layer was built
        self.built_parts: dict[str, str] = describe_parts(layer)
        self.layer = weakref.ref(layer)
        self.read_entry()

    def bind_layer(self, layer: MoEFeedForward) -> None:
        self.layer = self.layer or weakref.ref(layer)

    def read_entry(self) -> dict[str, Any]:
        """Return the layer's current entry. If the layer no longer exists, return the last entry that was read."""
        layer = self.layer and self.layer()
        if layer is not None:
            entry, now = describe_feed_forward(layer), read_layer_settings(layer)
            described_prefix = "moe.gate." if entry.get("gate") else "-"
            changed = {
                path: value
                for path, value in now.items()
                if is_json_value(value) and not path.startswith(described_prefix)
            }
            entry["changed"] = {p: value for p, value in changed.items() if self.built.get(p, value) != value}
            self.entry: dict[str, Any] = entry
        return self.entry

    def find_undescribed(self) -> list[str]:
        """Return the parts and settings that have been changed since the layer was inserted and that the entry does not
        describe."""
        layer = self.layer and self.layer()
        if layer is None:
            return []
        parts = [path for path, part in describe_parts(layer).items() if self.built_parts.get(path, part) != part]
        settings = read_layer_settings(layer).items()
        return parts + [path for path, value in settings if path in self.built and not is_json_value(value)]

    def __getstate__(self) -> dict[str, Any]:
        return {"built": self.built, "built_parts": self.built_parts, "entry": self.read_entry()}


def describe_layers(records: Mapping[str, LayerRecord]) -> list[dict[str, Any]]:
    """Return the descriptions of layers, given their records keyed by path. Layers with the same settings share an
    entry."""
    names: dict[str, list[str]] = {}
    for name, record in records.items():
        names.setdefault(json.dumps(record.read_entry(), sort_keys=True), []).append(name)
    return [{"layers": paths, **json.loads(settings)} for settings, paths in names.items()]


def describe_feed_forward(feed_forward: MoEFeedForward) -> dict[str, Any]:
    moe: Any = unwrap_module(feed_forward.moe)
    gate: Any = unwrap_module(moe.gate)
    shared_expert = moe.shared_expert and unwrap_module(moe.shared_expert)
    forms = {
        named_module.name: {
            "class": get_original_class(named_module.module).__name__,
            **getattr(named_module.module, "settings", dict)(),
        }
        for named_module in iter_named_modules(feed_forward)
        if get_original_class(named_module.module).__name__ in EXPERT_FORMS
    }
    coefs = {"loss_coef": moe.loss_coef, "z_loss_coef": moe.z_loss_coef, "loss_coefs": dict(moe.loss_coefs)}
    if isinstance(feed_forward, SparseFeedForward):  # the stock model determines all other settings
        balance_over = getattr(gate, "balance_over", "batch")
        return {"block": feed_forward.block, "balance_over": balance_over, "forms": forms, **coefs}
    return {
        "num_experts": moe.num_experts,
        "hidden_dim": getattr(unwrap_module(moe.experts), "hidden_dim", None),
        "shared_expert": getattr(shared_expert, "hidden_dim", None),
        "gate": describe_gate(gate),
        "gate_class": get_original_class(gate).__name__,
        "forms": forms,
        **coefs,
    }


def describe_parts(feed_forward: MoEFeedForward) -> dict[str, str]:
    """Return descriptions of the parts that an entry does not describe, keyed by path: activations, the class of the
    shared expert and, if the layer replaced a block, the class of the gate."""
    moe: Any = unwrap_module(feed_forward.moe)
    found, is_block = {}, isinstance(feed_forward, SparseFeedForward)
    if is_block:
        has_bias = getattr(unwrap_module(moe.gate), "expert_bias", None) is not None
        found["moe.gate"] = get_class_name(moe.gate) + " with a bias" * has_bias
    if is_block or moe.shared_expert is not None:
        found["moe.shared_expert"] = get_class_name(moe.shared_expert)
    for named_module in iter_named_modules(feed_forward):
        path, module = named_module.name, named_module.module
        if (activation := module._modules.get("act")) is not None:
            found[f"{path}.act"] = repr(unwrap_module(activation))
    return found


def get_class_name(module: nn.Module | None) -> str:
    return "" if module is None else get_original_class(unwrap_module(module)).__name__


def describe_gate(gate: nn.Module) -> dict[str, Any] | None:
    """Return a gate's class and arguments as values that JSON can represent. Return None for custom gates."""
    kind = get_original_class(gate)
    if GATE_CLASSES.get(kind.__name__) is not kind:
        return None
    arguments = read_gate_arguments(gate, kind)
    return {"class": kind.__name__, "arguments": arguments} if all(map(is_json_value, arguments.values())) else None


def read_gate_arguments(gate: nn.Module, kind: type) -> dict[str, Any]:
    """Return the constructor arguments of class `kind` that correspond to the gate's current settings."""
    arguments = {}
    for name in list_gate_arguments(kind) or ():
        if name in OPTIONAL_TENSORS:
            arguments[name] = getattr(gate, OPTIONAL_TENSORS[name]) is not None
        elif name not in (*EXCLUDED_ARGUMENTS, *FIXED_ARGUMENTS.get(kind.__name__, ())):
            arguments[name] = getattr(gate, ATTRIBUTE_NAMES.get(name, name))
    return arguments


def is_json_value(value: Any) -> bool:
    """Return whether JSON can represent a value."""
    return all(isinstance(item, JSON_TYPES) for item in (value if isinstance(value, list | tuple) else [value]))


def read_layer_settings(feed_forward: MoEFeedForward) -> dict[str, Any]:
    """Return the settings of a layer that can be changed after construction, keyed by path."""
    found = {}
    for named_module in iter_named_modules(feed_forward):
        path, module = named_module.name, named_module.module
        names = {"p"} if isinstance(module, nn.Dropout) else set()
        if isinstance(module, CheckedModule):
            names |= module._settings.keys()
            if path == "moe.gate":
                names.update(list_gate_arguments(get_original_class(module)) or ())
            names -= {*ATTRIBUTE_NAMES, *OPTIONAL_TENSORS, *EXCLUDED_ARGUMENTS, *module.shape_attributes}
        for name in sorted(name for name in names if hasattr(module, name)):
            found[f"{path}.{name}"] = getattr(module, name)
    return found


def apply_changes(layer: MoEFeedForward, changes: Mapping[str, Any]) -> None:
    """Apply the changed settings described in a file to a layer, and check that their values are valid.

    Raises:
        ValueError: an entry is not a setting that `read_layer_settings` returns, or its value is invalid.
    """
    known = read_layer_settings(layer)
    for path, value in changes.items():
        if path not in known or not is_json_value(value):
            raise ValueError(
                f"config.json sets {path!r} to {value!r}, but the layer has no such setting or does not accept this "
                f"value; its settings are {', '.join(known)}"
            )
    for path, value in changes.items():
        parent, _, name = path.rpartition(".")
        with naming_rejected_entries({path: value}):
            setattr(layer.get_submodule(parent), name, SETTING_CHECKS.get(name, return_unchanged)(name, value))
    if of_gate := {path: value for path, value in changes.items() if path.startswith("moe.gate.")}:
        with naming_rejected_entries(of_gate):
            check_gate_settings(unwrap_module(layer.moe.gate))


@contextmanager
def naming_rejected_entries(changes: Mapping[str, Any]) -> Iterator[None]:
    """Context manager that turns errors about invalid settings into a ValueError that names the entries in the file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        named = ", ".join(f"{path!r} to {value!r}" for path, value in changes.items())
        raise ValueError(f"config.json sets {named}, which this layer does not accept: {error}") from error


def return_unchanged(name: str, value: Any) -> Any:
    return value


def check_share(name: str, value: Any) -> float:
    """Return `value` if it is a number from 0 to 1, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"expected {name} to be a number from 0 to 1, but got {value!r}")
    return value


#: checks for settings that modules do not validate
SETTING_CHECKS: dict[str, Callable[[str, Any], Any]] = {"k": check_size, "p": check_share}


def check_gate_settings(gate: nn.Module) -> None:
    """Check a gate's current settings by passing them to the constructor of its class, which raises an error if they
    are invalid."""
    kind = get_original_class(gate)
    if GATE_CLASSES.get(kind.__name__) is kind:
        arguments = read_gate_arguments(gate, kind)
        with torch.device("meta"):
            build_gate({"class": kind.__name__, "arguments": {n: v for n, v in arguments.items() if is_json_value(v)}})


def build_gate(description: dict[str, Any]) -> nn.Module:
    arguments = {n: tuple(v) if isinstance(v, list) else v for n, v in description["arguments"].items()}
    return GATE_CLASSES[description["class"]](**arguments)
