"""Finds the routers in a model: this package's gates, and routers from other libraries if a provider describes them.

All features that act on whole models use this module to find routers. Modules are also found inside the wrappers of
`torch.compile`, activation checkpointing, adapters, DDP, FSDP2 and parametrizations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.gating import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.providers import ExternalRouter, ask_providers
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import get_original_class, unwrap_module
from mixture_of_experts.whole_model.model_tokens import find_enclosing_model

GateSelection = Iterable["str | nn.Module"]  # router names, gates or layers


class RouterLocation(NamedTuple):
    """The location of a gate in a model."""

    name: str  # module path, without the names of wrappers
    # the layer or external block that calls the gate; None for a standalone gate
    layer: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class RouterHandle:
    """Describes a gate in a model, or a router from another library. A gate that is shared by two layers has one handle
    with two locations."""

    gate: nn.Module  #: the routing module, without wrappers
    #: the outermost wrapper or the gate itself; its hooks run once per layer call
    hook_target: nn.Module
    num_experts: int
    enclosing_model: nn.Module  #: the model whose arguments describe the tokens
    locations: tuple[RouterLocation, ...]
    #: leading dimensions of the router weights, with one router per index
    outer_expert_dims: tuple[int, ...] = ()
    level_one: RouterHandle | None = None  #: the level-one router, for a router at level two
    #: the router's settings, if it belongs to another library
    external: ExternalRouter | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.locations[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(location.name for location in self.locations))

    @property
    def is_external(self) -> bool:
        """Whether this is a router from another library rather than a gate of this package."""
        return self.external is not None

    @property
    def class_name(self) -> str:
        """The name of the gate's class."""
        return get_original_class(self.gate).__name__

    @property
    def k(self) -> int | None:
        """The number of choices per token, or None if it is unknown."""
        k = getattr(self.gate if self.external is None else self.external, "k", None)
        return k if isinstance(k, int) else None

    @property
    def expert_bias(self) -> Tensor | None:
        """The expert bias, or None if it does not affect the choice of experts or is not updated from choice counts."""
        if self.external is not None:
            return self.external.expert_bias
        counts = getattr(self.gate, "expert_counts", None) is not None
        return getattr(self.gate, "expert_bias", None) if counts else None

    @property
    def device(self) -> torch.device:
        """The device of the gate's parameters, or of the enclosing model if the gate has none."""
        for module in (self.gate, self.enclosing_model):
            for tensor in (*module.parameters(), *module.buffers()):
                return tensor.device
        return torch.get_default_device()


def find_routers(model: nn.Module, feature: str, gates: GateSelection | None = None) -> list[RouterHandle]:
    """Return the routers of a model, in the model's order.

    Args:
        model: the model to search.
        feature: the name of the calling function, which appears in error messages.
        gates: the routers to select, specified as names, gates, or layers that contain gates. Default: all.

    Raises:
        ValueError: the model has no router, or an element of `gates` is not one of its routers.
    """
    routers = find_all_routers(model)
    if not routers:
        raise ValueError(f"{type(model).__name__} has no gate; pass a model with MoE layers to {feature}")
    return routers if gates is None else select_routers(routers, feature, gates)


def find_all_routers(model: nn.Module) -> list[RouterHandle]:
    """Return all routers of a model, in the model's order. The list may be empty."""
    found: dict[nn.Module, RouterHandle] = {}
    for entry in iter_named_modules(check_model("model", model)):
        for router in find_routers_in(entry, found):
            found[router.gate] = merge_handles(found[router.gate], router) if router.gate in found else router
    return list(found.values())


def check_supported(
    routers: list[RouterHandle], feature: str, unsupported_reason: Callable[[RouterHandle], str | None]
) -> list[RouterHandle]:
    """Return `routers` if a feature supports all of them, or raise a TypeError otherwise.

    Args:
        unsupported_reason: a function that returns the reason why a router is not supported, or None if it is.
    """
    reasons = {router: reason for router in routers if (reason := unsupported_reason(router)) is not None}
    if reasons:
        unsupported = "; ".join(
            f"{router.name!r} ({router.class_name}): {reason}" for router, reason in reasons.items()
        )
        supported = [router.name for router in routers if router not in reasons]
        remedy = f". To select only the other gates, pass gates={supported}" if supported else ""
        raise TypeError(f"{feature} does not support {unsupported}{remedy}")
    return routers


