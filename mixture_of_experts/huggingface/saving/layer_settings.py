"""Describes a model's layers with experts, so that they can be built before weights are loaded.

The description is a list of entries: the names of some layers, and the settings that they share. It is read from the
layers when it is asked for, so that it tells of settings that were changed since a layer was put in.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mixture_of_experts import gating
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, SparseFeedForward, layers_by_path
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.recipes import arguments_of
from mixture_of_experts.support.private_torch import unwrapped, wrapped_class
from mixture_of_experts.support.settings import CheckedModule
from mixture_of_experts.unstack import to_list
from mixture_of_experts.whole_model.sites import places

GateFactory = Callable[[int, int], nn.Module]  # (dim, num_experts) -> gate

GATES: dict[str, Any] = {name: kind for name, kind in vars(gating).items() if name.endswith("Gating")}
CALLED = {"num_gates": "num_experts"}  # arguments that a gate stores under another name
PARTS = {"bias": "b_gating", "expert_bias": "expert_bias"}  # arguments that are True if a gate has this part
LEFT_OUT = ("self", "device", "dtype", "settings")  # arguments that a gate does not store under their name
FIXED = {"ReLUGating": ("score", "normalize")}  # arguments that a gate gives to the class it derives from
OF_RUN = ("process_group", "forced")  # settings of a gate that a run makes, and that no file tells
PLAIN = (bool, int, float, str, type(None))
#: what makes experts in other forms than stacks, from stacked ones, by the name of their class
FORMS: dict[str, Callable[..., nn.Module]] = {"QuantizedExperts": QuantizedExperts, "UnstackedExperts": to_list}


class LayerRecord:
    """What is told of a layer. A copy of it belongs to the copy of the layer, or tells how the layer was."""

    def __init__(self, layer: MoEFeedForward) -> None:
        #: what the loaded layer has by itself, if it is described
        self.built: dict[str, Any] = {path: value for path, value in settings_of(layer).items() if plain(value)}
        self.entry: dict[str, Any] = describe_layer(layer)
        self.layer: Callable[[], MoEFeedForward | None] = weakref.ref(layer)

    def belong_to(self, layer: MoEFeedForward) -> None:
        if self.layer() is None:
            self.layer = weakref.ref(layer)

    def read(self) -> dict[str, Any]:
        """The entry of the layer as it is, or as it was when it was last read if it is gone."""
        layer = self.layer()
        if layer is not None:
            entry = describe_layer(layer)
            if entry.get("hidden_dim", 0) is None:  # of experts that stand in other layers
                entry["hidden_dim"] = self.entry.get("hidden_dim")
            now = {path: value for path, value in settings_of(layer).items() if not path.startswith(told_by(entry))}
            forms = {p.name: form_of(p.module) for p in places(layer) if wrapped_class(p.module).__name__ in FORMS}
            changed = {
                path: value for path, value in now.items() if plain(value) and self.built.get(path, value) != value
            }
            more = {"changed": changed, "forms": forms}
            self.entry = entry | {name: value for name, value in more.items() if value}
        return self.entry

    def untold(self) -> list[str]:
        """The settings that were changed since the layer was put in, to values that JSON does not know."""
        now = {} if (layer := self.layer()) is None else settings_of(layer)
        return [path for path in self.built if path in now and not plain(now[path])]

    def __getstate__(self) -> dict[str, Any]:
        return {"built": self.built, "entry": self.read(), "layer": nobody}


def nobody() -> None:
    """Stands for a layer that is gone."""


class Layers(Sequence[dict[str, Any]]):
    """The description of all layers with experts in a model, read from them; those of equal settings share an entry."""

    def __init__(self, model: nn.Module) -> None:
        layers = layers_by_path(model)
        for layer in layers.values():
            if layer.record is None or layer.record.layer() is not layer:
                layer.record = LayerRecord(layer)
        self.records: dict[str, LayerRecord] = {name: layer.record for name, layer in layers.items()}

    def entries(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for name, record in self.records.items():
            settings = record.read()
            same = next((entry for entry in entries if entry == {**settings, "layers": entry["layers"]}), None)
            if same is None:
                entries.append({"layers": [name], **settings})
            else:
                same["layers"].append(name)
        return entries

    def warn_of_untold(self) -> None:
        untold = [f"{path} of {name}" for name, record in self.records.items() for path in record.untold()]
        if untold:
            warnings.warn(
                f"config.json cannot tell {', '.join(untold)}, which was changed after the layer was put in: set it "
                "again after loading",
                stacklevel=2,
            )

    def __getitem__(self, i: Any) -> Any:
        return self.entries()[i]

    def __len__(self) -> int:
        return len(self.entries())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers | list) and self.entries() == list(other)


def describe_layer(feed_forward: MoEFeedForward) -> dict[str, Any]:
    moe: Any = unwrapped(feed_forward.moe)
    gate: Any = unwrapped(moe.gate)
    coefs = {"loss_coef": moe.loss_coef, "z_loss_coef": moe.z_loss_coef, "loss_coefs": dict(moe.loss_coefs)}
    if isinstance(feed_forward, SparseFeedForward):  # the stock model of the configuration has the rest
        return {"block": feed_forward.block, "balance_over": getattr(gate, "balance_over", "batch"), **coefs}
    return {
        "num_experts": moe.num_experts,
        "hidden_dim": getattr(unwrapped(moe.experts), "hidden_dim", None),
        "shared_expert": None if moe.shared_expert is None else unwrapped(moe.shared_expert).hidden_dim,
        "gate": describe_gate(gate),
        "gate_class": wrapped_class(gate).__name__,
        **coefs,
    }


def describe_gate(gate: nn.Module) -> dict[str, Any] | None:
    """The class and the arguments of a gate, in types that JSON knows; None for a gate outside this package."""
    kind = wrapped_class(gate)
    if GATES.get(kind.__name__) is not kind:
        return None
    arguments = {}
    for name in arguments_of(kind) or ():
        if name in PARTS:
            arguments[name] = getattr(gate, PARTS[name]) is not None
        elif name not in (*LEFT_OUT, *FIXED.get(kind.__name__, ())):
            arguments[name] = None if name in OF_RUN else getattr(gate, CALLED.get(name, name))
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {"class": kind.__name__, "arguments": arguments} if all(map(plain, arguments.values())) else None


def plain(value: Any) -> bool:
    """Whether JSON knows a value."""
    return all(isinstance(item, PLAIN) for item in (value if isinstance(value, list | tuple) else [value]))


def settings_of(feed_forward: MoEFeedForward) -> dict[str, Any]:
    """The settings of a layer that can be set later, by path."""
    found = {}
    for place in places(feed_forward):
        path, module = place.name, place.module
        names = {"p"} if isinstance(module, nn.Dropout) else set()
        if isinstance(module, CheckedModule):
            names |= module._settings.keys()
            if path == "moe.gate":
                names.update(arguments_of(wrapped_class(module)) or ())
            names -= {*OF_RUN, *CALLED, *PARTS, *LEFT_OUT, *module.sizes}
        for name in sorted(name for name in names if hasattr(module, name)):
            found[f"{path}.{name}"] = getattr(module, name)
    return found


def form_of(experts: nn.Module) -> str | dict[str, Any]:
    """What makes experts in another form than stacks, in types that JSON knows; of no arguments the class alone."""
    name, arguments = wrapped_class(experts).__name__, getattr(experts, "settings", dict)()
    return {"class": name, **arguments} if arguments else name


def told_by(entry: dict[str, Any]) -> tuple[str, ...]:
    """The paths of settings, or their beginnings, that an entry tells by itself."""
    coefs = ("moe.loss_coef", "moe.z_loss_coef")
    if "block" in entry:
        return (*coefs, "moe.gate.balance_over")
    return coefs if entry["gate"] is None else (*coefs, "moe.gate.")


def build_gate(description: dict[str, Any]) -> nn.Module:
    arguments = {n: tuple(v) if isinstance(v, list) else v for n, v in description["arguments"].items()}
    return GATES[description["class"]](**arguments)
