"""Converts sparse blocks to `MoE` layers with `from_transformers`, and back with `to_transformers`. Both functions also
accept whole models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixture_of_experts.gating import get_side_inputs
from mixture_of_experts.gating.overrides import STATE
from mixture_of_experts.huggingface.blocks.block_classes import BLOCK_ATTRIBUTES
from mixture_of_experts.huggingface.blocks.block_settings import find_attribute, find_recipe
from mixture_of_experts.huggingface.blocks.convert import (
    check_same_computation,
    convert_to_layer,
    copy_to_block,
    read_block,
)
from mixture_of_experts.huggingface.feed_forward import (
    MoEFeedForward,
    SparseFeedForward,
    find_layers,
    get_named_tensors,
)
from mixture_of_experts.huggingface.model_watch import remove_model_watches, uses_model_mask
from mixture_of_experts.huggingface.private_transformers import (
    copy_output_capturing,
    has_recorded_logits,
    is_from_gguf,
    save_stock_names,
)
from mixture_of_experts.huggingface.replacement.dense_ffn import (
    check_not_offloaded,
    check_not_on_meta,
    check_not_packed,
    check_not_wrapped,
)
from mixture_of_experts.huggingface.replacement.network_search import has_experts
from mixture_of_experts.huggingface.replacement.replace import register_layers, replace_module
from mixture_of_experts.huggingface.router_config import override_router_coef, restore_router_config
from mixture_of_experts.huggingface.saving.configuration import remove_layers_from_config
from mixture_of_experts.huggingface.saving.engine_folders import save_as_own_class, save_for_engines
from mixture_of_experts.moe import MoE
from mixture_of_experts.support.checks import check_model

LOSS_ARGUMENTS = ("balance_over", "loss_coef", "z_loss_coef", "loss_coefs")


def from_transformers(
    block: nn.Module, *, loss_coef: float | None = None, z_loss_coef: float = 0.0, balance_over: Any = "batch"
) -> Any:
    """Convert a `transformers` sparse block, or every sparse block in a model, to an equivalent `MoE`.

    docs/published_mixtures.md lists the supported blocks and the unsupported features. In Gemma 4, the decoder layer
    itself holds the router and the experts, so the `MoE` takes the decoder layer's feed-forward input and returns the
    experts' output before it is added to the dense network's output.

    If `block` is a model, this function replaces its sparse blocks in place, one at a time, and returns the model. The
    model can be trained as before. If `output_router_logits=True` is set in the configuration or passed as an argument,
    the model returns router logits and adds its own auxiliary loss, scaled by the coefficient in the configuration, to
    its loss. If `loss_coef` is passed, the layers' losses replace the model's auxiliary loss, as they do after
    `replace_ffn`. All losses and statistics ignore padding. The converted model can be saved and loaded like any other.
    The layers' weights are new tensors, so construct the optimizer after the conversion. To restore the stock model,
    call `to_transformers`.

    Args:
        block: a sparse block of a loaded model, such as `model.model.layers[0].mlp`, or a whole model.
        loss_coef: coefficient of each layer's load-balancing loss, which replaces the model's own auxiliary loss. If
            `loss_coef` is None, the layers add no load-balancing loss, and the model keeps its own auxiliary loss.
        z_loss_coef: coefficient of each layer's z-loss.
        balance_over: see `TopKGating`. The default matches `transformers`, which computes the loss over the batch.

    Raises:
        TypeError: `block` is not a module.
        ValueError: the block's class is unknown, or the block is a wrapper, has PEFT adapters, or uses jitter (which in
            `transformers` also perturbs the experts' inputs). For a model, this error is raised if any of its blocks
            has such a problem or if its weights are quantized. The model is then left unchanged.

    Example:
        >>> import torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> from mixture_of_experts.huggingface import from_transformers
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
        >>> block, x = model.model.layers[0].mlp, torch.randn(2, 5, 32)
        >>> moe = from_transformers(block)
        >>> torch.testing.assert_close(moe(x)[0], block(x))
        >>> type(from_transformers(model).model.layers[0].mlp.moe).__name__
        'MoE'
    """
    settings = dict(loss_coef=loss_coef, z_loss_coef=z_loss_coef, balance_over=balance_over)
    check_not_wrapped(check_model("block", block))
    if not isinstance(block, PreTrainedModel):
        return convert_to_layer(block, **layer_settings(settings))
    replace_blocks(block, dict.fromkeys(find_sparse_blocks(block), settings))
    if loss_coef is not None:
        override_router_coef(block)
    block.name_or_path = block.config.name_or_path  # record the source of these weights
    return block


def to_transformers(moe: Any, block: nn.Module | None = None) -> Any:
    """Copy the weights of an `MoE` into an equivalent `transformers` sparse block, and return the block.

    If `block` is omitted, `moe` must be a model converted by `from_transformers`. The model is converted back to a
    stock model in place and returned. A round trip through `from_transformers` and `to_transformers` reproduces a
    block's weights bit for bit.

    Args:
        moe: the `MoE` layer, or the model to convert back.
        block: a sparse block with the same dimensions and settings as the layer.

    Raises:
        TypeError: `moe` or `block` is not a module, or `block` is passed and `moe` is not an `MoE`.
        ValueError: the block's class is unknown, the block is not equivalent to the layer, or weights are on the meta
            device. Also raised for a model that is a wrapper or that contains layers from `replace_ffn` or `upcycle`.
            Nothing is changed in these cases.
    """
    check_not_wrapped(check_model("moe", moe))
    if block is not None:
        if not isinstance(moe, MoE):
            raise TypeError(
                f"expected `moe` to be an MoE, but got a {type(moe).__name__}; pass its `moe` attribute, or omit "
                "`block`"
            )
        check_not_on_meta(moe, "moe")
        check_not_on_meta(check_model("block", block), "block")
        return copy_to_block(moe, block)
    if not isinstance(moe, PreTrainedModel):
        raise ValueError(
            f"expected a transformers model because `block` is None, but got a {type(moe).__name__}; pass `block` to "
            "convert a layer"
        )
    return restore_stock_blocks(moe)


def find_sparse_blocks(model: PreTrainedModel) -> list[str]:
    """Return the paths of all sparse blocks of a model. Raise ValueError if there are no blocks or any block is
    unsupported."""
    check_not_packed(model)
    if getattr(model, "is_quantized", False) and not is_from_gguf(model):
        raise ValueError(f"{type(model).__name__} is quantized; load it without quantization_config")
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{above}.") for above in found):
            continue
        if isinstance(module, MoEFeedForward):
            found.append(name)  # the search skips the submodules of modules in `found`
        elif find_recipe(module) is not None:
            if hasattr(module, "self_attn"):  # Gemma 4
                raise_not_convertible(model, name, "is a whole decoder layer that also holds the router and experts")
            read_block(module)
            found.append(name)
        elif has_experts(module) and name:
            raise_not_convertible(model, name, "has an unknown class")
    found = [name for name in found if not isinstance(model.get_submodule(name), MoEFeedForward)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no sparse blocks; use upcycle or replace_ffn for dense models")
    return found


def raise_not_convertible(model: nn.Module, name: str, why: str) -> NoReturn:
    kind = type(model.get_submodule(name)).__name__
    raise ValueError(
        f"{type(model).__name__} cannot be converted as a whole, because {kind} at {name} {why}; convert the supported "
        "blocks (see huggingface.blocks.block_classes) individually"
    )


@torch.inference_mode(False)  # tensors created in inference mode cannot be trained
def replace_blocks(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace sparse blocks with `MoE` layers, one at a time. `settings` contains each layer's loss coefficients, keyed
    by path."""
    for name, coefs in settings.items():
        block = model.get_submodule(name)
        moe = convert_to_layer(block, **layer_settings(coefs))
        masked, path = uses_model_mask(model, name), find_router_path(block)
        # stateful routers do not report their logits
        reports = has_recorded_logits(model, block) and STATE not in get_side_inputs(moe.gate)
        with next(moe.parameters()).device:
            layer = SparseFeedForward(moe, type(block).__name__, reports, masked=masked, replaced_path=path)
        replace_module(model, block, layer.train(block.training))
    register_layers(model, list(settings))
    save_as_own_class(model)


