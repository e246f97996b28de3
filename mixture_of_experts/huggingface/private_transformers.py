"""Every name of `transformers` and accelerate that this package uses and their documentation does not promise.

`tests/huggingface/test_private_transformers.py` shows which of them a new version breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion

# Names of weights


class Rename(WeightRenaming):
    """A renaming, while a model is loaded, by a function of a name. It is not used to save the model."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[str], str]) -> None:
        super().__init__([], [])
        self.function: Callable[[str], str] = function

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.function(source_key), None


def merges(conversion: Any, name: str) -> bool:
    """Whether a weight of this name becomes a part of another weight when it is loaded."""
    return isinstance(conversion, WeightConverter) and conversion.rename_source_key(name)[1] is not None


def as_saved(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model by the names, and in the forms, in which its class saves them."""
    return revert_weight_conversion(model, dict(weights))  # pyright: ignore[reportArgumentType]


# Loading


def was_loaded(tensor: Tensor) -> bool:
    """Whether a checkpoint had a parameter or buffer of a model that is being loaded."""
    return getattr(tensor, "_is_hf_initialized", False)


def say_in_refusal(quantization_config: type, says: str) -> None:
    """Add a sentence to the error of `from_pretrained` for another quantization_config than that of the file: it has
    the name of the class in the file."""
    quantization_config.__name__ += f" ({says})"
