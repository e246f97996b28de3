"""Converts `transformers` sparse blocks to `MoE` layers and back. The conversion changes only the layout of the
weights.

A block's computation is defined by its recipe in `recipes.MODELS` and by the attributes listed in `block_classes.py`.

Axes: d (model dimension), h (hidden dimension), e (experts).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.huggingface.blocks.block_classes import BLOCK_ATTRIBUTES, RECIPES_BY_BLOCK
from mixture_of_experts.huggingface.blocks.block_layer import ParsedBlock, WeightViews
from mixture_of_experts.huggingface.blocks.block_settings import find_attribute, find_recipe
from mixture_of_experts.huggingface.feed_forward import get_named_tensors
from mixture_of_experts.huggingface.private_peft import is_peft_wrapper
from mixture_of_experts.huggingface.replacement.dense_ffn import check_not_offloaded
from mixture_of_experts.moe import MoE
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.wrappers import list_nested_experts

EXPERT_COUNTS_KEY = "gate.expert_counts"  # blocks do not store expert counts
COMPARED_ATTRIBUTES = (
    "k", "score", "select", "weigh", "normalize", "eps", "scale", "num_groups", "top_groups", "group_score",
    "tolerance", "logits", "capacity_factor_train", "capacity_factor_eval", "min_expert_capacity",
)  # fmt: skip


def convert_to_layer(block: nn.Module, balance_over: Any, **coefs: Any) -> MoE:
    """Return an `MoE` that is equivalent to a sparse block and has copies of its weights. Frozen weights remain
    frozen."""
    block_layer = read_block(block, balance_over, **coefs)
    with torch.enable_grad():  # with gradients enabled, the views show which weights are frozen
        views = block_layer.get_weight_views()
    moe = copy.deepcopy(block_layer.layer)
    state = {name: concatenate_pieces(pieces) for name, pieces in views.items()}
    if "gate.expert_bias" in state:
        # float32, because balancing updates the bias in small steps
        state["gate.expert_bias"] = state["gate.expert_bias"].float()
        state[EXPERT_COUNTS_KEY] = torch.zeros_like(state["gate.expert_bias"], dtype=torch.int64)
    moe.load_state_dict(state, assign=True)  # assign=True keeps the block's dtypes and device
    for name, parameter in moe.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(any(piece.requires_grad for piece in views[name]))
    return moe.train(block.training)


@torch.no_grad()
def copy_to_block(moe: MoE, block: nn.Module) -> nn.Module:
    """Copy a layer's weights into an equivalent sparse block, and return the block."""
    check_same_computation(moe, block)
    own = get_named_tensors(moe)
    for name, pieces in read_block(block).get_weight_views().items():
        for view, part in zip(pieces, own[name].split(list(map(len, pieces))), strict=True):
            view.copy_(part)
    return block


def check_plain_weights(module: nn.Module, name: str) -> None:
    """Raise ValueError if a layer has PEFT adapters or quantized experts, which no stock class supports."""
    for part in module.modules():
        if is_peft_wrapper(part):
            raise ValueError(
                f"{name} has PEFT adapters, which transformers classes do not support; call merge_and_unload() first"
            )
        if isinstance(part, QuantizedExperts):
            raise ValueError(
                f"{name} has experts quantized to {part.bits} bits, which transformers classes do not support; use the "
                "unquantized model"
            )


def check_same_computation(moe: MoE, block: nn.Module) -> None:
    """Raise ValueError if an `MoE` layer is not equivalent to a sparse block."""
    check_plain_weights(moe, "the layer")
    if differ := find_differences(moe, block):
        raise ValueError(f"the layer does not compute the same function as {type(block).__name__}: {'; '.join(differ)}")


def find_differences(moe: MoE, block: nn.Module) -> list[str]:
    """Describe each difference between the computations of a layer and a sparse block."""
    ours, theirs = describe_computation(moe), describe_computation(read_block(block).layer)
    differ = [what for what in {**ours, **theirs} if ours.get(what) != theirs.get(what)]
    return [f"{what} {ours.get(what)}, but the block has {theirs.get(what)}" for what in differ]


def describe_computation(moe: MoE) -> dict[str, str]:
    """Return a textual description of each property that determines a layer's computation."""
    gate, parts = moe.gate, list_nested_experts(moe.experts)
    weights = {name: tensor for name, tensor in get_named_tensors(moe).items() if name != EXPERT_COUNTS_KEY}
    return {
        "the gate is": type(gate).__name__,
        **{f"the gate has {name}": repr(find_attribute(gate, name)) for name in COMPARED_ATTRIBUTES},
        "the experts have the activation": repr(find_attribute(parts[-1], "act")),
        "the experts are": " wrapping ".join(type(part).__name__ for part in parts),
        **{f"{name} has shape": str(tuple(tensor.shape)) for name, tensor in weights.items()},
    }


def concatenate_pieces(pieces: WeightViews) -> Tensor:
    """Concatenate the pieces into a tensor that shares no memory with them."""
    if len(pieces) > 1:
        return torch.cat([piece.detach() for piece in pieces])
    return pieces[0].detach().clone(memory_format=torch.contiguous_format)


def read_block(block: nn.Module, balance_over: Any = "batch", **coefs: Any) -> ParsedBlock:
    """Read a sparse block. Raise ValueError if the block's class is unknown or its computation is not supported."""
    name, recipe = type(block).__name__, find_recipe(block)
    if recipe is None:
        raise ValueError(
            f"{name} is not a supported block; huggingface.blocks.block_classes lists the {len(RECIPES_BY_BLOCK)} "
            "supported classes, such as DeepseekV3MoE, GptOssMLP and MixtralSparseMoeBlock"
        )
    check_not_offloaded(block, f"a {name}")
    if any(is_peft_wrapper(module) for module in block.modules()):
        raise ValueError(f"this {name} has PEFT adapters, which would be lost in the conversion; merge them first")
    for attribute in BLOCK_ATTRIBUTES["jitter"]:
        for holder in (block, find_attribute(block, *BLOCK_ATTRIBUTES["router"])):
            if getattr(holder, attribute, None):
                raise ValueError(
                    f"{name} has {attribute}={getattr(holder, attribute)}, which also perturbs the inputs to its "
                    "experts; no gate supports this, so set it to 0"
                )
    return ParsedBlock(block, recipe, balance_over, **coefs)