def layer_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Select a layer's loss arguments from `given`. If `loss_coef` is missing or None, the load-balancing loss is
    disabled."""
    settings = {name: given[name] for name in LOSS_ARGUMENTS if name in given}
    return settings | ({"loss_coef": 0.0} if given.get("loss_coef") is None else {})


def find_router_path(block: nn.Module) -> str:
    """Return the path of the module that holds the router's weight matrix, or "" if the block has no such matrix."""
    paths = [f"{router}.{weight}" for router in BLOCK_ATTRIBUTES["router"] for weight in BLOCK_ATTRIBUTES["weight"]]
    return next((path.rpartition(".")[0] for path in paths if isinstance(find_attribute(block, path), Tensor)), "")


# Conversion back


@torch.inference_mode(False)  # tensors created in inference mode cannot be trained
def restore_stock_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a model's `MoE` layers with stock blocks, and remove everything that `from_transformers` added."""
    plan = plan_stock_model(model)
    for name, layer in plan.layers.items():
        block = plan.stock_model.get_submodule(name)
        copy_to_block(layer.moe, materialize_block(block, layer.moe))
        replace_module(model, layer, block.train(layer.training))
    remove_model_watches(model)
    restore_router_config(model)
    for module in model.modules():
        remove_layers_from_config(vars(module).get("config"))
        save_stock_names(module)
    save_for_engines(model, model.config.name_or_path or "")
    return model


