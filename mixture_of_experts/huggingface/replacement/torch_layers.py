"""Supports `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`: locates their networks, reads their padding
masks, and disables their fused path.

In eval mode without gradients, an encoder layer runs a single fused operator that reads the weights of `linear1` and
`linear2`. `nn.TransformerEncoder` also reads these weights in its first layer, before it removes padding for this
operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from mixture_of_experts.huggingface.model_arguments import ArgumentsReader
from mixture_of_experts.huggingface.replacement.dense_ffn import Adapter
from mixture_of_experts.huggingface.replacement.network_search import UnsupportedNetwork
from mixture_of_experts.providers import TokenMetadata

TORCH_LAYER_ADAPTER = Adapter(
    up="linear1",
    down="linear2",
    activation="activation",
    hidden_dropout="dropout",
    slot=True,
    bypass=("linear1", "activation"),
)
TORCH_LAYER_CLASSES = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def find_torch_layers(model: nn.Module) -> dict[str, Adapter | UnsupportedNetwork]:
    """Return the torch layers in a model, keyed by path. Networks in layers without `batch_first` are reported as
    unsupported."""
    found: dict[str, Adapter | UnsupportedNetwork] = {}
    own = [kind._ff_block for kind in TORCH_LAYER_CLASSES]
    for name, module in model.named_modules():
        layer: Any = module
        if getattr(type(layer), "_ff_block", None) not in own or not has_dense_ffn(layer):
            continue  # skip custom code and replaced modules
        if layer.self_attn.batch_first:
            found[name] = TORCH_LAYER_ADAPTER
        else:
            reason = "it takes tokens (n, b, d), but a router needs sequences first; build the layers with batch_first="
            found[name] = UnsupportedNetwork(name, type(module).__name__, f"{reason}True and load the same weights")
    return found


class LayerReader(ArgumentsReader):
    """Reads the shape and padding mask of a torch layer's tokens from the layer's arguments."""

    argument_names: ClassVar[tuple[str, ...]] = ("src", "tgt", "src_key_padding_mask", "tgt_key_padding_mask")

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenMetadata:
        given = self.pick_arguments(args, kwargs)
        x = given.get("src", given.get("tgt"))
        if x is None or x.is_nested or x.ndim not in (2, 3):
            return TokenMetadata()
        shape = (1, x.shape[0]) if x.ndim == 2 else (x.shape[0], x.shape[1])
        padding = given.get("src_key_padding_mask", given.get("tgt_key_padding_mask"))  # True or -inf marks padding
        return TokenMetadata(shape=shape, mask=None if padding is None else (padding == 0).view(shape))


def disable_fused_path(model: nn.Module) -> None:
    """Disable the fused operator in torch encoder layers whose networks were replaced, so that they also call their
    submodules in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not has_dense_ffn(module):
            module.activation_relu_or_gelu = 0  # marks the activation as unsupported by the fused operator
        if isinstance(module, nn.TransformerEncoder) and not all(map(has_dense_ffn, module.layers)):
            module.use_nested_tensor = False


def has_dense_ffn(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "linear1", None), nn.Linear)
