"""`prune`: fewer experts in the layers of a model; and `expert_scores`, by which it chooses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixture_of_experts.huggingface.feed_forward import SparseFeedForward, feed_forwards, layers_by_path
from mixture_of_experts.huggingface.pruning.cutting import (
    check_number,
    cut,
    layer_of,
    stack_of,
    tensors_to_cut,
    why_not_cut,
)
from mixture_of_experts.huggingface.pruning.scoring import MEASURED, MeasuredRule, measure
from mixture_of_experts.huggingface.replacement.adapters import refuse_meta
from mixture_of_experts.huggingface.router_config import reports_routers
from mixture_of_experts.huggingface.saving.configuration import note
from mixture_of_experts.support.checks import check_choice, check_model, check_size
from mixture_of_experts.whole_model.sites import Gates, Site, find_sites, serve

PruneRule = Literal["reap", "frequency", "random"]
RULES = (*MEASURED, "random")
NUMBER = re.compile(r"(num|n)_(local_|routed_)?experts$|moe_num_experts$")  # of experts, in configurations
Chosen = dict[str, list[int]]


def prune(
    model: nn.Module,
    keep: int | None = None,
    by: PruneRule | Mapping[str, Any] = "reap",
    *,
    calibration: Any = None,
    gates: Gates | None = None,
) -> Chosen:
    """Remove experts of a model's layers, in place; return the ids that each layer keeps, by the name of its gate.

    A router loses the columns of the experts that go, with its bias, the expert bias and its counts. Of expert groups
    each keeps equally many. The order of the others stays, and so do k and all settings. The configuration follows, so
    that the model saves, loads and exports as before. Parameters are new tensors: make the optimizer afterwards.

    Args:
        model: any model with `MoE` layers, such as one that `upcycle`, `replace_ffn` or `from_transformers` changed. An
            optimizer or wrapper (DDP, FSDP2) comes afterwards.
        keep: number of experts that each layer keeps, at least k.
        by: which ones. "reap": of the largest mean of router weight times norm of the expert's output, over the tokens
            that it computes (arXiv 2510.13999, equation 9). "frequency": of the most tokens. "random": any, by torch's
            generator. Or by names of gates: scores `(e,)`, floating, as `expert_scores` returns; or the ids to keep,
            without `keep`. Layers that it does not name stay as they are.
        calibration: for "reap" and "frequency" ("random" needs none): batches of a text, tensors or dicts or tuples of
            what the model reads, on its device. Padding does not count.
        gates: the gates whose layers are pruned, by their names or as modules; by default all.

    Raises:
        TypeError: a gate is none that can be cut (the error names it and says why), or an argument has a wrong type.
        ValueError: a number or id is not allowed, the calibration has no tokens, or the model's weights are not in
            memory. Nothing is changed then.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating
        >>> from mixture_of_experts.huggingface import prune
        >>> moe = MoE(dim=8, gate=TopKGating(8, 4, k=2))
        >>> prune(moe, by={"gate": [0, 2, 3]})
        {'gate': [0, 2, 3]}
        >>> moe.experts.w1.shape, moe.gate.w_gating.shape
        (torch.Size([3, 8, 32]), torch.Size([8, 3]))
        >>> len(prune(moe, 2, calibration=[torch.randn(2, 16, 8)])["gate"])
        2
    """
    check_model("model", model)
    if isinstance(by, Mapping):
        if not (gates is calibration is None and all(isinstance(name, str) for name in by)):
            raise ValueError("by has names of gates, which tell all: leave gates and calibration out")
        gates = list(by)
    elif check_choice("by", by, RULES) and keep is None:
        raise ValueError(f"by={by!r} needs keep=, the number of experts that each layer keeps")
    sites = prunable(model, gates)
    if keep is not None:
        for site in sites:
            check_number(site, check_size("keep", keep))
    if isinstance(by, Mapping):
        given = {site: by[name] for site in sites for name in site.names if name in by}
    elif by == "random":
        given = {site: torch.rand(site.num_experts) for site in sites}
    else:
        given = measure(model, sites, by, calibration)
    kept = {site: ids_of(site, given[site], keep) for site in sites}
    smaller = {site: ids for site, ids in kept.items() if len(ids) < site.num_experts}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    names, old, new = told_number(models, {layer_of(site): len(ids) for site, ids in smaller.items()})
    for site, ids in smaller.items():
        cut(site, ids)
    if smaller and models and feed_forwards(models[0]):
        note(models[0])
        for holder in (*models, models[0].config.get_text_config()):
            vars(holder).update({name: new for name in names if vars(holder).get(name) == old})
    return {site.name: ids for site, ids in kept.items()}


def expert_scores(
    model: nn.Module, by: MeasuredRule = "reap", *, calibration: Any, gates: Gates | None = None
) -> dict[str, Tensor]:
    """The scores `(e,)` of each layer's experts, by the name of its gate; `prune` keeps the largest.

    Args:
        model, calibration, gates: as in `prune`. The model is not changed.
        by: "reap" or "frequency".

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.huggingface import expert_scores
        >>> scores = expert_scores(MoE(dim=8, num_experts=4), "frequency", calibration=[torch.randn(2, 16, 8)])
        >>> scores["gate"].shape
        torch.Size([4])
    """
    check_choice("by", by, MEASURED)
    sites = prunable(check_model("model", model), gates)
    return {site.name: scores for site, scores in measure(model, sites, by, calibration).items()}


def prunable(model: nn.Module, gates: Gates | None) -> list[Site]:
    """The sites of gates that can be cut; TypeError if one of them cannot."""
    sites = serve(find_sites(model, "prune", gates), "prune", why_not_cut)
    stacks = Counter(map(stack_of, sites))
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for site in sites:
        weights = [id(getattr(module, name)) for module, name, _ in tensors_to_cut(site)]
        if stacks[stack_of(site)] > 1 or any(holders[weight] > 1 for weight in weights):
            raise TypeError(
                f"prune cannot serve {site.name!r}: something else holds its experts, or weights of its router or "
                "experts, too: untie them"
            )
    refuse_meta(model, type(model).__name__)
    return sites


def ids_of(site: Site, given: Any, keep: int | None) -> list[int]:
    """The ids that stay, equally many of each expert group, from scores or from ids; ValueError or TypeError if they
    are wrong."""
    e, groups = site.num_experts, getattr(site.gate, "num_groups", None) or 1
    wrong = (
        f"by[{site.name!r}] must be scores ({e},), floating and finite, or different ids below {e}, got {given!r:.99}"
    )
    try:
        values = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    kept = torch.zeros(groups, e // groups, dtype=torch.bool)
    if values.is_floating_point():
        if values.shape != (e,) or not values.isfinite().all():
            raise ValueError(wrong)
        if keep is None:
            raise ValueError("scores need keep=, the number of experts that each layer keeps")
        order = values.view_as(kept).argsort(dim=-1, descending=True, stable=True)  # of equals the first
        kept.scatter_(1, order[:, : keep // groups], True)
    else:
        ids = values.flatten().tolist()
        if values.dtype == torch.bool or values.ndim != 1 or len({*ids}.intersection(range(e))) < len(ids):
            raise ValueError(wrong)
        if keep not in (None, len(ids)):
            raise ValueError(f"keep={keep}, but by[{site.name!r}] has {len(ids)} ids: leave keep out")
        check_number(site, len(ids))
        kept.view(-1)[ids] = True
        if len({*(counts := kept.sum(dim=-1).tolist())}) > 1:
            raise ValueError(f"{site.name!r} keeps equally many experts of each of its groups, got {counts}: {ids}")
    return kept.flatten().nonzero().flatten().tolist()


# The configuration


def told_number(models: list[PreTrainedModel], numbers: Mapping[Any, int]) -> tuple[list[str], int, int]:
    """The settings of a configuration that tell the number of experts in layers, and that number, before and after.

    Args:
        models: the models of transformers in a model, the outermost first.
        numbers: the experts that are left, of each layer that loses some.

    Raises:
        ValueError: layers that were blocks would differ, and the configuration has one number for all; or none of its
            settings tells it.
    """
    layers = [*layers_by_path(models[0]).values()] if models else []
    blocks = [layer.moe for layer in layers if isinstance(layer, SparseFeedForward)]
    text = models[0].config.get_text_config() if layers else None
    moes = blocks or ([] if reports_routers(text) else [layer.moe for layer in layers])
    if not moes:
        return [], 0, 0
    old = moes[0].num_experts
    new, *differ = sorted({numbers.get(moe, moe.num_experts) for moe in blocks or moes[:1]})
    if differ:
        raise ValueError(
            f"the layers of {type(models[0]).__name__} were blocks, whose configuration has one number of experts "
            f"for all: keep equally many in each, got {[new, *differ]}"
        )
    names = [name for name in vars(text) if NUMBER.search(name)] if blocks else ["num_experts"]  # as `announce` set it
    if new < old and blocks and not any(vars(text)[name] == old for name in names):
        raise ValueError(f"no setting of {type(text).__name__} is known to tell the {old} experts of its blocks")
    return [*names, "num_experts"], old, new