class StockPlan(NamedTuple):
    """A plan for converting a model back to a stock model. It contains the stock model on the meta device, and the
    layers to convert to sparse blocks, keyed by path."""

    stock_model: Any
    layers: Mapping[str, Any]

    def convert_layer(self, path: str) -> dict[str, Tensor]:
        """Convert the layer at `path`, and return the block's weights, keyed by their names in the stock model."""
        return copy_to_block_state(self.layers[path].moe, self.stock_model, path)

    def convert_rest(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights outside the layers, which are the same in both models."""
        return state


def plan_stock_model(model: PreTrainedModel) -> StockPlan:
    """Plan the conversion of a model back to a stock model, without reading weights. Raise ValueError if the model
    cannot be converted."""
    layers = find_layers(model)
    others = any(not isinstance(layer, SparseFeedForward) for layer in layers.values())
    if not layers or others:
        why = "has layers from replace_ffn or upcycle" if others else "has no layer that replaced a block"
        raise ValueError(
            f"{type(model).__name__} {why}; only models converted by from_transformers can be converted back"
        )
    stock = make_meta_stock_model(model)
    for name, layer in layers.items():
        check_not_offloaded(layer, name)
        check_same_computation(layer.moe, stock.get_submodule(name))
    return StockPlan(stock, layers)


def plan_stock_export(model: PreTrainedModel) -> StockPlan:
    """Like `plan_stock_model`, but copy the configuration, so that the stock model can be saved separately."""
    plan = plan_stock_model(model)
    stock = plan.stock_model
    stock.config = copy.deepcopy(model.config)
    remove_layers_from_config(stock.config)
    restore_router_config(stock)
    return plan


@torch.inference_mode(False)  # tensors created in inference mode cannot be trained
def copy_to_block_state(moe: MoE, stock_model: Any, path: str) -> dict[str, Tensor]:
    """Return a layer's weights, keyed by their names in the stock model. The stock model remains on the meta device."""
    block = stock_model.get_submodule(path)
    copy_to_block(moe, materialize_block(block, moe))
    state = block.state_dict(prefix=f"{path}.")
    block.to("meta")
    return state


def make_meta_stock_model(model: PreTrainedModel) -> Any:
    """Build the stock counterpart of a model on the meta device, using the model's own configuration."""
    config: Any = model.config
    kind, held = type(config), dict(vars(config))
    remove_layers_from_config(config)
    try:
        with torch.device("meta"):
            stock = type(model)(config)
    finally:
        config.__class__ = kind
        vars(config).update(held)
    copy_output_capturing(stock, model)
    return stock


@torch.inference_mode(False)  # tensors created in inference mode cannot be trained
def materialize_block(block: nn.Module, moe: MoE) -> nn.Module:
    """Move a block from the meta device to the layer's device. Each of the block's weights takes its dtype from the
    layer's corresponding weight, and is frozen if that weight is frozen."""
    own = get_named_tensors(moe)
    block.to(next(moe.experts.parameters()).dtype).to_empty(device=next(moe.parameters()).device)
    for weight in get_named_tensors(block).values():
        weight.data.zero_()  # some of the block's weights have no counterpart in a layer
    for name, pieces in read_block(block).get_weight_views().items():
        for piece in pieces:
            weight = piece if piece._base is None else piece._base
            weight.data = weight.data.to(own[name].dtype)
            weight.requires_grad_(weight.requires_grad and own[name].requires_grad)
    return block
