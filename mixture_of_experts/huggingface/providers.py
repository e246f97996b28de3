"""Providers that describe `transformers` models and PEFT wrappers to the rest of this package.
`mixture_of_experts.providers` imports this module when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mixture_of_experts.huggingface.blocks.block_settings import BlockSettings, find_recipe
from mixture_of_experts.huggingface.model_arguments import ArgumentsReader, find_model_with_mask
from mixture_of_experts.huggingface.private_peft import (
    find_tensors_not_saved,
    get_peft_wrapped_module,
    list_copies,
)
from mixture_of_experts.providers import ExternalRouter, Provider, TokensReader
from mixture_of_experts.support.private_torch import get_original_class

#: (module-name prefix, class-name suffix) pairs of classes that transform each row independently
TOKENWISE_CLASSES = (
    ("transformers.models.", "MLP"),
    ("transformers.models.", "RMSNorm"),
    ("transformers.activations", ""),
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners._buffer_dict", "BufferDict"),
)


class TransformersProvider(Provider):
    """A provider that describes `transformers` models and their sparse blocks."""

    def find_router(self, block: nn.Module) -> ExternalRouter | None:
        recipe = find_recipe(block)
        return None if recipe is None else BlockSettings(block, recipe)

    def find_experts(self, module: nn.Module) -> nn.Module | None:
        experts = getattr(module, "experts", None)
        own = get_original_class(module).__module__.startswith("transformers.")
        return experts if own and isinstance(experts, nn.Module) else None

    def find_enclosing_model(self, modules: Sequence[nn.Module]) -> nn.Module | None:
        return find_model_with_mask(modules)

    def make_tokens_reader(self, model: nn.Module) -> TokensReader | None:
        reader = ArgumentsReader(model)
        return reader if reader.positions else None

    def is_tokenwise(self, module: nn.Module) -> bool | None:
        return is_tokenwise_class(module)

    def is_linear(self, module: nn.Module) -> bool | None:
        return get_original_class(module).__name__ == "Conv1D"


class PeftProvider(Provider):
    """A provider that describes PEFT's module wrappers."""

    gate_remedy: str | None = "PEFT can train a router only with modules_to_save=['gate']"

    def get_wrapped_module(self, module: nn.Module) -> nn.Module | None:
        return get_peft_wrapped_module(module)

    def list_children(self, module: nn.Module) -> list[tuple[nn.Module, bool]] | None:
        return list_copies(module)

    def is_tokenwise(self, module: nn.Module) -> bool | None:
        return is_tokenwise_class(module)

    def unsaved_reason(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
        if not (names := find_tensors_not_saved(model, tensors)):
            return None
        return (
            f"the model has adapters, whose files do not contain what changes in {', '.join(names)}; list the gate in "
            "LoraConfig(modules_to_save=['gate']), or merge the adapters at the end and save the whole model"
        )


def is_tokenwise_class(module: nn.Module) -> bool:
    kind = get_original_class(module)
    where, name = kind.__module__, kind.__name__
    return any(where.startswith(start) and name.endswith(end) for start, end in TOKENWISE_CLASSES)


PROVIDERS: dict[str, Provider] = {"transformers": TransformersProvider(), "peft": PeftProvider()}
