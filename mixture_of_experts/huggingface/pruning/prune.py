"""Defines `prune`, which removes experts from a model, and `expert_scores`, which computes the scores of a model's
experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixture_of_experts.huggingface.feed_forward import SparseFeedForward, find_feed_forwards, find_layers
from mixture_of_experts.huggingface.pruning.scoring import MEASURED_RULES, MeasuredRule, measure_scores
from mixture_of_experts.huggingface.pruning.slicing import (
    check_num_kept,
    get_expert_stack,
    get_layer,
    iter_expert_tensors,
    pruning_unsupported_reason,
    slice_experts,
)
from mixture_of_experts.huggingface.replacement.dense_ffn import check_not_on_meta
from mixture_of_experts.huggingface.router_config import has_own_routers
from mixture_of_experts.huggingface.saving.configuration import find_outermost_models, store_layers_in_config
from mixture_of_experts.support.checks import check_choice, check_model, check_size
from mixture_of_experts.whole_model.router_discovery import GateSelection, RouterHandle, check_supported, find_routers

PruneRule = Literal["reap", "frequency", "random"]
PRUNE_RULES = (*MEASURED_RULES, "random")
# names of settings that store the number of experts
NUM_EXPERTS_PATTERN = re.compile(r"(num|n)_(local_|routed_)?experts$|moe_num_experts$")
KeptExperts = dict[str, list[int]]


def prune(
    model: nn.Module,
    keep: int | None = None,
    by: PruneRule | Mapping[str, Any] = "reap",
    *,
    calibration: Any = None,
    gates: GateSelection | None = None,
) -> KeptExperts:
    """Remove experts from a model's layers in place. Return the ids of the experts that each layer keeps, keyed by gate
    name.

    This function also removes the corresponding columns of the router's weight and the corresponding elements of its
    bias, expert bias and expert counts. All expert groups keep the same number of experts. `k`, the order of the
    remaining experts and all other settings are unchanged. The configuration is updated, so that the model can still be
    saved, loaded and exported. The remaining parameters are new tensors.

    Args:
        model: any model with `MoE` layers, such as one modified by `upcycle`, `replace_ffn` or `from_transformers`.
            Construct the optimizer and wrap the model (DDP, FSDP2) after pruning.
        keep: number of experts that each layer keeps, which must be at least k.
        by: how to choose the experts to keep. "reap" multiplies the router weight by the norm of the expert's output,
            and keeps the experts with the largest mean of this product over the tokens that they process (arXiv
            2510.13999, equation 9). "frequency" keeps the experts that process the most tokens. "random" chooses
            experts with torch's random generator. If `by` is a mapping from gate names to floating-point scores `(e,)`,
            such as those returned by `expert_scores`, each layer keeps the experts with the largest scores. If it is a
            mapping from gate names to expert ids, each layer keeps these experts, and `keep` can be omitted. Layers
            that are not in the mapping are not changed.
        calibration: batches of data for "reap" and "frequency". Each batch is a tensor, or a dictionary or tuple of the
            model's inputs, on the model's device. Padding is ignored.
        gates: the gates of the layers to prune, specified as names or as modules. Default: all gates.

    Raises:
        TypeError: the experts of a router cannot be pruned, or an argument has the wrong type. The error message names
            the router and states the reason.
        ValueError: an argument has an invalid value, a layer receives no tokens from the calibration data, or the
            model's weights are not in memory. The model is not changed in these cases.

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
    kept, configure = plan_pruning(check_model("model", model), keep, by, calibration, gates)
    for router, ids in kept.items():
        if len(ids) < router.num_experts:
            slice_experts(router, ids)
    configure()
    return {router.name: ids for router, ids in kept.items()}


def plan_pruning(
    model: nn.Module, keep: int | None, by: Any, calibration: Any = None, gates: GateSelection | None = None
) -> tuple[dict[RouterHandle, list[int]], Callable[[], None]]:
    """Check the arguments of `prune`, and choose the experts that each router keeps. The model is not changed.

    Return the ids of these experts, and a function that updates the model's configuration. The returned function must
    be called before the model is saved. Arguments and errors are the same as for `prune`.
    """
    if isinstance(by, Mapping):
        if not (gates is calibration is None and all(isinstance(name, str) for name in by)):
            raise ValueError("`by` already maps gate names to experts; omit `gates` and `calibration`")
        gates = list(by)
    elif check_choice("by", by, PRUNE_RULES) and keep is None:
        raise ValueError(f"by={by!r} requires `keep`, the number of experts to keep in each layer")
    routers = find_prunable_routers(model, gates)
    if keep is not None:
        for router in routers:
            check_num_kept(router, check_size("keep", keep))
    if isinstance(by, Mapping):
        scores_or_ids = {router: by[name] for router in routers for name in router.names if name in by}
    elif by == "random":
        scores_or_ids = {router: torch.rand(router.num_experts) for router in routers}
    else:
        scores_or_ids = measure_scores(model, routers, by, calibration)
    kept = {router: select_expert_ids(router, scores_or_ids[router], keep) for router in routers}
    smaller = {get_layer(router): len(ids) for router, ids in kept.items() if len(ids) < router.num_experts}
    inner_models = filter(find_feed_forwards, find_outermost_models(model))
    settings = {inner: find_num_experts_settings(inner, smaller) for inner in inner_models}

    def configure() -> None:
        for inner, (names, old, new) in settings.items():
            if not smaller.keys().isdisjoint(inner.modules()):
                store_layers_in_config(inner)
                models = [module for module in inner.modules() if isinstance(module, PreTrainedModel)]
                for holder in (*models, inner.config.get_text_config()):
                    vars(holder).update({name: new for name in names if vars(holder).get(name) == old})

    return kept, configure


