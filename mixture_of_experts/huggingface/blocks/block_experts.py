"""Reads the experts of a sparse block of `transformers`: as experts of this package, with their weights by its names.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.around import (
    EnclosedExperts,
    ExpertsBesideIdentity,
    InputWeightedExperts,
    NormedExperts,
    Scale,
    Shift,
    TokenGated,
)
from mixture_of_experts.experts import Experts, GatedExperts
from mixture_of_experts.huggingface.replacement.adapters import read_activation
from mixture_of_experts.ops import ClampedGLU, ClampedSwiGLU
from mixture_of_experts.recipes import KEEPS, Recipe
from mixture_of_experts.whole_model.block_settings import BlockSettings, find

Of = Callable[[Tensor], Tensor]
# one of our weights, as pieces: the place of each in our weight, and a view of the block's weight, to read or to write
Pieces = list[tuple[Any, Tensor]]


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module, without gradients."""
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.grad = None
    return other


def paths(prefix: str, module: nn.Module, of: Of) -> dict[str, Pieces]:
    """All parameters and buffers of a module that is copied as a whole, by their paths."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {f"{prefix}.{name}": [(..., of(tensor))] for name, tensor in named.items()}


class BlockExperts:
    """The experts of a block, and the modules around them."""

    block: Any
    recipe: Recipe
    always: int
    averages: bool

    def __init__(self, settings: BlockSettings) -> None:
        self.block, self.recipe, self.always = settings.module, settings.recipe, settings.always
        self.averages = settings.averages
        self.experts: Any = find(self.block, *KEEPS["experts"])

    def attribute(self, part: str) -> Any:
        return find(self.block, *KEEPS[part])

    @property
    def shared(self) -> Any:
        return None if self.always else self.attribute("shared")

    @property
    def shift(self) -> Any:
        """A vector that is added to what the experts return; None if there is none."""
        found = self.attribute("shift")
        return found if isinstance(found, nn.Parameter) else None

    # the modules

    def module(self) -> tuple[nn.Module, nn.Module | None]:
        """The experts, and the shared expert if it is not part of them. Stacked weights are on the meta device."""
        weights = self.weights(lambda tensor: tensor)
        e, d, h = self.sizes(weights)
        with torch.device("meta"):
            kind: Any = GatedExperts if "w3" in weights else Experts
            experts: Any = kind(d, e, h, self.activation(), bias="b1" in weights)
        experts.is_transposed = True  # weights are (e, in, out): PEFT reads this
        if (norm := find(self.experts, "post_expert_norm")) is not None:
            experts = NormedExperts(experts, copied(norm))
        if self.recipe.weigh_input:
            experts = InputWeightedExperts(experts)
        if spare := self.num_identity + self.recipe.zero:
            experts = ExpertsBesideIdentity(experts, num_identity=self.num_identity, num_zero=spare - self.num_identity)
        shared = self.shared_module()
        around = self.around()
        if self.averages and shared is not None:
            shared = nn.Sequential(shared, Scale(0.5))
        last = self.attribute("last")
        if around or last is not None:
            parts: Any = {name: copied_in_turn(modules) for name, modules in around.items()}
            if last is not None:
                parts, shared = {**parts, "beside": shared, "after": copied(last)}, None
            experts = EnclosedExperts(experts, **parts)
        if self.shift is not None:
            with torch.device("meta"):
                experts = EnclosedExperts(experts, after=Shift(len(self.shift)))
        return experts, shared

    def shared_module(self) -> nn.Module | None:
        if self.shared is None:
            return None
        gate = self.attribute("shared_gate")
        return copied(self.shared) if gate is None else TokenGated(copied(self.shared), copied(gate))

    def around(self) -> dict[str, list[nn.Module]]:
        """The modules before and after the experts."""
        found = {
            "before": [self.attribute("before"), self.attribute("before_norm")],
            "after": [self.attribute("after")],
        }
        real = {
            name: [m for m in modules if m is not None and type(m) is not nn.Identity]
            for name, modules in found.items()
        }
        return {name: modules for name, modules in real.items() if modules}

    @property
    def num_identity(self) -> int:
        return getattr(self.experts, "zero_expert_num", 0)

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

    def sizes(self, weights: dict[str, Pieces]) -> tuple[int, int, int]:
        """The sizes e, d and h."""
        w1 = weights["w1"]
        d, h = w1[0][1].shape[-2:]
        e = sum(piece.shape[0] if piece.ndim == 3 else 1 for _, piece in w1)
        return e, d, h

    # the weights

    def views(self, of: Of) -> dict[str, Pieces]:
        inner, found = "experts", {}
        around, last = self.around(), self.attribute("last")
        if self.shift is not None:
            found[f"{inner}.after.bias"] = [(..., of(self.shift))]
            inner += ".experts"
        if around or last is not None:
            for name, modules in around.items():
                for index, module in enumerate(modules):
                    place = f"{inner}.{name}" + (f".{index}" if len(modules) > 1 else "")
                    found |= paths(place, module, of)
            if last is not None:
                found |= paths(f"{inner}.after", last, of)
        shared = f"{inner}.beside" if last is not None else "shared_expert"
        if around or last is not None:
            inner += ".experts"
        if self.num_identity or self.recipe.zero:
            inner += ".experts"
        if (norm := find(self.experts, "post_expert_norm")) is not None:
            found |= paths(f"{inner}.norm", norm, of)
            inner += ".experts"
        if self.recipe.weigh_input:
            inner += ".experts"
        found |= {f"{inner}.{name}": pieces for name, pieces in self.weights(of).items()}
        if self.shared is not None:
            if self.averages:
                shared += ".0"
            gate = self.attribute("shared_gate")
            found |= paths(shared if gate is None else f"{shared}.module", self.shared, of)
            if gate is not None:
                found |= paths(f"{shared}.gate", gate, of)
        return found

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
        if self.always:
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


def copied_in_turn(modules: list[nn.Module]) -> nn.Module:
    return copied(modules[0]) if len(modules) == 1 else nn.Sequential(*map(copied, modules))
