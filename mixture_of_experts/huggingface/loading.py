"""Saved models with experts, loaded again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from mixture_of_experts.huggingface.adapters import Adapter
from mixture_of_experts.huggingface.feed_forward import Replaced, feed_forwards
from mixture_of_experts.huggingface.record import KEY, GateFactory, gate_factory
from mixture_of_experts.huggingface.replace import replace_ffn

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(
    path: str | PathLike[str],
    model_class: Any = None,
    *,
    gate: GateFactory | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    **settings: Any,
) -> Any:
    """Load what `save_pretrained` wrote of a model that `replace_ffn` or `upcycle` changed.

    The class of `transformers` alone cannot: it has no place for experts, and refuses the checkpoint.

    Args:
        path: the folder, or a name on the hub.
        model_class: a class of `transformers` or one of its `AutoModel...`; by default the one that was saved.
        gate: the function that was given to `replace_ffn`. Needed where the gate is not one of this package: those are
            written into `config.json`.
        adapters: as they were given to `replace_ffn`.
        settings: for the class's own `from_pretrained`. With `config=` of a changed model a checkpoint of the dense one
            can be loaded: its experts start anew, with a warning. (To copy the network into them, load the dense model
            and call `upcycle`.)

    Raises:
        ValueError: the configuration knows of no experts, or not of their gate.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from mixture_of_experts.huggingface import from_pretrained, replace_ffn
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
        >>> names = replace_ffn(model, num_experts=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = from_pretrained(folder)
        >>> type(again).__name__, bool((again.transformer.h[1].mlp.moe.experts.w1
        ...     == model.transformer.h[1].mlp.moe.experts.w1).all())
        ('GPT2LMHeadModel', True)
    """
    config = settings.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **{name: settings[name] for name in HUB if name in settings})
    config = copy.deepcopy(config)
    record = getattr(config, KEY, None)
    if not record:
        raise ValueError(f"{path} has no experts: its configuration has no {KEY!r}. Load it by its own class")
    for entry in record:
        if gate is None and entry["gate"] is None:
            raise ValueError(
                f"the gate of {', '.join(entry['layers'])} is a {entry['gate_class']}, which config.json cannot "
                "describe: pass gate=, the function that was given to replace_ffn"
            )
    plain = find_class(config, model_class)
    wants_info = settings.pop("output_loading_info", False)
    # a dense matrix where experts are is no mismatch here: they start anew
    may_mismatch = settings.pop("ignore_mismatched_sizes", False)
    loads: Any = with_experts(plain, record, gate, adapters)
    model, info = loads.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    model.__class__ = plain
    refuse_mismatches(model, info["mismatched_keys"], may_mismatch)
    start_anew(model, info["missing_keys"])
    return (model, info) if wants_info else model


def find_class(config: Any, model_class: Any) -> type[PreTrainedModel]:
    """The class of a model, from that which was saved, or asked for."""
    if model_class is None:
        names = getattr(config, "architectures", None) or ["?"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise ValueError(f"transformers has no class {names[0]!r}: pass model_class")
    mapping = getattr(model_class, "_model_mapping", None)
    return model_class if mapping is None else mapping[type(config)]


def with_experts(
    plain: type[PreTrainedModel], record: list[dict[str, Any]], gate: GateFactory | None, adapters: Any
) -> type[PreTrainedModel]:
    """The class, but its models have experts from the beginning, so that weights find their places."""

    def initialise(self, config, *args, **kwargs):
        plain.__init__(self, config, *args, **kwargs)
        setattr(config, KEY, [])  # written anew
        for entry in record:
            replace_ffn(
                self,
                entry["num_experts"],
                layers=[find_place(self, name) for name in entry["layers"]],
                gate=gate or gate_factory(entry["gate"]),
                hidden_dim=entry["hidden_dim"],
                loss_coef=entry["loss_coef"],
                z_loss_coef=entry["z_loss_coef"],
                loss_coefs=entry["loss_coefs"],
                adapters=adapters,
            )

    # of the module it came from, or transformers would take it for code of a user
    return type(plain.__name__, (plain,), {"__init__": initialise, "__module__": plain.__module__})


def find_place(model: nn.Module, name: str) -> str:
    """The path that a layer has here: a model with a head has one more name before it than one without."""
    paths = [path for path, _ in model.named_modules() if path == name or path.endswith(f".{name}")]
    paths = paths or [path for path, _ in model.named_modules() if path and name.endswith(f".{path}")]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no place for the experts of {name}")
    return max(paths, key=len)


def refuse_mismatches(model: nn.Module, mismatched: Collection[Any], allowed: bool) -> None:
    """As transformers does, but for dense layers that became experts."""
    for name, found, expected in mismatched:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Replaced) and name.endswith("weight"):
            module.weight.zero_()
        elif not allowed:
            raise RuntimeError(
                f"size mismatch: {name} has shape {tuple(found)} in the checkpoint, {tuple(expected)} here"
            )


@torch.no_grad()
def start_anew(model: nn.Module, missing: Collection[str]) -> None:
    """Initialise what a checkpoint did not have: transformers leaves memory there as it is."""
    names, anew = {module: name for name, module in model.named_modules()}, []
    for feed_forward in feed_forwards(model):
        for module in feed_forward.moe.modules():
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            gone = {name for name in own if f"{names[module]}.{name}" in missing}
            if not gone:
                continue
            reset = getattr(module, "reset_parameters", None)
            if reset is None:
                raise ValueError(
                    f"{names[module]} is not in the checkpoint, and a {type(module).__name__} has no reset_parameters"
                )
            kept = {name: value.clone() for name, value in own.items() if name not in gone}
            reset()
            for name, value in kept.items():
                own[name].copy_(value)
            anew += [f"{names[module]}.{name}" for name in sorted(gone)]
    if anew:
        warnings.warn(
            f"not in the checkpoint, and initialised: {', '.join(anew[:4])}{' and more' if len(anew) > 4 else ''}",
            stacklevel=3,
        )
