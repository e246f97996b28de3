"""Finds where a model routes: its sites, which are gates of this package and routers of `transformers`.

Every ability on a whole model takes its sites from here. What is wrapped around a module does not hide it:
`torch.compile`, checkpoint wrappers, PEFT, DDP, FSDP2, parametrizations. Nothing of `transformers` is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.gating import Gate
from mixture_of_experts.moe import HeirarchicalMoE, MoE
from mixture_of_experts.recipes import KEEPS
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import unwrapped, wrapped_class
from mixture_of_experts.whole_model.block_settings import BlockSettings, find, recipe_of
from mixture_of_experts.whole_model.model_tokens import nearest_reader

Gates = Iterable["str | nn.Module"]  # names of sites; gates or layers


class Location(NamedTuple):
    """A place in which a gate stands."""

    name: str  # its path, without wrappers
    layer: nn.Module | None = None  # the layer, or block of transformers, that calls it; None if it stands alone


@dataclass(frozen=True, eq=False)
class Site:
    """A gate of a model, or a router of `transformers`. A gate in two layers is one site that stands in two places."""

    gate: nn.Module  #: what routes, without wrappers
    called: nn.Module  #: the outermost wrapper, or the gate itself: a hook on it runs once for each call of a layer
    num_experts: int
    around: nn.Module  #: the nearest model of transformers that reads a mask, else the model
    locations: tuple[Location, ...]
    outer: tuple[int, ...] = ()  #: leading dimensions of the weights, a router for each index
    level_one: Site | None = None  #: for level two: the site of level one
    block: BlockSettings | None = field(default=None, repr=False)  #: of a block of transformers, whose router it is

    @property
    def name(self) -> str:
        return self.locations[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(location.name for location in self.locations))

    @property
    def external(self) -> bool:
        """Whether it is a router of `transformers`, and no gate of this package."""
        return self.block is not None

    @property
    def kind(self) -> str:
        """The name of the gate's class."""
        return wrapped_class(self.gate).__name__

    @property
    def k(self) -> int | None:
        """Choices of a token; None if it is not known."""
        k = find(self.gate, "k") if self.block is None else self.block.k
        return k if isinstance(k, int) else None

    @property
    def bias(self) -> Tensor | None:
        """The bias that chooses experts and that counts of choices move; None if there is none."""
        if self.block is not None:
            return self.block.expert_bias
        counts = find(self.gate, "expert_counts") is not None
        return find(self.gate, "expert_bias") if counts else None

    @property
    def device(self) -> torch.device:
        """That of the gate's parameters; if it has none, that of the model around."""
        for module in (self.gate, self.around):
            for tensor in (*module.parameters(), *module.buffers()):
                return tensor.device
        return torch.get_default_device()


def find_sites(model: nn.Module, ability: str, gates: Gates | None = None) -> list[Site]:
    """The sites of a model, in its order.

    Args:
        model: the model.
        ability: the name of the function that asks, for errors.
        gates: some of the sites: their names, gates, or layers around gates. By default all.

    Raises:
        ValueError: there is none, or `gates` has something that is no site.
    """
    sites = all_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no gate: give {ability} a model with MoE layers")
    return sites if gates is None else chosen(sites, ability, gates)


def all_sites(model: nn.Module) -> list[Site]:
    """All sites of a model, in its order; there may be none."""
    found: dict[nn.Module, Site] = {}
    for place in places(check_model("model", model)):
        for site in sites_at(place, found):
            found[site.gate] = joined(found[site.gate], site) if site.gate in found else site
    return list(found.values())


def serve(sites: list[Site], ability: str, why_not: Callable[[Site], str | None]) -> list[Site]:
    """The same sites, all of which an ability serves; TypeError if it cannot serve one.

    Args:
        why_not: the reason why a site cannot be served; None if it can.
    """
    reasons = {site: reason for site in sites if (reason := why_not(site)) is not None}
    if reasons:
        refused = "; ".join(f"{site.name!r} ({site.kind}): {reason}" for site, reason in reasons.items())
        rest = [site.name for site in sites if site not in reasons]
        remedy = f". For the other gates alone pass gates={rest}" if rest else ""
        raise TypeError(f"{ability} cannot serve {refused}{remedy}")
    return sites


