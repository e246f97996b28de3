"""Converts sparse blocks of `transformers` to `MoE` layers, and back: the same weights in another layout.

A block's recipe in `recipes.MODELS`, and its attributes named in `recipes.KEEPS`, tell what it computes.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.huggingface.blocks.block_experts import BlockExperts, Pieces
from mixture_of_experts.huggingface.blocks.block_router import make_gate, router_views
from mixture_of_experts.huggingface.replacement.adapters import refuse_offloaded
from mixture_of_experts.moe import MoE
from mixture_of_experts.recipes import BLOCKS, KEEPS
from mixture_of_experts.support.private_torch import from_peft
from mixture_of_experts.whole_model.block_settings import BlockSettings, recipe_of

COMPARED = ("k", "score", "select", "weigh", "normalize", "eps", "scale", "num_groups", "top_groups")
COMPARED += (
    "group_score",
    "tolerance",
    "logits",
    "capacity_factor_train",
    "capacity_factor_eval",
    "min_expert_capacity",
)
REFUSED = {
    "use_eda": "reads the state of the router of the layer before",
}


def to_layer(block: nn.Module, balance_over: Any, **coefs: Any) -> MoE:
    """A `MoE` that computes what a block does, with copies of its weights; frozen ones are frozen."""
    read = read_block(block)
    with torch.enable_grad():  # views tell what is frozen
        moe, views = read.layer(balance_over, **coefs), read.views()
    wanted = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
    state = {name: joined(pieces, wanted[name]) for name, pieces in views.items()}
    if "gate.expert_bias" in state:
        state["gate.expert_bias"] = state["gate.expert_bias"].float()  # it moves by small steps
        state["gate.expert_counts"] = torch.zeros_like(state["gate.expert_bias"], dtype=torch.int64)
    moe.load_state_dict(state, assign=True)  # keeps the block's dtypes and device
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(any(piece.requires_grad for _, piece in views[name]))
    return moe.train(block.training)


@torch.no_grad()
def to_block(moe: MoE, block: nn.Module) -> nn.Module:
    """Copy the weights of a layer into a block that computes the same; return the block."""
    check_alike(moe, block)
    own = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
    for name, pieces in read_block(block).views().items():
        for index, view in pieces:
            view.copy_(own[name][index])
    return block


def check_alike(moe: MoE, block: nn.Module) -> None:
    """Raise ValueError if a layer computes something else than a block."""
    read = read_block(block)
    like, theirs = read.layer(), read.views()
    differ = differences(moe, like)
    own = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
    own.pop("gate.expert_counts", None)
    wanted = {**dict(like.named_parameters()), **dict(like.named_buffers())}
    for name in sorted(own.keys() | theirs.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (own, wanted)]
        if shapes[0] != shapes[1]:
            differ.append(f"{name} has shape {shapes[0]} in the layer and {shapes[1]} in the block")
    if differ:
        raise ValueError(f"the layer does not compute what a {type(block).__name__} does: " + "; ".join(differ))


def differences(moe: MoE, wanted: MoE) -> list[str]:
    """The settings in which the layer differs from `wanted`, the block as a layer, in words."""

    def setting(gate: nn.Module, name: str) -> str:
        there = name != "num_groups" or closes_groups(gate)
        return repr(getattr(gate, name, None) if there else None)

    compared = set(COMPARED) - without_effect(moe.gate) - without_effect(wanted.gate)
    kinds = [type(gate).__name__ for gate in (moe.gate, wanted.gate)]
    differ = [] if kinds[0] == kinds[1] else [f"the gate is a {kinds[0]}, the block's a {kinds[1]}"]
    differ += [
        f"the gate has {name}={setting(moe.gate, name)}, the block {setting(wanted.gate, name)}"
        for name in COMPARED
        if name in compared and setting(moe.gate, name) != setting(wanted.gate, name)
    ]
    ours, theirs = innermost(moe.experts), innermost(wanted.experts)
    act, wanted_act = getattr(ours, "act", None), getattr(theirs, "act", None)
    if repr(act) != repr(wanted_act):
        differ.append(f"the experts have the activation {act}, the block {wanted_act}")
    kinds = [[type(part).__name__ for part in layers(experts)] for experts in (moe.experts, wanted.experts)]
    if kinds[0] != kinds[1]:
        differ.append(f"the experts are {' around '.join(kinds[0])}, the block's {' around '.join(kinds[1])}")
    return differ


def closes_groups(gate: Any) -> bool:
    """Whether a token may not choose from all expert groups of a gate."""
    return getattr(gate, "num_groups", None) not in (None, getattr(gate, "top_groups", None))


def without_effect(gate: Any) -> set[str]:
    """The settings that do nothing beside the gate's other settings."""
    found = set() if closes_groups(gate) else {"top_groups", "group_score"}
    found |= set() if getattr(gate, "normalize", False) else {"eps"}
    dropless = getattr(gate, "capacity_factor_train", 0.0) is None and gate.capacity_factor_eval is None
    return found | ({"min_expert_capacity"} if dropless else set())