def expert_scores(
    model: nn.Module, by: MeasuredRule = "reap", *, calibration: Any, gates: GateSelection | None = None
) -> dict[str, Tensor]:
    """Compute the scores `(e,)` of each layer's experts, and return them keyed by gate name. `prune` keeps the experts
    with the largest scores.

    Args:
        model, calibration, gates: see `prune`. The model is not changed.
        by: the type of score, "reap" or "frequency"; see `prune`.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.huggingface import expert_scores
        >>> scores = expert_scores(MoE(dim=8, num_experts=4), "frequency", calibration=[torch.randn(2, 16, 8)])
        >>> scores["gate"].shape
        torch.Size([4])
    """
    check_choice("by", by, MEASURED_RULES)
    routers = find_prunable_routers(check_model("model", model), gates)
    return {router.name: scores for router, scores in measure_scores(model, routers, by, calibration).items()}


def find_prunable_routers(model: nn.Module, gates: GateSelection | None) -> list[RouterHandle]:
    """Return the routers selected by `gates`. Raise TypeError if the experts of any selected router cannot be
    pruned."""
    routers = check_supported(find_routers(model, "prune", gates), "prune", pruning_unsupported_reason)
    stacks = Counter(map(get_expert_stack, routers))
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for router in routers:
        weights = [id(getattr(module, name)) for module, name, _ in iter_expert_tensors(router)]
        if stacks[get_expert_stack(router)] > 1 or any(holders[weight] > 1 for weight in weights):
            raise TypeError(
                f"prune does not support {router.name!r}, because its experts, router weights or expert weights are "
                "shared with another module; untie them"
            )
    check_not_on_meta(model, type(model).__name__)
    return routers


def select_expert_ids(router: RouterHandle, scores_or_ids: Any, keep: int | None) -> list[int]:
    """Choose which experts a router keeps, given their scores or the ids to keep, and return their ids. Each expert
    group keeps the same number of experts. Raise ValueError or TypeError if the scores or ids are invalid."""
    e, groups = router.num_experts, getattr(router.gate, "num_groups", None) or 1
    wrong = (
        f"expected by[{router.name!r}] to be finite floating-point scores of shape ({e},), or distinct ids below {e}, "
        f"but got {scores_or_ids!r:.99}"
    )
    try:
        values = torch.as_tensor(scores_or_ids).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    kept = torch.zeros(groups, e // groups, dtype=torch.bool)
    if values.is_floating_point():
        if values.shape != (e,) or not values.isfinite().all():
            raise ValueError(wrong)
        if keep is None:
            raise ValueError("scores require `keep`, the number of experts to keep in each layer")
        order = values.view_as(kept).argsort(dim=-1, descending=True, stable=True)  # ties go to the lowest id
        kept.scatter_(1, order[:, : keep // groups], True)
    else:
        ids = values.flatten().tolist()
        if values.dtype == torch.bool or values.ndim != 1 or len({*ids}.intersection(range(e))) < len(ids):
            raise ValueError(wrong)
        if keep not in (None, len(ids)):
            raise ValueError(f"keep={keep} does not match the {len(ids)} ids in by[{router.name!r}]; omit keep")
        check_num_kept(router, len(ids))
        kept.view(-1)[ids] = True
        if len({*(counts := kept.sum(dim=-1).tolist())}) > 1:
            raise ValueError(
                f"expected {router.name!r} to keep the same number of experts per group, but got {counts} from {ids}"
            )
    return kept.flatten().nonzero().flatten().tolist()


# The configuration


def find_num_experts_settings(model: PreTrainedModel, numbers: Mapping[Any, int]) -> tuple[list[str], int, int]:
    """Return the names of the configuration settings that store the number of experts, along with this number before
    and after pruning.

    Args:
        model: a `transformers` model, which is not inside another one.
        numbers: the number of experts that remain in each pruned layer.

    Raises:
        ValueError: converted sparse blocks would have different numbers of experts, but the configuration stores a
            single number; or no setting of the configuration stores the number of experts.
    """
    layers, text = find_layers(model).values(), model.config.get_text_config()
    blocks = [layer.moe for layer in layers if isinstance(layer, SparseFeedForward)]
    moes = blocks or ([] if has_own_routers(text) else [layer.moe for layer in layers])
    if not moes:
        return [], 0, 0
    old = moes[0].num_experts
    new, *differ = sorted({numbers.get(moe, moe.num_experts) for moe in blocks or moes[:1]})
    if differ:
        raise ValueError(
            f"all layers of {type(model).__name__} must keep the same number of experts, because the model's "
            f"configuration stores a single number, but got {[new, *differ]}"
        )
    # without blocks, `add_router_config` has set "num_experts"
    names = [name for name in vars(text) if NUM_EXPERTS_PATTERN.search(name)] if blocks else ["num_experts"]
    if new < old and blocks and not any(vars(text)[name] == old for name in names):
        raise ValueError(
            f"no setting of {type(text).__name__} has the value {old}, which is the number of experts in its blocks"
        )
    return [*names, "num_experts"], old, new