def select_routers(routers: list[RouterHandle], feature: str, gates: GateSelection) -> list[RouterHandle]:
    """Return the routers that `gates` selects, in the model's order."""
    if not isinstance(gates, str | nn.Module | Iterable):
        raise TypeError(
            f"expected the `gates` argument of {feature} to be a list of gate names or modules, but got {gates!r}"
        )
    selectors = [gates] if isinstance(gates, str | nn.Module) else list(gates)
    for selector in selectors:
        if not any(matches_selector(router, selector) for router in routers):
            what = f"this {type(selector).__name__}" if isinstance(selector, nn.Module) else repr(selector)
            names = ", ".join(repr(name) for router in routers for name in router.names)
            raise ValueError(
                f"`gates` passed to {feature} contains {what}, which is not a gate of the model; its gates are {names}"
            )
    if not selectors:
        raise ValueError(f"the `gates` argument of {feature} is empty; pass a gate, or omit it to select all")
    return [router for router in routers if any(matches_selector(router, selector) for selector in selectors)]


def matches_selector(router: RouterHandle, selector: Any) -> bool:
    if isinstance(selector, str):
        return selector in router.names
    modules = [router.gate, router.hook_target, *(location.layer for location in router.locations)]
    return any(selector is module or (module is not None and selector is unwrap_module(module)) for module in modules)


# Modules


class NamedModule(NamedTuple):
    """A module and one of its paths in the model."""

    name: str  # module path, without the names of wrappers
    outermost: nn.Module  # the outermost wrapper or the module itself
    module: nn.Module
    ancestors: tuple[nn.Module, ...]  # enclosing modules, outermost first

    def make_handle(self, path: str, num_experts: int, layer: nn.Module | None, **more: Any) -> RouterHandle:
        """Return a handle for the router that `layer` calls and that is located at `path` below this module. An empty
        path refers to the module itself."""
        called = self.module.get_submodule(path) if path else self.outermost
        location = RouterLocation(f"{self.name}.{path}".strip(".") or "gate", layer)
        around = find_enclosing_model((*self.ancestors, self.outermost))
        return RouterHandle(unwrap_module(called), called, num_experts, around, (location,), **more)


def iter_named_modules(model: nn.Module) -> Iterator[NamedModule]:
    """Iterate over every module at every path in a model. Wrappers, and copies that do not take part in the
    computation, are skipped."""
    pending = [NamedModule("", model, unwrap_module(model), ())]
    while pending:
        entry = pending.pop()
        yield entry
        above = (*entry.ancestors, entry.module)
        for name, child in reversed(entry.module._modules.items()):
            if child is not None and (module := unwrap_module(child)) not in above:
                pending.append(NamedModule(f"{entry.name}.{name}".lstrip("."), child, module, above))


# Routers


def find_routers_in(entry: NamedModule, found: dict[nn.Module, RouterHandle]) -> Iterator[RouterHandle]:
    """Yield a module's routers: the routers it calls if it is a layer or block, or the module itself if it is a
    gate."""
    module: Any = entry.module
    if isinstance(module, HeirarchicalMoE):
        outer = module.num_experts_outer
        yield entry.make_handle("gate_outer", outer, entry.outermost)
        level_one = found[unwrap_module(module.gate_outer)]
        yield entry.make_handle(
            "gate_inner", module.num_experts_inner, entry.outermost, outer_expert_dims=(outer,), level_one=level_one
        )
    elif isinstance(module, MoE):
        yield entry.make_handle("gate", module.num_experts, entry.outermost)
    elif (external := ask_providers(module, lambda each: each.find_router(module))) is not None:
        yield entry.make_handle(external.path, external.num_experts, module, external=external)
    elif isinstance(module, Gate) and module not in found:
        yield entry.make_handle("", module.num_experts, None, outer_expert_dims=module.outer_expert_dims)


def merge_handles(first: RouterHandle, second: RouterHandle) -> RouterHandle:
    """Merge two handles for a gate that has several locations."""
    called = first.hook_target if first.hook_target is second.hook_target else first.gate
    locations = [each for each in dict.fromkeys((*first.locations, *second.locations)) if each.layer is not None]
    return replace(
        second, hook_target=called, locations=tuple(locations) or first.locations, enclosing_model=first.enclosing_model
    )