def layers(experts: nn.Module) -> Iterator[nn.Module]:
    """The experts, then those inside them, from the outermost to the innermost."""
    yield experts
    if isinstance(inner := getattr(experts, "experts", None), nn.Module):
        yield from layers(inner)


def innermost(experts: nn.Module) -> nn.Module:
    return list(layers(experts))[-1]


def joined(pieces: Pieces, like: Tensor) -> Tensor:
    """The pieces as one tensor like `like`, with memory of its own."""
    (index, first), *rest = pieces
    if index is Ellipsis and not rest:
        return first.detach().clone(memory_format=torch.contiguous_format)
    whole = torch.zeros(like.shape, dtype=first.dtype, device=first.device)
    for index, piece in pieces:
        whole[index] = piece.detach()
    return whole


class ReadBlock(NamedTuple):
    """The settings and the experts of a block."""

    router: BlockSettings
    experts: BlockExperts

    def layer(self, balance_over: Any = "batch", **coefs: Any) -> MoE:
        """A layer with the block's sizes and settings. Weights that are copied one by one are on the meta device."""
        gate, (experts, shared) = make_gate(self.router, balance_over), self.experts.module()
        return MoE(gate.dim, gate.num_experts, gate=gate, experts=experts, shared_expert=shared, **coefs)

    def views(self, of: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Pieces]:
        """The block's weights by this package's names and in its layout; or what `of` returns for each of them."""
        return {**router_views(self.router, of), **self.experts.views(of)}


def read_block(block: nn.Module) -> ReadBlock:
    """Read a block; raise ValueError if it is unknown, or does something that no layer does."""
    name, recipe = type(block).__name__, recipe_of(block)
    if recipe is None:
        raise ValueError(
            f"a {name} is not known: recipes.BLOCKS has the {len(BLOCKS)} known classes, such as DeepseekV3MoE, "
            "GptOssMLP and MixtralSparseMoeBlock"
        )
    refuse_offloaded(block, f"a {name}")
    if any(from_peft(module) for module in block.modules()):
        raise ValueError(f"a {name} has adapters of PEFT, which a layer would lose: merge them first")
    settings = BlockSettings(block, recipe)
    for attribute, reason in REFUSED.items():
        if getattr(block, attribute, False) or getattr(settings.router, attribute, False):
            raise ValueError(f"{name} {reason}, which no gate gets")
    for attribute in KEEPS["jitter"]:
        for holder in (block, settings.router):
            if getattr(holder, attribute, None):
                raise ValueError(
                    f"{name} has {attribute}={getattr(holder, attribute)}, which disturbs what its experts read too, "
                    "as no gate does: set it to 0"
                )
    return ReadBlock(settings, BlockExperts(settings))