def chosen(sites: list[Site], ability: str, gates: Gates) -> list[Site]:
    """The sites that `gates` names, in the model's order."""
    if not isinstance(gates, str | nn.Module | Iterable):
        raise TypeError(f"gates of {ability} must be names or modules of gates, in a list, got {gates!r}")
    wanted = [gates] if isinstance(gates, str | nn.Module) else list(gates)
    for one in wanted:
        if not any(is_named(site, one) for site in sites):
            what = f"this {type(one).__name__}" if isinstance(one, nn.Module) else repr(one)
            names = ", ".join(repr(name) for site in sites for name in site.names)
            raise ValueError(f"gates of {ability} has {what}, which is no gate of the model: there are {names}")
    if not wanted:
        raise ValueError(f"gates of {ability} is empty: name some, or leave it out for all")
    return [site for site in sites if any(is_named(site, one) for one in wanted)]


def is_named(site: Site, one: Any) -> bool:
    if isinstance(one, str):
        return one in site.names
    modules = [site.gate, site.called, *(location.layer for location in site.locations)]
    return any(one is module or (module is not None and one is unwrapped(module)) for module in modules)


# Modules


class Place(NamedTuple):
    """A module at one of its paths."""

    name: str  # the path, without wrappers
    called: nn.Module  # the outermost wrapper, or the module itself
    module: nn.Module
    above: tuple[nn.Module, ...]  # the modules around it, outermost first

    def site(self, path: str, num_experts: int, layer: nn.Module | None, **more: Any) -> Site:
        """The site of what routes at a path below this module, "" for itself, in a layer."""
        called = self.module.get_submodule(path) if path else self.called
        location = Location(f"{self.name}.{path}".strip(".") or "gate", layer)
        around = nearest_reader((*self.above, self.called))
        return Site(unwrapped(called), called, num_experts, around, (location,), **more)


def places(model: nn.Module) -> Iterator[Place]:
    """Every module of a model, at every path. Wrappers and copies that do not compute are left out."""
    todo = [Place("", model, unwrapped(model), ())]
    while todo:
        place = todo.pop()
        yield place
        above = (*place.above, place.module)
        for name, child in reversed(place.module._modules.items()):
            if child is not None and (module := unwrapped(child)) not in above:
                todo.append(Place(f"{place.name}.{name}".lstrip("."), child, module, above))


# Sites


def sites_at(place: Place, found: dict[nn.Module, Site]) -> Iterator[Site]:
    """The sites that a module shows: those of its parts, if it is a layer or a block, or its own."""
    module: Any = place.module
    if isinstance(module, HeirarchicalMoE):
        outer = module.num_experts_outer
        yield place.site("gate_outer", outer, place.called)
        level_one = found[unwrapped(module.gate_outer)]
        yield place.site("gate_inner", module.num_experts_inner, place.called, outer=(outer,), level_one=level_one)
    elif isinstance(module, MoE):
        yield place.site("gate", module.num_experts, place.called)
    elif (recipe := recipe_of(module)) is not None:
        block = BlockSettings(module, recipe)
        path = next(name for name in KEEPS["router"] if isinstance(find(module, name), nn.Module))
        yield place.site(path, block.num_logits, module, block=block)
    elif isinstance(module, Gate) and module not in found:
        yield place.site("", module.num_experts, None, outer=module.outer_expert_dims)


def joined(one: Site, other: Site) -> Site:
    """One site of a gate that stands in several places."""
    called = one.called if one.called is other.called else one.gate
    locations = [each for each in dict.fromkeys((*one.locations, *other.locations)) if each.layer is not None]
    return replace(other, called=called, locations=tuple(locations) or one.locations, around=one.around)
