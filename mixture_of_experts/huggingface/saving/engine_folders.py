"""Saves stock models in folders that inference engines read correctly.

`transformers` 5 moved and renamed entries of `config.json`. vLLM reads configurations through `transformers`, but
llama.cpp and mlx-lm read the file directly. Some llama.cpp and mlx-lm models use a default value if the old entry is
missing. Therefore, the `save_pretrained` method of a model returned by `export` or `to_transformers` also writes the
old entries, copies the source model's tokenizer, and warns about engines whose results would differ.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

Config = Mapping[str, Any]  # the contents of a config.json file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",  # llama.cpp's converter needs this file for SentencePiece tokenizers
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CHAT_TEMPLATES_FOLDER = "additional_chat_templates"
EXPERT_COUNTS = ("num_experts", "num_local_experts")  # alternative names for the same configuration entry


class EngineFault(NamedTuple):
    """A setting that an engine silently ignores for some model types. `tests/test_inference_engines.py` tests each of
    these settings."""

    engines: str
    model_types: tuple[str, ...]
    applies: Callable[[Config], bool]
    reason: str


def find_rope_type(config: Config) -> str:
    return (config.get("rope_parameters") or {}).get("rope_type", "default")


QWEN = ("qwen2_moe", "qwen3_moe")
ENGINE_FAULTS = (
    EngineFault(
        "llama.cpp and mlx-lm",
        ("qwen2_moe",),
        lambda config: bool(config.get("norm_topk_prob")),
        "they do not normalize the router weights of Qwen2-MoE (norm_topk_prob=True)",
    ),
    EngineFault(
        "llama.cpp",
        ("qwen3_moe",),
        lambda config: not config.get("norm_topk_prob"),
        "it normalizes the router weights of Qwen3-MoE (norm_topk_prob=False)",
    ),
    EngineFault(
        "vLLM",
        ("qwen2_moe",),
        lambda config: not config.get("qkv_bias", True),
        "it does not initialize the biases that Qwen2-MoE lacks (qkv_bias=False)",
    ),
    EngineFault(
        "mlx-lm",
        ("mixtral", "qwen3_moe"),  # for such a Qwen2-MoE, mlx-lm raises an error
        lambda config: find_rope_type(config) != "default",
        "it does not scale the rotary embeddings of Mixtral and Qwen3-MoE (rope_type)",
    ),
    EngineFault(
        "llama.cpp",
        QWEN,
        lambda config: find_rope_type(config) in ("llama3", "dynamic"),
        "it does not scale the rotary embeddings of Qwen as in Llama 3 (rope_type)",
    ),
    EngineFault(
        "llama.cpp and mlx-lm",
        ("mixtral",),
        lambda config: (config.get("sliding_window") or 1e9) < config.get("max_position_embeddings", 0),
        "their Mixtral attends to all tokens (sliding_window)",
    ),
    EngineFault(
        "vLLM, llama.cpp and mlx-lm",
        ("mixtral", "qwen3_moe"),
        lambda config: config.get("hidden_act", "silu") != "silu",
        "they compute SiLU in every expert (hidden_act)",
    ),
    EngineFault(
        "llama.cpp and mlx-lm",
        ("qwen2_moe",),  # for such a shared expert, vLLM raises an error
        lambda config: config.get("hidden_act", "silu") != "silu",
        "they compute SiLU in every expert (hidden_act)",
    ),
)


def find_engine_faults(config: Config) -> Iterator[str]:
    """Yield each engine whose results would differ from those of `transformers`, along with the reason."""
    for fault in ENGINE_FAULTS:
        if config.get("model_type") in fault.model_types and fault.applies(config):
            yield f"{fault.engines}: {fault.reason}"


def find_engine_entries(config: Config, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries that engines look for but that are missing from the configuration. `aliases` maps alternative
    entry names to the current names."""
    rope, entries = config.get("rope_parameters"), {}
    if isinstance(rope, Mapping) and "rope_theta" in rope:  # all layers use the same rope_theta
        entries = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if find_rope_type(config) != "default":
            entries["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    for alias, name in aliases.items():
        if alias in EXPERT_COUNTS and name in config:
            entries[alias] = config[name]
    return {name: value for name, value in entries.items() if name not in config}


def complete_folder(folder: Path, stock_config: Any, source: str = "") -> None:
    """Complete the folder of a stock model with the entries and files that engines need, and warn about engines whose
    results would differ.

    Args:
        folder: the folder of the stock model, which must contain `config.json`.
        stock_config: the configuration of the stock model.
        source: the folder or cached hub repository from which the tokenizer is copied if `folder` has no tokenizer.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= find_engine_entries(config, stock_config.attribute_map)
    if text := config.get("text_config"):
        text |= find_engine_entries(text, stock_config.text_config.attribute_map)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # if the folder contained the files of two tokenizers, an engine could read the wrong one
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    for name in TOKENIZER_FILES if source and not has_tokenizer else ():
        if (found := find_file(source, name)) is not None:
            shutil.copy2(found, folder / name)
            if (templates := found.parent / CHAT_TEMPLATES_FOLDER).is_dir():
                shutil.copytree(templates, folder / CHAT_TEMPLATES_FOLDER, dirs_exist_ok=True)
    if faults := list(find_engine_faults(config)):
        warnings.warn(
            f"some engines do not compute the same outputs as transformers for {config['model_type']}: "
            f"{'; '.join(faults)}. docs/published_mixtures.md lists what each engine supports",
            stacklevel=3,
        )


def find_file(source: str, name: str) -> Path | None:
    """Return the path of a file in a folder or in a repository's hub cache, or None if the file does not exist."""
    if Path(source).is_dir():
        found: Any = Path(source) / name
    else:
        try:
            found = try_to_load_from_cache(source, name)
        except HFValidationError:  # `source` is a folder that no longer exists
            found = None
    return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None


class EngineSave:
    """A replacement for a stock model's `save_pretrained` that writes folders for inference engines.

    This object holds only a weak reference to the model. A strong reference would create a cycle, so that only the
    garbage collector could free the model. In `export(model).save_pretrained(folder)`, the exported model is freed
    before the call, so another model object with the same modules is saved instead. Pickling replaces this object with
    the class's own method, so that the model can be unpickled without this package.
    """

    def __init__(self, model: nn.Module, source: str) -> None:
        self.model: weakref.ref[Any] = weakref.ref(model)
        self.twin: Any = object.__new__(type(model))
        vars(self.twin).update({name: value for name, value in vars(model).items() if name != "save_pretrained"})
        self.source: str = source

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True would upload the folder before the entries for engines are written; call "
                "model.push_to_hub(repo_id) instead"
            )
        model = self.model() or self.twin
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if (args[0] if args else kwargs.get("is_main_process", True)) and (
            Path(save_directory) / "config.json"
        ).exists():
            complete_folder(Path(save_directory), model.config, self.source)

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineSave:
        copied = EngineSave(copy.deepcopy(self.twin, memo), self.source)
        copied.model = weakref.ref(memo.get(id(self.model()), copied.twin))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        model: Any = self.model() or self.twin
        return partial, (type(model).save_pretrained, model)


def save_for_engines(model: nn.Module, source: str) -> None:
    """Make a stock model's `save_pretrained` write folders that engines can read, including the tokenizer from
    `source`."""
    vars(model)["save_pretrained"] = EngineSave(model, source)


def save_as_own_class(model: nn.Module) -> None:
    """Undo `save_for_engines`."""
    vars(model).pop("save_pretrained", None)
