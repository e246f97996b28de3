"""Scores experts by what they do in forwards on a text.

Axes: r rows, e experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.around import with_inner
from mixture_of_experts.dispatch.decision import Decision, decision_of
from mixture_of_experts.dispatch.moving import dispatch
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.huggingface.pruning.cutting import layer_of
from mixture_of_experts.huggingface.replacement.adapters import evaluating
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.private_torch import uncompiled
from mixture_of_experts.whole_model.sites import Site

MeasuredRule = Literal["reap", "frequency"]
MEASURED = ("reap", "frequency")


def measure(model: nn.Module, sites: list[Site], by: str, calibration: Any) -> dict[Site, Tensor]:
    """The scores `(e,)` float64 of each site's experts."""
    several = isinstance(calibration, Iterable) and not isinstance(calibration, Tensor | Mapping | str)
    with Attached() as attached, evaluating(model), torch.no_grad(), uncompiled(model):
        totals = {site: watch(attached, site, by) for site in sites}
        for batch in calibration if several else [calibration]:
            run(model, batch)
    if unused := [site.name for site, (counts, _) in totals.items() if not counts.any()]:
        raise ValueError(f"calibration has no tokens for {', '.join(unused)}: give batches that reach these gates")
    return {site: sums / counts.clamp(min=1) if by == "reap" else counts for site, (counts, sums) in totals.items()}


def watch(attached: Attached, site: Site, by: str) -> Tensor:
    """Sum up what a site's experts do in forwards, in the tensor that is returned; see `numbers_of`."""
    total = torch.zeros(2, site.num_experts, dtype=torch.float64)
    last: list[Routing] = []

    def decided(gate: nn.Module, args: object, routing: Routing) -> None:
        last[:] = [replace(routing, uncounted=None)]  # without padding

    def read(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        total.add_(numbers_of(experts, args[0], decision_of(*last), by).cpu())

    attached.after(site.called, decided)
    attached.before(computing(site), read)
    return total


def computing(site: Site) -> nn.Module:
    """The experts of a site that compute rows of tokens, inside modules around them."""
    return next(e for e in with_inner(layer_of(site).experts) if getattr(e, "works_on", None) != "tokens")


def numbers_of(experts: Any, x: Tensor, decision: Decision, by: str) -> Tensor:
    """`(2, e)`: the tokens that each expert computes, and for "reap" the sum over them of weight times norm of its
    output."""
    plan = decision.without_gaps()
    counts = plan.rows_per_expert
    assert counts is not None
    numbers = torch.stack([counts, torch.zeros_like(counts)]).double()
    if by == "reap":
        rows, weight = dispatch(x, plan), plan.row_weight()
        if getattr(experts, "works_on", None) == "inputs":
            rows, weight = (rows * weight.unsqueeze(-1)).to(x.dtype), torch.ones_like(weight)
        expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        norm = torch.linalg.vector_norm(experts.compute(rows, counts)[: len(expert)].double(), dim=-1)
        numbers[1].index_add_(0, expert, weight[: len(expert)] * norm)
    return numbers


def run(model: nn.Module, batch: Any) -> None:
    """Call the model on a batch."""
    named, several = isinstance(batch, Mapping), isinstance(batch, tuple | list)
    parts = batch.values() if named else batch if several else [batch]
    if not any(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            "calibration must be batches of tokens: tensors, or dicts or tuples with tensors (a tokenizer returns them "
            f"with return_tensors='pt'), got {batch!r:.99}"
        )
    _ = model(**batch) if named else model(*parts)
