"""Scores experts by what they do in forwards on a text.

Axes: r rows, e experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.around import with_inner
from mixture_of_experts.dispatch.decision import Decision, decision_of
from mixture_of_experts.dispatch.moving import dispatch
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.private_torch import uncompiled, unwrapped
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch, current, within
from mixture_of_experts.whole_model.sites import Site

MeasuredRule = Literal["reap", "frequency"]
MEASURED = ("reap", "frequency")


class CalibrationCall(ForwardCall):
    """A forward on the text: what each gate decided, and the numbers `(2, e)` of each layer, in its order."""

    def __init__(self) -> None:
        self.routings: dict[Site, Routing] = {}
        self.numbers: list[tuple[Site, Tensor]] = []


class Calibration(Watch):
    """Counts the tokens of each expert, and sums the sizes of what it adds to them, over forwards that end well."""

    totals: dict[Site, Tensor]

    def __init__(self, sites: list[Site], by: str) -> None:
        super().__init__(owner=self)
        self.by = by
        self.totals = {site: torch.zeros(2, site.num_experts, dtype=torch.float64) for site in sites}

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CalibrationCall:
        return CalibrationCall()

    def ended(self, call: CalibrationCall, output: Any) -> None:
        for site, numbers in call.numbers:
            self.totals[site] += numbers.cpu()

    def decided(self, site: Site, gate: nn.Module, args: object, routing: Routing) -> None:
        if (call := current(self)) is not None:
            call.routings[site] = routing

    def read(self, site: Site, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if (call := current(self)) is not None and site in call.routings:
            without_padding = decision_of(replace(call.routings[site], uncounted=None))
            call.numbers.append((site, self.numbers_of(experts, args[0], without_padding)))

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
    batches, watch = as_batches(calibration), Calibration(sites, by)
    modes = [(module, module.training) for module in model.modules()]
    with Attached() as attached, torch.no_grad(), uncompiled(model):
        for site in sites:
            attached.after(site.called, partial(watch.decided, site))
            attached.before(computing(site.locations[0].layer), partial(watch.read, site))
        watch.follow(model, attached)
        try:
            model.eval()
            for batch in batches:
                with within([(watch, ForwardCall())]):
                    run(model, batch)
        finally:
            for module, mode in modes:
                module.training = mode
    if unused := [site.name for site, (counts, _) in watch.totals.items() if not counts.any()]:
        raise ValueError(f"calibration has no tokens for {', '.join(unused)}: give batches that reach these gates")
    scores = {site.name: (counts, sums / counts.clamp(min=1)) for site, (counts, sums) in watch.totals.items()}
    return {name: mean if by == "reap" else counts for name, (counts, mean) in scores.items()}


def as_batches(calibration: Any) -> Iterable[Any]:
    """The batches of a text: those of an iterable, or a single one."""
    if isinstance(calibration, Tensor | Mapping):
        return [calibration]
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be batches of tokens, such as [tokenizer(text, return_tensors='pt')], got "
            f"{type(calibration).__name__}: {' and '.join(MEASURED)} read it"
        )
    return calibration


def run(model: nn.Module, batch: Any) -> None:
    if not isinstance(batch, Tensor | Mapping | tuple | list) or is_plain(batch):
        raise TypeError(
            "a batch of calibration is a tensor, or a dict or tuple with tensors (a tokenizer returns them with "
            f"return_tensors='pt'), got {batch!r:.99}"
        )
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*([batch] if isinstance(batch, Tensor) else batch))


def is_plain(batch: Any) -> bool:
    """Whether there is nothing but numbers and words, and lists of them."""
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    return all(map(is_plain, parts)) if isinstance(parts, list | tuple) else isinstance(parts, int | float | str | None)


def computing(layer: Any) -> nn.Module:
    """The experts of a layer that compute rows of tokens, inside modules around them."""
    holder: Any = unwrapped(layer)
    return next(e for e in with_inner(holder.experts) if getattr(e, "works_on", None) != "tokens")
