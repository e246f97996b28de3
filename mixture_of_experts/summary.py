"""Counts the total and active parameters of a model and its floating-point operations per token.

Axes: e (experts), k (choices per token).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from mixture_of_experts.experts import RoutedExperts
from mixture_of_experts.gating import RouterLogits
from mixture_of_experts.gating.base import Gate
from mixture_of_experts.providers import ask_providers
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.support.private_torch import get_original_class, unwrap_module
from mixture_of_experts.whole_model.router_discovery import RouterHandle, find_all_routers, iter_named_modules
from mixture_of_experts.wrappers import ExpertsWrapper

# fraction (0 to 1) of a module that a token uses, keyed by layer and module
ActiveShares = dict[Any, dict[nn.Module, float]]


class ActiveModules(NamedTuple):
    """The parts of a model that a token uses."""

    active_shares: ActiveShares
    variable_k_layers: set[nn.Module]  # layers whose number of choices per token depends on scores
    external_modules: set[nn.Module]  # routers and experts from other libraries, which hold their weights directly


class Cost(NamedTuple):
    """Parameter and operation counts of a model or one of its layers.

    Attributes:
        parameters: total number of parameters, counting shared parameters once.
        active: number of parameters that each token uses, which is k / e of the experts' parameters plus all other
            parameters. If layers share experts, the largest k is used.
        flops: floating-point operations in one token's forward pass. Each element of a weight matrix that multiplies
            the token counts as two operations. The backward pass takes twice as many operations. Convolutions and
            products between tokens (attention) are not counted.
        at_most: whether `active` and `flops` are upper bounds, because the scores determine how many of the k choices a
            token uses. This applies to `TopPGating` and to the second choice of `Top2Gating`.
    """

    parameters: int
    active: int
    flops: int
    at_most: bool = False


class Summary(NamedTuple):
    """The result of `summary`, which prints as a table.

    Attributes:
        model: counts for the whole model.
        layers: counts for each MoE layer, keyed by path.
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

    @property
    def at_most(self) -> bool:
        return self.model.at_most

    def __str__(self) -> str:
        rows = [("", "parameters", "active", "FLOPs per token")]
        for name, cost in (*self.layers.items(), ("total", self.model)):
            most = "at most " if cost.at_most else ""
            numbers = f"{cost.parameters:,}", f"{most}{cost.active:,}", f"{most}{cost.flops:,}"
            rows.append((name or "(model)", *numbers))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:{width}}{total:>20}{active:>28}{flops:>28}" for name, total, active, flops in rows)


def summary(model: nn.Module) -> Summary:
    """Count a model's total and active parameters and its floating-point operations per token.

    Each layer is counted once. A token is assumed to use k experts, or `expected_choices` experts if the gate has this
    attribute. For `ReLUGating`, this is `mean_choices`, which `control_sparsity` maintains; for `ExpertChoiceGating`,
    it is the capacity factor. With two levels, a token's first choice at level one leads to k choices at level two, and
    every other choice leads to one. If the capacity is limited, a token may use fewer experts. The counts depend on the
    layers' dimensions, not on their implementation. Models of any size can be counted on the meta device.

    Args:
        model: a model, which may contain `MoE` layers, `HeirarchicalMoE` layers, and sparse blocks from libraries that
            have a provider.

    Raises:
        ValueError: if the number of experts per token is unknown because a gate has no `k`.
        TypeError: if a block from another library has experts, but the fraction of them that a token uses is unknown.

    Example:
        >>> from mixture_of_experts import MoE, TopKGating
        >>> moe = MoE(dim=8, hidden_dim=32, gate=TopKGating(8, num_experts=4, k=1))
        >>> cost = summary(moe)
        >>> cost.parameters, cost.active, cost.flops  # experts of 2 * 8 * 32 weights, a router of 8 * 4
        (2080, 544, 1088)
    """
    used = ActiveModules({}, set(), set())
    paths: dict[nn.Module, str] = {}  # keyed by layer
    for router in find_all_routers(model):
        for location in router.locations:
            if location.layer is None:
                continue
            layer = unwrap_module(location.layer)
            paths.setdefault(layer, location.name.rpartition(".")[0])
            used.active_shares.setdefault(layer, {}).update(compute_active_shares(router, layer))
            if getattr(router.gate, "expected_choices", 0) is None:
                used.variable_k_layers.add(layer)
            if router.external is not None:
                used.external_modules.update(
                    router.gate.modules(), layer.get_submodule(router.external.experts_path).modules()
                )
    reject_unknown_blocks(model, used.active_shares)
    return Summary(compute_cost(model, used), {path: compute_cost(layer, used) for layer, path in paths.items()})


