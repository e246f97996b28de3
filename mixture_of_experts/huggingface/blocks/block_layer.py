"""Reads a sparse block of `transformers` as a layer, with the block's weights by the names of this package.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.around import (
    InputWeightedExperts,
    LatentExperts,
    NormedExperts,
    Scale,
    Shift,
    TokenGated,
    ZeroComputationExperts,
)
from mixture_of_experts.experts import Experts, GatedExperts
from mixture_of_experts.gating import HashGating, RouterLogits, TopKGating
from mixture_of_experts.gating.steps import LearnedScale
from mixture_of_experts.huggingface.feed_forward import tensors_of
from mixture_of_experts.huggingface.replacement.adapters import read_activation
from mixture_of_experts.moe import MoE
from mixture_of_experts.ops import ClampedGLU, ClampedSwiGLU
from mixture_of_experts.recipes import KEEPS, Recipe
from mixture_of_experts.whole_model.block_settings import BlockSettings, find

Of = Callable[[Tensor], Tensor]
# one of our weights, as pieces: the place of each in our weight, and a view of the block's weight, to read or to write
Pieces = list[tuple[Any, Tensor]]


class BlockLayer:
    """A block as a layer.

    Attributes:
        layer: it has the block's sizes and settings, and its very modules, where these are parts of a layer as they
            are. Other weights are on the meta device.
    """

    settings: BlockSettings
    block: Any
    recipe: Recipe
    stack: Any
    layer: MoE

    def __init__(self, settings: BlockSettings, balance_over: Any = "batch", **coefs: Any) -> None:
        self.settings, self.block, self.recipe = settings, settings.module, settings.recipe
        self.experts: Any = find(self.block, *KEEPS["experts"])
        with torch.device("meta"):  # draws no numbers for weights that are copied
            gate, self.stack = self.make_gate(balance_over), self.make_stack()
        experts, shared = self.enclosed(self.stack)
        self.layer = MoE(gate.dim, gate.num_experts, gate=gate, experts=experts, shared_expert=shared, **coefs)

    def attribute(self, part: str) -> Any:
        return find(self.block, *KEEPS[part])

    # the layer

    def make_gate(self, balance_over: Any) -> Any:
        block, e = self.settings, self.settings.num_experts
        settings, kind = block.gate(), self.recipe.router
        if self.recipe.logits is not None:
            settings["logits"] = RouterLogits(block.dim, e, **block.logits())
        if block.network:
            settings |= dict(state_dim=block.router.router_hidden_size, first=not block.router.use_eda)
            settings["logits"] = block.router.router_mlp
        if self.recipe.scales is not None:
            settings["weigh"] = LearnedScale(e if self.recipe.scales == "expert" else 1)
        if issubclass(kind, TopKGating):
            settings["balance_over"] = balance_over
        if block.experts_of_id is not None:
            kind, settings["num_ids"] = HashGating, len(block.experts_of_id)
        return kind(block.dim, e, **settings)

    def make_stack(self) -> Any:
        """The stacked experts."""
        weights = self.weights(lambda tensor: tensor)
        e = sum(piece.shape[0] if piece.ndim == 3 else 1 for _, piece in weights["w1"])
        d, h = weights["w1"][0][1].shape[-2:]
        kind: Any = GatedExperts if "w3" in weights else Experts
        stack = kind(d, e, h, self.activation(), bias="b1" in weights)
        stack.is_transposed = True  # weights are (e, in, out): PEFT reads this
        return stack

    def activation(self) -> Any:
        """The activation of the stacked experts."""
        experts = self.experts
        limit, alpha = find(experts, *KEEPS["limit"]), find(experts, *KEEPS["alpha"])
        if isinstance(experts, nn.ModuleDict):
            one: Any = next(iter(experts.values()))
            act = read_activation(one.act)
            return act if not one.dropout.p else nn.Sequential(act, copy.deepcopy(one.dropout))
        act = find(experts, "act_fn", "mlp.activation_fn")
        if "activation" in self.recipe.keeps:
            act = find(self.block, self.recipe.keeps["activation"])
        if alpha is not None:
            return ClampedSwiGLU(alpha, limit)
        act = nn.SiLU() if act is None else read_activation(act)
        if limit is not None:
            return ClampedGLU(act, limit, after=bool(self.recipe.experts.get("after")))
        return copy.deepcopy(act)

    def enclosed(self, experts: Any) -> tuple[nn.Module, nn.Module | None]:
        """The experts with what is around them, and the shared expert if it is not part of them."""
        if (norm := find(self.experts, "post_expert_norm")) is not None:
            experts = NormedExperts(experts, norm)
        if self.recipe.weigh_input:
            experts = InputWeightedExperts(experts)
        num_identity = getattr(self.experts, "zero_expert_num", 0)
        if num_identity or self.recipe.zero:
            experts = ZeroComputationExperts(experts, num_identity=num_identity, num_zero=self.recipe.zero)
        parts: dict[str, Any] = {"before": self.in_turn("before", "before_norm"), "after": self.in_turn("after")}
        shared, last = self.shared_expert(), self.attribute("last")
        if last is not None:
            parts, shared = {**parts, "beside": shared, "after": last}, None
        if any(part is not None for part in parts.values()):
            experts = LatentExperts(experts, **parts)
        if isinstance(vector := self.attribute("shift"), nn.Parameter):  # is added to what the experts return
            shift = Shift(len(vector))
            shift.bias = vector
            experts = LatentExperts(experts, after=shift)
        return experts, shared

    def shared_expert(self) -> nn.Module | None:
        shared, gate = self.attribute("shared"), self.attribute("shared_gate")
        if shared is None or self.settings.always:
            return None
        shared = shared if gate is None else TokenGated(shared, gate)
        return nn.Sequential(shared, Scale(0.5)) if self.settings.averages else shared

    def in_turn(self, *parts: str) -> nn.Module | None:
        """Modules that tokens pass one after the other; None if there is none that does anything."""
        modules = [module for part in parts if (module := self.attribute(part)) is not None]
        modules = [module for module in modules if type(module) is not nn.Identity]
        return nn.Sequential(*modules) if len(modules) > 1 else next(iter(modules), None)

    # the weights

    def views(self, of: Of = lambda tensor: tensor) -> dict[str, Pieces]:
        """The block's weights by this package's names and in its layout; or what `of` returns for each of them."""
        block = {id(tensor) for tensor in (*self.block.parameters(), *self.block.buffers())}
        named = tensors_of(self.layer).items()
        found: dict[str, Pieces] = {name: [(..., of(tensor))] for name, tensor in named if id(tensor) in block}
        path = next(name for name, module in self.layer.named_modules() if module is self.stack)
        found |= {f"{path}.{name}": pieces for name, pieces in self.weights(of).items()}
        return found | {f"gate.{name}": pieces for name, pieces in self.router_weights(of).items()}

    def router_weights(self, of: Of) -> dict[str, Pieces]:
        block, found = self.settings, {}
        if block.weight is not None:
            found["w_gating" if self.recipe.logits is None else "logits.weight"] = of(block.weight).T
        if self.recipe.logits is not None and "norm_eps" in self.recipe.logits:
            found["logits.norm_weight"] = of(block.attribute("norm_weight"))
        if block.network:
            found |= {f"down.{name}": of(tensor) for name, tensor in block.router.down_proj.named_parameters()}
            if block.router.use_eda:
                found["state_scale"] = of(block.router.router_states_scale)
        if block.bias is not None:
            found["b_gating"] = of(block.bias)
        if block.experts_of_id is not None:
            found["experts_of_id"] = of(block.experts_of_id)
        if self.recipe.scales is not None:
            found["weigh.scale"] = of(block.attribute("scales"))
        pieces: dict[str, Pieces] = {name: [(..., tensor)] for name, tensor in found.items()}
        if block.expert_bias is not None:
            bias = of(block.expert_bias).flatten()
            pieces["expert_bias"] = [(slice(len(bias)) if block.always else ..., bias)]
        return pieces

    def weights(self, of: Of) -> dict[str, Pieces]:
        """The weights of the stacked experts, by name."""
        experts, keeps = self.experts, self.recipe.keeps
        if isinstance(experts, nn.ModuleDict):
            return {
                ours: [(i, of(getattr(one, name).weight).T) for i, one in enumerate(experts.values())]
                for ours, name in (("w1", "wi"), ("w2", "wo"))
            }
        if "gate_up" in keeps:
            gate_up, down = (find(self.block, keeps[name]) for name in ("gate_up", "down"))
            w1, w3 = of(gate_up).mT.chunk(2, dim=-1)
            return {"w1": [(..., w1)], "w3": [(..., w3)], "w2": [(..., of(down).mT)]}
        if hasattr(experts, "mlp"):  # weights are stacked in rows
            e, mlp = experts.num_experts, experts.mlp
            w1, w3, w2 = (of(weight).unflatten(0, (e, -1)) for weight in (mlp.w1, mlp.v1, mlp.w2))
            return {"w1": [(..., w1.mT)], "w3": [(..., w3.mT)], "w2": [(..., w2)]}
        found = self.stacked(of)
        if self.settings.always:
            shared, e = self.block.shared_experts, experts.num_experts
            for name, theirs in (("w1", shared.gate_proj), ("w3", shared.up_proj), ("w2", shared.down_proj)):
                found[name] = [(slice(e), found[name][0][1]), (slice(e, None), of(theirs).mT)]
        return found

    def stacked(self, of: Of) -> dict[str, Pieces]:
        experts = self.experts
        transposed = getattr(experts, "is_transposed", self.recipe.weigh_input)
        concatenated = getattr(experts, "is_concatenated", True)
        gated = hasattr(experts, "gate_up_proj")
        first, down = of(experts.gate_up_proj if gated else experts.up_proj), of(experts.down_proj)
        first = first[: len(down)]  # some blocks have rows for experts that compute nothing
        if not transposed:
            first, down = first.mT, down.mT  # (e, in, out)
        found: dict[str, Pieces] = {"w2": [(..., down)]}
        firsts = {"w": first}
        if getattr(experts, "has_bias", False):
            firsts["b"] = of(experts.gate_up_proj_bias if gated else experts.up_proj_bias)
            found["b2"] = [(..., of(experts.down_proj_bias))]
        for kind, both in firsts.items():
            if not gated:
                found[f"{kind}1"] = [(..., both)]
                continue
            gate, up = both.chunk(2, dim=-1) if concatenated else (both[..., ::2], both[..., 1::2])
            found |= {f"{kind}1": [(..., gate)], f"{kind}3": [(..., up)]}
        return found
