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
from mixture_of_experts.huggingface.replacement.adapters import evaluating
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.private_torch import unwrapped
from mixture_of_experts.whole_model.sites import Site

MeasuredRule = Literal["reap", "frequency"]
MEASURED = ("reap", "frequency")


class Calibration:
    """Counts the tokens of each expert of a site, and sums the sizes of what it adds to them."""

    total: Tensor  # (2, e)
    routing: Routing  # of the gate's last call

    def __init__(self, num_experts: int, by: str) -> None:
        self.by = by
        self.total = torch.zeros(2, num_experts, dtype=torch.float64)

    def decided(self, gate: nn.Module, args: object, routing: Routing) -> None:
        self.routing = routing

    def read(self, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        without_padding = decision_of(replace(self.routing, uncounted=None))
        self.total += self.numbers_of(experts, args[0], without_padding).cpu()

    def scores(self) -> Tensor:
        counts, sums = self.total
        return sums / counts.clamp(min=1) if self.by == "reap" else counts

    def numbers_of(self, experts: Any, x: Tensor, decision: Decision) -> Tensor:
        """`(2, e)`: the tokens that each expert computes, and the sum over them of weight times norm of its output."""
        plan = decision.without_gaps()
        counts = plan.rows_per_expert
        assert counts is not None
        numbers = torch.stack([counts, torch.zeros_like(counts)]).double()
        if self.by == "reap":
            rows, weight = dispatch(x, plan), plan.row_weight()
            if getattr(experts, "works_on", None) == "inputs":
                rows, weight = (rows * weight.unsqueeze(-1)).to(x.dtype), torch.ones_like(weight)
            expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
            norm = torch.linalg.vector_norm(experts.compute(rows, counts)[: len(expert)].double(), dim=-1)
            numbers[1].index_add_(0, expert, weight[: len(expert)] * norm)
        return numbers


def measure(model: nn.Module, sites: list[Site], by: str, calibration: Any) -> dict[str, Tensor]:
    """The scores `(e,)` float64 of each site's experts, by its name."""
    several = isinstance(calibration, Iterable) and not isinstance(calibration, Tensor | Mapping | str)
    calibrations = {site: Calibration(site.num_experts, by) for site in sites}
    eager = torch.compiler.set_stance("force_eager")  # graphs call no hooks
    with Attached() as attached, evaluating(model), torch.no_grad(), eager:
        for site, each in calibrations.items():
            attached.after(site.called, each.decided)
            attached.before(computing(site.locations[0].layer), each.read)
        for batch in calibration if several else [calibration]:
            run(model, batch)
    if unused := [site.name for site, each in calibrations.items() if not each.total[0].any()]:
        raise ValueError(f"calibration has no tokens for {', '.join(unused)}: give batches that reach these gates")
    return {site.name: each.scores() for site, each in calibrations.items()}


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


def computing(layer: Any) -> nn.Module:
    """The experts of a layer that compute rows of tokens, inside modules around them."""
    holder: Any = unwrapped(layer)
    return next(e for e in with_inner(holder.experts) if getattr(e, "works_on", None) != "tokens")
