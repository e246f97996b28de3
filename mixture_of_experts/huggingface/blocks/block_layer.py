"""Builds an `MoE` layer from a `transformers` sparse block, and maps the block's weights to this package's names.

Axes: d (model dimension), h (hidden dimension), e (experts).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.experts import Experts, GatedExperts
from mixture_of_experts.gating import HashGating, RouterLogits, TopKGating
from mixture_of_experts.gating.steps import LearnedScale
from mixture_of_experts.huggingface.blocks.block_classes import BLOCK_ATTRIBUTES
from mixture_of_experts.huggingface.blocks.block_settings import BlockSettings, find_attribute
from mixture_of_experts.huggingface.feed_forward import get_named_tensors
from mixture_of_experts.huggingface.replacement.dense_ffn import read_activation, split_gate_up
from mixture_of_experts.moe import MoE
from mixture_of_experts.ops import ClampedGLU, ClampedSwiGLU
from mixture_of_experts.wrappers import (
    GatedSharedExpert,
    InputWeightedExperts,
    LatentExperts,
    NormedExperts,
    Scale,
    Shift,
    ZeroComputationExperts,
)

# writable views of block weights, which form one of our weights when concatenated along dimension 0
WeightViews = list[Tensor]


class ParsedBlock(BlockSettings):
    """A sparse block and the equivalent `MoE` layer.

    Attributes:
        layer: a layer with the same dimensions and settings as the block. The layer shares any of the block's modules
            that an `MoE` can use unchanged. All of its other weights are on the meta device.
    """

    def __init__(self, block: nn.Module, recipe: str, balance_over: Any = "batch", **coefs: Any) -> None:
        super().__init__(block, recipe)
        self.experts: Any = self.read_attribute("experts")
        with torch.device("meta"):  # the weights are copied, so they need no initialization
            gate = self.make_gate(balance_over)
            self.stack: Any = self.make_stack()
        experts, shared = self.wrap_experts(self.stack)
        self.layer: MoE = MoE(gate.dim, gate.num_experts, gate=gate, experts=experts, shared_expert=shared, **coefs)

    # the layer

    def make_gate(self, balance_over: Any) -> Any:
        e, settings, kind = self.num_weighted_experts, self.gate_arguments(), self.recipe.gate_class
        if self.recipe.logits is not None:
            settings["logits"] = RouterLogits(self.dim, e, **self.logits_arguments())
        if self.has_router_network:
            settings |= dict(state_dim=self.router.router_hidden_size, first=not self.router.use_eda)
            settings["logits"] = self.router.router_mlp
        if self.recipe.scales is not None:
            settings["weigh"] = LearnedScale(e if self.recipe.scales == "expert" else 1)
        if issubclass(kind, TopKGating):
            settings["balance_over"] = balance_over
        if self.experts_of_id is not None:
            kind, settings["num_ids"] = HashGating, len(self.experts_of_id)
        return kind(self.dim, e, **settings)

    def make_stack(self) -> Any:
        """Return the stacked experts."""
        weights = self.get_expert_weights()
        e, (d, h) = sum(map(len, weights["w1"])), weights["w1"][0].shape[1:]
        kind: Any = GatedExperts if "w3" in weights else Experts
        stack = kind(d, e, h, self.make_expert_activation(), bias="b1" in weights)
        stack.is_transposed = True  # PEFT reads this attribute; True means that weights are (e, in, out)
        return stack

    def make_expert_activation(self) -> Any:
        """Return the activation of the stacked experts."""
        experts = self.experts
        limit, alpha = (
            find_attribute(experts, *BLOCK_ATTRIBUTES["limit"]),
            find_attribute(experts, *BLOCK_ATTRIBUTES["alpha"]),
        )
        if isinstance(experts, nn.ModuleDict):
            one: Any = next(iter(experts.values()))
            act = read_activation(one.act)
            return act if not one.dropout.p else nn.Sequential(act, copy.deepcopy(one.dropout))
        if alpha is not None:
            return ClampedSwiGLU(alpha, limit)
        activation_path = self.expert_attributes.get("activation", "experts.act_fn")
        act = find_attribute(self.module, activation_path, "experts.mlp.activation_fn")
        act = nn.SiLU() if act is None else read_activation(act)
        if limit is not None:
            return ClampedGLU(act, limit, after=bool(self.recipe.experts.get("after")))
        return copy.deepcopy(act)

    def wrap_experts(self, experts: Any) -> tuple[nn.Module, nn.Module | None]:
        """Return the wrapped experts and the shared expert. The shared expert is None if the block has no shared expert
        or if a wrapper contains it."""
        if (norm := find_attribute(self.experts, "post_expert_norm")) is not None:
            experts = NormedExperts(experts, norm)
        if self.recipe.apply_router_weight_on_input:
            experts = InputWeightedExperts(experts)
        num_identity = find_attribute(self.experts, "zero_expert_num") or 0
        if num_identity or self.recipe.zero:
            experts = ZeroComputationExperts(experts, num_identity=num_identity, num_zero=self.recipe.zero)
        parts: dict[str, Any] = dict(
            before=self.chain_modules("before", "before_norm"), after=self.chain_modules("after")
        )
        shared, last = self.make_shared_expert(), self.read_attribute("last")
        if last is not None:
            parts |= dict(beside=shared, after=last)
            shared = None
        if any(part is not None for part in parts.values()):
            experts = LatentExperts(experts, **parts)
        vector = find_attribute(self.module, *BLOCK_ATTRIBUTES["shift"])
        if isinstance(vector, nn.Parameter):  # the block adds this vector to the experts' output
            shift = Shift(len(vector))
            shift.bias = vector
            experts = LatentExperts(experts, after=shift)
        return experts, shared

    def make_shared_expert(self) -> nn.Module | None:
        shared, gate = self.read_attribute("shared"), self.read_attribute("shared_gate")
        if shared is None or self.num_always_chosen:
            return None
        shared = shared if gate is None else GatedSharedExpert(shared, gate)
        return nn.Sequential(shared, Scale(0.5)) if self.averages_shared_expert else shared

    def chain_modules(self, *parts: str) -> nn.Module | None:
        """Chain the modules named by `parts` into a single module. Return None if there are no such modules or all of
        them are identities."""
        modules = [self.read_attribute(part) for part in parts]
        modules = [module for module in modules if not isinstance(module, nn.Identity | None)]
        return nn.Sequential(*modules) if len(modules) > 1 else next(iter(modules), None)

    # the weights

    def get_weight_views(self) -> dict[str, WeightViews]:
        """Return views of the block's weights, with the names and layout that this package uses."""
        block = {id(tensor) for tensor in get_named_tensors(self.module).values()}
        found = {name: [tensor] for name, tensor in get_named_tensors(self.layer).items() if id(tensor) in block}
        path = next(name for name, module in self.layer.named_modules() if module is self.stack)
        found |= {f"{path}.{name}": pieces for name, pieces in self.get_expert_weights().items()}
        return found | {f"gate.{name}": pieces for name, pieces in self.get_router_weights().items()}

    def get_router_weights(self) -> dict[str, WeightViews]:
        found: dict[str, Any] = {
            "b_gating": self.router_bias,
            "experts_of_id": self.experts_of_id,
            "weigh.scale": self.read_attribute("scales"),
            "state_scale": find_attribute(self.router, "router_states_scale"),
        }
        if self.router_weight is not None:
            found["w_gating" if self.recipe.logits is None else "logits.weight"] = self.router_weight.T
        if "norm_eps" in (self.recipe.logits or {}):
            found["logits.norm_weight"] = self.read_attribute("norm_weight")
        if self.has_router_network:
            found |= {f"down.{name}": tensor for name, tensor in self.router.down_proj.named_parameters()}
        pieces: dict[str, WeightViews] = {name: [tensor] for name, tensor in found.items() if tensor is not None}
        if self.expert_bias is not None:
            bias = self.expert_bias.flatten()
            pieces["expert_bias"] = [bias, bias.new_zeros(self.num_always_chosen)]
        return pieces

    def get_expert_weights(self) -> dict[str, WeightViews]:
        """Return views of the stacked expert weights, keyed by name."""
        experts = self.experts
        if isinstance(experts, nn.ModuleDict):
            networks: Any = experts.values()
            return {
                "w1": [one.wi.weight.T[None] for one in networks],
                "w2": [one.wo.weight.T[None] for one in networks],
            }
        if hasattr(experts, "mlp"):  # each weight concatenates the weights of all experts along dimension 0
            mlp = experts.mlp
            w1, w3, w2 = (weight.unflatten(0, (experts.num_experts, -1)) for weight in (mlp.w1, mlp.v1, mlp.w2))
            return {"w1": [w1.mT], "w3": [w3.mT], "w2": [w2]}
        found = self.get_stacked_weights()
        if self.num_always_chosen:
            shared = self.module.shared_experts
            for name, theirs in (("w1", shared.gate_proj), ("w3", shared.up_proj), ("w2", shared.down_proj)):
                found[name].append(theirs.mT)
        return found

    @property
    def is_transposed(self) -> bool:
        """Whether the stacked weights have the shape `(e, in, out)` rather than `(e, out, in)`."""
        return bool(getattr(self.experts, "is_transposed", self.recipe.apply_router_weight_on_input))

    def get_stacked_weights(self) -> dict[str, WeightViews]:
        experts, keeps = self.experts, self.expert_attributes
        gate_up = find_attribute(self.module, keeps.get("gate_up", "experts.gate_up_proj"))
        first = experts.up_proj if gate_up is None else gate_up
        down = find_attribute(self.module, keeps.get("down", "experts.down_proj"))
        first = first[: len(down)]  # some blocks have rows for zero-computation experts
        if not self.is_transposed:
            first, down = first.mT, down.mT  # (e, in, out)
        firsts, found = {"w": first}, {"w2": [down]}
        if find_attribute(experts, "has_bias"):
            firsts["b"] = experts.up_proj_bias if gate_up is None else experts.gate_up_proj_bias
            found["b2"] = [experts.down_proj_bias]
        for kind, both in firsts.items():
            if gate_up is None:
                found[f"{kind}1"] = [both]
            else:
                gate, up = split_gate_up(
                    both, "gate_up" if getattr(experts, "is_concatenated", True) else "interleaved"
                )
                found |= {f"{kind}1": [gate], f"{kind}3": [up]}
        return found
