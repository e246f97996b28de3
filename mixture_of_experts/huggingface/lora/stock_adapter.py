"""Reads the adapter of a stock model or of a model with `MoE` layers as an adapter of the equivalent stock model.

Axes: e (experts), d (model dimension), h (hidden dimension), k (rank).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import layer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from mixture_of_experts.huggingface.blocks.block_layer import ParsedBlock
from mixture_of_experts.huggingface.blocks.convert import read_block
from mixture_of_experts.huggingface.blocks.model_conversion import find_sparse_blocks, make_meta_stock_model
from mixture_of_experts.huggingface.feed_forward import (
    MoEFeedForward,
    Replaced,
    SparseFeedForward,
    find_layers,
    get_named_tensors,
)
from mixture_of_experts.huggingface.private_peft import is_plain_lora, read_stack_factors, strip_wrappers
from mixture_of_experts.huggingface.replacement.dense_ffn import split_gate_up
from mixture_of_experts.huggingface.saving.exporting import plan_export

LowRankUpdate = tuple[Tensor, Tensor]  # two factors whose product is added to a weight; (B, A) for linear layers


@dataclass
class StockAdapter:
    """A LoRA adapter for a stock model. The updates include the scaling factors."""

    model: Any  # the stock model on the meta device
    linear: dict[str, LowRankUpdate] = field(default_factory=dict)  # B `(out, k)` and A `(k, in)`, keyed by path
    #: factors `(e, in, k)` and `(e, k, out)` of the updates of w1, w3 and w2, keyed by the experts' path
    experts: dict[str, dict[str, LowRankUpdate]] = field(default_factory=dict)
    # state dicts of fully trained modules, keyed by path
    whole_modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    blocks: dict[str, ParsedBlock] = field(default_factory=dict)  # blocks, keyed by the path of their experts

    def first_weight(self, path: str) -> str:
        """Return the name of the weight that contains w1 and, for gated experts, w3. `path` is the path of the
        experts."""
        return "gate_up_proj" if hasattr(self.blocks[path].experts, "gate_up_proj") else "up_proj"

    def gate_up_order(self, path: str) -> Any:
        return "gate_up" if getattr(self.blocks[path].experts, "is_concatenated", True) else "interleaved"


def read_adapter(model: Any, adapter: str) -> StockAdapter:
    """Read an adapter of a `PeftModel`. Raise ValueError if any part of the adapter has no counterpart in the stock
    model."""
    plain = copy_to_meta(model).unload()
    layers = find_layers(plain)
    found = StockAdapter(make_stock_model(plain, layers))
    for name, module in model.get_base_model().named_modules():
        path = strip_wrappers(name)
        if isinstance(module, layer.LoraLayer) and adapter in {*module.lora_A, *module.lora_embedding_A}:
            if not is_plain_lora(module, adapter):
                raise ValueError(
                    f"{path} uses a LoRA option, such as DoRA or biases, but only the matrices A and B can be saved"
                )
            if isinstance(module, layer.ParamWrapper):
                add_expert_update(found, layers, path, module, adapter)
            else:
                add_linear_update(found, layers, path, module, adapter)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            add_whole_module(found, layers, path, module, adapter)
    return found


def copy_to_meta(model: nn.Module) -> Any:
    """Return a copy of a model on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    memo |= {id(weight): nn.Parameter(memo[id(weight)], requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, memo)


def make_stock_model(plain: Any, layers: Mapping[str, MoEFeedForward]) -> Any:
    """Return the equivalent stock model on the meta device, given a model without adapters.

    This is the model that `to_transformers` or `export` would return, or the model itself if it has no `MoE` layers.
    """
    if not layers:
        return plain
    if all(isinstance(module, SparseFeedForward) for module in layers.values()):
        return make_meta_stock_model(plain)
    return plan_export(plain).stock_model


def split_layer_path(layers: Mapping[str, MoEFeedForward], path: str) -> tuple[str | None, str]:
    """Split a module's path into the path of the layer that contains it and the module's path within that layer. Return
    (None, path) if no layer contains the module."""
    found = next((name for name in layers if path.startswith(f"{name}.")), None)
    return found, path if found is None else path.removeprefix(f"{found}.")


def add_expert_update(
    found: StockAdapter, layers: Mapping[str, MoEFeedForward], path: str, wrapper: Any, adapter: str
) -> None:
    """Add the update of a stacked expert weight to `found`."""
    name, (left, right) = wrapper.parameter_name, read_stack_factors(wrapper, adapter)
    left, right = left.detach(), right.detach()
    layer_path, _ = split_layer_path(layers, path)
    if layer_path is None:
        experts = add_block(
            found, next((p for p in find_sparse_blocks(found.model) if f"{path}.".startswith(f"{p}.")), path)
        )
        if not found.blocks[experts].is_transposed:
            left, right = right.mT, left.mT
        updates = dict(split_stock_update(found, experts, name, left, right))
    else:
        experts = add_block(found, layer_path)
        updates = {name: (left, right)} if name in ("w1", "w3", "w2") else {}
    e = len(found.blocks[experts].experts.down_proj)
    if not updates or len(left) != e:
        raise ValueError(
            f"{path}.{name} of shape {tuple(wrapper.get_param().shape)} has an adapter, but the {e} experts at "
            f"{experts} in {type(found.model).__name__} have no corresponding weight"
        )
    found.experts.setdefault(experts, {}).update(updates)


def split_stock_update(
    found: StockAdapter, path: str, name: str, left: Tensor, right: Tensor
) -> Iterator[tuple[str, LowRankUpdate]]:
    """Split the update of a stock model's stacked weight into updates of w1, w3 and w2."""
    if name == "down_proj":
        yield "w2", (left, right)
    elif name == "up_proj":
        yield "w1", (left, right)
    elif name == "gate_up_proj":
        gate, up = split_gate_up(right, found.gate_up_order(path))
        yield "w1", (left, gate)
        yield "w3", (left, up)


def add_block(found: StockAdapter, path: str) -> str:
    """Add the sparse block at `path` to `found`, and return the path of its stacked experts."""
    block = found.model.get_submodule(path)
    parsed = read_block(block)
    name = next(name for name, module in block.named_modules() if module is parsed.experts)
    weights = ("gate_up_proj", "up_proj")
    if not (hasattr(parsed.experts, "down_proj") and any(hasattr(parsed.experts, weight) for weight in weights)):
        raise ValueError(
            f"the experts of a {type(block).__name__} are not stacked as {' or '.join(weights)} and down_proj, so PEFT "
            "cannot adapt them; call merge_and_unload() and save the whole model"
        )
    experts = f"{path}.{name}" if name else path
    found.blocks[experts] = parsed
    return experts


def add_linear_update(
    found: StockAdapter, layers: Mapping[str, MoEFeedForward], path: str, wrapper: Any, adapter: str
) -> None:
    """Add the update of a linear layer to `found`. The linear layer must not be inside an `MoE` layer."""
    layer_path, _ = split_layer_path(layers, path)
    theirs = dict(found.model.named_modules()).get(path)
    if layer_path is not None or not isinstance(theirs, nn.Linear) or adapter not in wrapper.lora_A:
        raise ValueError(
            f"{path} has an adapter, but {type(found.model).__name__} has no equivalent linear layer; adapt only "
            "experts and attention, or call merge_and_unload() and save the whole model"
        )
    b = wrapper.lora_B[adapter].weight.detach() * wrapper.scaling[adapter]
    found.linear[path] = b, wrapper.lora_A[adapter].weight.detach()


def add_whole_module(
    found: StockAdapter, layers: Mapping[str, MoEFeedForward], path: str, wrapper: Any, adapter: str
) -> None:
    """Add a module in `modules_to_save` to `found`. If the module is a gate, it is converted to the block's router.
    Otherwise, it must not be inside an `MoE` layer."""
    trained = wrapper.modules_to_save if isinstance(wrapper, ModulesToSaveWrapper) else {}
    if isinstance(wrapper, ModulesToSaveWrapper) and adapter not in trained:
        return
    if adapter in trained and isinstance(trained[adapter], Replaced):  # a replaced module computes nothing
        return
    layer_path, inner = split_layer_path(layers, path)
    if layer_path is not None and inner == "moe.gate" and adapter in trained:
        router, state = convert_gate(found.model.get_submodule(layer_path), trained[adapter])
        found.whole_modules[f"{layer_path}.{router}"] = state
    elif layer_path is None and adapter in trained:
        found.whole_modules[path] = {name: value.detach() for name, value in trained[adapter].state_dict().items()}
    else:
        raise ValueError(f"{path} is a {type(wrapper).__name__}, which has no counterpart in the stock model")


@torch.no_grad()
def convert_gate(block: nn.Module, gate: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Convert a gate's state to the state of a block's router. The block is on the meta device. Return the router's
    path and its state."""
    block, own = copy.deepcopy(block), get_named_tensors(gate)
    path = find_router(block)
    for tensor in get_named_tensors(block.get_submodule(path).to_empty(device="cpu").double()).values():
        tensor.zero_()
    names = {id(tensor): name for name, tensor in get_named_tensors(block).items()}
    state = {}
    for name, pieces in read_block(block).get_router_weights().items():
        for view, part in zip(pieces, own[name].split(list(map(len, pieces))), strict=True):
            whole = get_whole_tensor(view.copy_(part))
            if id(whole) in names:  # skip the empty bias of always-chosen experts
                state[names[id(whole)].removeprefix(f"{path}.")] = whole.detach().to(own[name].dtype)
    return path, state


def find_router(block: nn.Module) -> str:
    """Return the path of the module that contains all weights of a block's router. Raise ValueError if there is no such
    module."""
    views = [view for pieces in read_block(block).get_router_weights().values() for view in pieces if len(view)]
    names = {id(tensor): name for name, tensor in get_named_tensors(block).items()}
    paths = {names[id(get_whole_tensor(view))].rpartition(".")[0] for view in views}
    path = next(iter(paths))
    if len(paths) > 1 or not path:
        raise ValueError(
            f"{type(block).__name__} does not keep its router weights in a single module, so an adapter cannot store "
            "them; call merge_and_unload() and save the whole model"
        )
    return path


def get_whole_tensor(view: Tensor) -> Tensor:
    return view if view._base is None else view._base
