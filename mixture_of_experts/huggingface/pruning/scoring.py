"""Scores experts by what they do in forwards on a text.

Axes: t tokens, r rows, e experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.around import EnclosedExperts, InputWeightedExperts
from mixture_of_experts.dispatch.decision import Decision, decision_of
from mixture_of_experts.dispatch.moving import dispatch
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.huggingface.pruning.cutting import PrunableLayer
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch, current, within
from mixture_of_experts.whole_model.sites import Site, unwrapped

MeasuredRule = Literal["reap", "frequency"]
MEASURED = ("reap", "frequency")


class CalibrationCall(ForwardCall):
    """A forward on the text: what each gate decided, and the sums `(e,)` of that forward."""

    def __init__(self) -> None:
        self.routings: dict[Site, Routing] = {}
        self.counts: list[tuple[Site, Tensor]] = []
        self.sums: list[tuple[Site, Tensor]] = []


class Calibration(Watch):
    """Sums, over the forwards that end well, each expert's tokens and the sizes of what it adds to them."""

    def __init__(self, sites: list[Site]) -> None:
        super().__init__(owner=self)
        self.counts = {site: torch.zeros(site.num_experts, dtype=torch.float64) for site in sites}
        self.sums = {site: torch.zeros(site.num_experts, dtype=torch.float64) for site in sites}

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CalibrationCall:
        return CalibrationCall()

    def ended(self, call: CalibrationCall, output: Any) -> None:
        for site, counts in call.counts:
            self.counts[site] += counts.cpu()
        for site, sums in call.sums:
            self.sums[site] += sums.cpu()

    def gate_decided(self, site: Site, gate: nn.Module, args: object, routing: Routing) -> None:
        if isinstance(call := current(self), CalibrationCall):
            call.routings[site] = routing
            expert = routing.expert[routing.kept]
            call.counts.append((site, expert.bincount(minlength=site.num_experts)))

    def experts_read(
        self, site: Site, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if isinstance(call := current(self), CalibrationCall) and site in call.routings:
            without_padding = decision_of(replace(call.routings[site], uncounted=None))
            call.sums.append((site, weighted_norms(experts, args[0], without_padding)))


def weighted_norms(experts: Any, x: Tensor, decision: Decision) -> Tensor:
    """`(e,)`, for each expert the sum, over the tokens that it computes, of weight times the norm of its output."""
    plan = decision.without_gaps()
    assert plan.rows_per_expert is not None
    rows, weight = dispatch(x, plan), plan.row_weight()
    if isinstance(experts, InputWeightedExperts):
        rows, weight = (rows * weight.unsqueeze(-1)).to(x.dtype), torch.ones_like(weight)
    expert = torch.arange(len(plan.rows_per_expert), device=x.device).repeat_interleave(plan.rows_per_expert)
    out = experts.compute(rows, plan.rows_per_expert)[: len(expert)]
    sizes = weight[: len(expert)].double() * torch.linalg.vector_norm(out.double(), dim=-1)
    return sizes.new_zeros(len(plan.rows_per_expert)).index_add(0, expert, sizes)


def measure(model: nn.Module, sites: list[Site], by: str, calibration: Any) -> dict[str, Tensor]:
    """The scores `(e,)` float64 of each site's experts, by its name."""
    batches = as_batches(calibration)
    watch, modes = Calibration(sites), [(module, module.training) for module in model.modules()]
    with Attached() as attached, torch.no_grad():
        for site in sites:
            attached.after(site.called, partial(watch.gate_decided, site))
            if by == "reap":
                attached.before(computing(PrunableLayer(site).moe.experts), partial(watch.experts_read, site))
        watch.follow(model, attached)
        try:
            model.eval()
            for batch in batches:
                with within([(watch, ForwardCall())]):
                    run(model, batch)
        finally:
            for module, mode in modes:
                module.training = mode
    unused = [site.name for site in sites if not watch.counts[site].any()]
    if unused:
        raise ValueError(f"calibration has no tokens for {', '.join(unused)}: give batches that reach these gates")
    if by == "frequency":
        return {site.name: watch.counts[site] for site in sites}
    return {site.name: watch.sums[site] / watch.counts[site].clamp(min=1) for site in sites}


def as_batches(calibration: Any) -> Iterable[Any]:
    """The batches of a text: those of an iterable, or a single one."""
    if isinstance(calibration, Tensor | Mapping):
        return [calibration]
    if calibration is None or isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be batches of tokens, such as [tokenizer(text, return_tensors='pt')], got "
            f"{type(calibration).__name__}: the rules {', '.join(MEASURED)} read it"
        )
    return calibration


def run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise TypeError(
            f"a batch of calibration is a tensor, a dict or a tuple of arguments of the model, got "
            f"{type(batch).__name__}: make it by a tokenizer"
        )


def computing(experts: nn.Module) -> nn.Module:
    """The experts that are called with tokens and a decision and compute rows, inside modules around them."""
    experts = unwrapped(experts)
    return computing(experts.experts) if isinstance(experts, EnclosedExperts) else experts
