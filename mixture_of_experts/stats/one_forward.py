"""`routing_of`: what the gates of a model decide in one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.stats.external_routers import readers_of, why_no_routing
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.whole_model.sites import Site, find_sites, serve


@torch.no_grad()
def routing_of(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Routing]:
    """Run one forward of a model without gradients, in its current mode, and return what each gate decided.

    Args:
        model: a model with gates, as for `track_routing`; not a compiled one, whose graph has no hooks.
        args, kwargs: arguments of the model.

    Returns:
        The `Routing` of each gate, by its path in the model. A gate that ran more than once has that of its last call.
        A router of transformers has one made from what it returned.

    Raises:
        ValueError: the model has no gate.
        RuntimeError: no gate ran.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.stats import routing_of
        >>> routing = routing_of(MoE(dim=8, num_experts=4), torch.randn(1, 5, 8))
        >>> routing["gate"].probs.shape
        torch.Size([1, 5, 4])
    """
    sites = serve(find_sites(model, "routing_of"), "routing_of", why_no_routing)
    readers, found = readers_of(sites), {}
    with Attached() as hooks:
        for site in sites:

            def hook(gate: nn.Module, inputs: object, output: Any, site: Site = site) -> None:
                found[site.name] = readers[site].routing(site, output) if site.external else output

            hooks.after(site.called, hook)
        for reader in set(readers.values()):
            reader.follow(reader.model, hooks)
        model(*args, **kwargs)
    if not found:
        raise RuntimeError(
            f"no gate of the {type(model).__name__} ran: give routing_of the model's own arguments, and call it before "
            "the model is compiled"
        )
    return {site.name: found[site.name] for site in sites if site.name in found}
