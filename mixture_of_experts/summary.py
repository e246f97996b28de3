"""Counts a model's parameters, those that a token uses, and a token's floating-point operations.

Axes: e experts, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixture_of_experts.around import EnclosedExperts, ExpertsBesideIdentity, InputWeightedExperts, NormedExperts
from mixture_of_experts.experts import RoutedExperts, StackedExperts
from mixture_of_experts.gating import RouterLogits
from mixture_of_experts.gating.base import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE

Shares = dict[nn.Module, dict[nn.Module, float]]  # of each layer: the part, 0 to 1, of its modules that a token uses


class Cost(NamedTuple):
    """The counts of a model, or of one of its layers.

    Attributes:
        parameters: number of all parameters; a shared one counts once.
        active: number of parameters that a token uses: k / e of the experts' parameters, and all others. If layers
            share experts, k is the largest.
        flops: operations of one token's forward: two for each weight of each matrix that multiplies the token. A
            backward takes twice as many. Products of tokens with tokens (attention) and convolutions are left out.
        at_most: whether `active` and `flops` are the most that a token can use, because scores decide how many of its
            k choices are made (`TopPGating`, the second choice of `Top2Gating`).
    """

    parameters: int
    active: int
    flops: int
    at_most: bool = False


class Summary(NamedTuple):
    """The counts that `summary` returns; `print` it for a table.

    Attributes:
        model: those of the whole model.
        layers: those of each MoE layer, by its path.
    """

    model: Cost
    layers: dict[str, Cost]

    @property
    def parameters(self) -> int:
        return self.model.parameters

    @property
    def active(self) -> int:
        return self.model.active

    @property
    def flops(self) -> int:
        return self.model.flops

    def __str__(self) -> str:
        rows = [("", "parameters", "active", "FLOPs a token")]
        rows += [(name or "(itself)", *cells(cost)) for name, cost in self.layers.items()]
        rows.append(("in all", *cells(self.model)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )


def cells(cost: Cost) -> list[str]:
    most = "at most " if cost.at_most else ""
    return [f"{cost.parameters:,}", f"{most}{cost.active:,}", f"{most}{cost.flops:,}"]


def summary(model: nn.Module) -> Summary:
    """Count the parameters of a model, those that a token uses, and a token's floating-point operations.

    Every layer counts once. A token uses k experts, or as many as the gate says in `expected_choices`: `ReLUGating`
    counts `mean_choices`, to which `control_sparsity` holds it, and `ExpertChoiceGating` its capacity factor. Of two
    levels, a token's first choice at level one makes k choices at level two, and its other choices make one each. A
    capacity may leave a token fewer. The numbers follow from the layers' sizes, not from the way that computes them.
    On the meta device you can count a model of any size.

    Args:
        model: a model with any number of `MoE` and `HeirarchicalMoE` layers.

    Raises:
        ValueError: a gate does not say how many experts a token chooses: it has no `k`.

    Example:
        >>> from mixture_of_experts import MoE, TopKGating
        >>> moe = MoE(dim=8, hidden_dim=32, gate=TopKGating(8, num_experts=4, k=1))
        >>> cost = summary(moe)
        >>> cost.parameters, cost.active, cost.flops  # experts of 2 * 8 * 32 weights, a router of 8 * 4
        (2080, 544, 1088)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE | HeirarchicalMoE)}
    shares: Shares = {}
    varying: set[nn.Module] = set()
    for name, layer in layers.items():
        found = [choices(name, gate) for gate in gates(layer)]
        shares[layer] = shares_of(layer, [number for number, _ in found])
        varying |= {layer} if any(most for _, most in found) else set()
    return Summary(cost(model, shares, varying), {name: cost(layer, shares, varying) for name, layer in layers.items()})


def gates(layer: Any) -> list[Any]:
    return [layer.gate] if isinstance(layer, MoE) else [layer.gate_outer, layer.gate_inner]


def shares_of(layer: Any, numbers: list[float]) -> dict[nn.Module, float]:
    """The part, 0 to 1, of a layer's experts and of its inner gates that a token uses, by its choices at each level."""
    numbers = [min(number, gate.num_experts) for number, gate in zip(numbers, gates(layer), strict=True)]
    if isinstance(layer, MoE):
        return {layer.experts: numbers[0] / layer.num_experts}
    (outer, inner), (eo, ei) = numbers, layer.num_experts
    served = min(outer, 1.0) * inner + max(outer - 1.0, 0.0)  # the first choice makes all at level two, others one
    return {layer.experts: served / (eo * ei), layer.gate_inner: outer / eo}


def choices(name: str, gate: Any) -> tuple[float, bool]:
    """How many experts a gate chooses for a token; and whether that is the most, because scores decide how many."""
    k = getattr(gate, "k", None)
    expected = getattr(gate, "expected_choices", k)
    number = k if expected is None else expected
    if number is None:
        raise ValueError(
            f"the {type(gate).__name__} of {name or 'the layer'} does not say how many experts a token chooses: "
            "give it an attribute k"
        )
    return number, expected is None


def cost(model: nn.Module, shares: Shares, varying: set[nn.Module]) -> Cost:
    parts: dict[Tensor, float] = {}
    flops = 0.0
    for module, part in with_parts(model, shares):
        for parameter in module.parameters(recurse=False):
            parts[parameter] = max(part, parts.get(parameter, 0.0))
        flops += 2 * part * multiplied(module)
    active = sum(part * parameter.numel() for parameter, part in parts.items())
    at_most = any(module in varying for module in model.modules())
    return Cost(sum(parameter.numel() for parameter in parts), round(active), round(flops), at_most)


def with_parts(model: nn.Module, shares: Shares) -> Iterator[tuple[nn.Module, float]]:
    """Every module of each layer once, with the part of it, 0 to 1, that a token uses."""
    seen: set[tuple[nn.Module | None, nn.Module]] = set()
    todo: list[tuple[nn.Module | None, nn.Module, float, float]] = [(None, model, 1.0, 1.0)]
    while todo:
        layer, module, part, routed = todo.pop()
        if (layer, module) in seen:
            continue
        seen.add((layer, module))
        yield module, part * routed
        if isinstance(module, EnclosedExperts | ExpertsBesideIdentity | InputWeightedExperts | NormedExperts):
            below = {module.experts: routed}  # every token passes what is beside the experts inside
        else:
            layer, part, below = module if module in shares else layer, part * routed, shares.get(module, {})
        todo += [(layer, child, part, below.get(child, 1.0)) for child in module.children()]


def multiplied(module: nn.Module) -> int:
    """The number of weights in the matrices of a linear layer, of experts or of a router; 0 for other modules."""
    own, kind = module.named_parameters(recurse=False), type(module).__name__
    if isinstance(module, nn.Linear) or kind == "Conv1D":  # of transformers
        return getattr(module, "weight").numel()  # noqa: B009
    if isinstance(module, StackedExperts | Gate | RouterLogits) or kind == "SharedNetwork":  # which needs transformers
        return sum(parameter.numel() for name, parameter in own if name.startswith("w"))
    # a user's experts, if their weights are stacked
    return sum(p.numel() for _, p in own if p.ndim >= 3) if isinstance(module, RoutedExperts) else 0