def reject_unknown_blocks(model: nn.Module, shares: ActiveShares) -> None:
    """Raise TypeError if a block from another library has experts whose active share is unknown."""
    known = {part for parts in shares.values() for part in parts}
    for place in iter_named_modules(model):
        experts = ask_providers(place.module, lambda provider, place=place: provider.find_experts(place.module))
        if experts is not None and experts not in known:
            raise TypeError(
                f"summary does not support {place.name!r} ({get_original_class(place.module).__name__}), because the "
                "router that chooses its experts is unknown"
            )


def compute_active_shares(router: RouterHandle, layer: Any) -> dict[nn.Module, float]:
    """Return the fraction (0 to 1) of a layer's experts and level-two gates that a token uses."""
    number, e = choices_per_token(router), router.num_experts
    if router.level_one is None:
        experts = layer.experts if router.external is None else layer.get_submodule(router.external.experts_path)
        return {experts: number / e}
    outer, eo = choices_per_token(router.level_one), router.level_one.num_experts
    # at level one, the first choice leads to all choices at level two, and each other choice leads to one
    served = min(outer, 1.0) * number + max(outer - 1.0, 0.0)
    return {layer.experts: served / (eo * e), layer.gate_inner: outer / eo}


def choices_per_token(router: RouterHandle) -> float:
    """Return the mean number of experts that a gate chooses per token if the gate provides it, or the maximum number
    otherwise."""
    expected = getattr(router.gate, "expected_choices", None)
    number = router.k if expected is None else expected
    if number is None:
        raise ValueError(
            f"the {router.class_name} of {router.name.rpartition('.')[0] or 'the layer'} does not specify how many "
            "experts a token chooses; add a `k` attribute to the gate"
        )
    return min(number, router.num_experts)


def compute_cost(model: nn.Module, active_modules: ActiveModules) -> Cost:
    parts: dict[Tensor, float] = {}
    weights: dict[nn.Module, dict[str, Tensor]] = {}  # so that layers with a common module share its placeholders
    flops = 0.0
    for module, part in iter_active_modules(model, active_modules.active_shares):
        if module not in weights:
            weights[module] = get_direct_weights(module)
        for parameter in weights[module].values():
            parts[parameter] = max(part, parts.get(parameter, 0.0))
        flops += 2 * part * count_matrix_weights(module, active_modules)
    active = sum(part * parameter.numel() for parameter, part in parts.items())
    at_most = any(module in active_modules.variable_k_layers for module in model.modules())
    return Cost(sum(parameter.numel() for parameter in parts), round(active), round(flops), at_most)


def iter_active_modules(model: nn.Module, shares: ActiveShares) -> Iterator[tuple[nn.Module, float]]:
    """Yield each module of each layer once, along with the fraction (0 to 1) of it that a token uses."""
    seen: set[tuple[nn.Module | None, nn.Module]] = set()
    todo: list[tuple[nn.Module, float, nn.Module | None, float]] = [(model, 1.0, None, 1.0)]
    while todo:
        module, part, layer, of_layer = todo.pop()  # `layer` contains the module, and `of_layer` is that layer's share
        if (layer, module) in seen:
            continue
        seen.add((layer, module))
        yield module, part
        if module in shares:
            layer, of_layer = module, part
        for child, computes in list_children(module):
            share = shares.get(layer, {}).get(child)
            if isinstance(module, ExpertsWrapper) and child is not module.experts:
                share = 1.0  # every token uses the modules that a wrapper adds to its experts
            below = part if share is None else of_layer * share
            todo.append((child, below if computes else 0.0, layer, of_layer))


def list_children(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return a module's direct children and whether its computation uses each of them."""
    found = ask_providers(module, lambda provider: provider.list_children(module))
    return [(child, True) for child in module.children()] if found is None else found


def get_direct_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters by name. For quantized experts, return placeholders of the weights' shapes, and
    the biases."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if isinstance(module, QuantizedExperts):
        buffers = dict(module.named_buffers(recurse=False))
        names = [name.removesuffix("_packed") for name in buffers if name.endswith("_packed")]
        own |= {name: module.placeholder_weight(name) for name in names}
        own |= {name: buffer for name, buffer in buffers.items() if is_bias_name(name)}
    return own


def count_matrix_weights(module: nn.Module, active_modules: ActiveModules) -> int:
    """Return the number of elements in the weight matrices of a linear layer, experts or a router, or 0 for other
    modules."""
    known = (
        isinstance(module, nn.Linear | RoutedExperts | Gate | RouterLogits) or module in active_modules.external_modules
    )
    if not known and not ask_providers(module, lambda provider: provider.is_linear(module)):
        return 0
    made = {name: getattr(module, name) for name in getattr(module, "parametrizations", ())}  # computed weights
    weights = {name: weight for name, weight in (get_direct_weights(module) | made).items() if not is_bias_name(name)}
    least = 3 if isinstance(module, RoutedExperts) else 2  # minimum number of dimensions of a counted weight
    return sum(weight.numel() for weight in weights.values() if weight.ndim >= least)


def is_bias_name(name: str) -> bool:
    return name.startswith("b") or name.endswith("bias")
