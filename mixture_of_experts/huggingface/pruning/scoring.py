"""Computes expert scores from forward passes on calibration data.

Axes: r (rows), e (experts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments, join_groups
from mixture_of_experts.dispatch.permutation import permute_without_gaps
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.dispatch.rows import dispatch
from mixture_of_experts.huggingface.pruning.slicing import get_layer
from mixture_of_experts.huggingface.replacement.dense_ffn import eval_mode
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.private_torch import disable_compilation
from mixture_of_experts.whole_model.router_discovery import RouterHandle
from mixture_of_experts.wrappers import list_nested_experts

MeasuredRule = Literal["reap", "frequency"]
MEASURED_RULES = ("reap", "frequency")


def measure_scores(
    model: nn.Module, routers: list[RouterHandle], by: str, calibration: Any
) -> dict[RouterHandle, Tensor]:
    """Compute the scores `(e,)` of each router's experts in float64."""
    several = isinstance(calibration, Iterable) and not isinstance(calibration, Tensor | Mapping | str)
    with Attachments() as attached, eval_mode(model), torch.no_grad(), disable_compilation(model):
        totals = {router: attach_score_hooks(attached, router, by) for router in routers}
        for batch in calibration if several else [calibration]:
            run_calibration_batch(model, batch)
    if unused := [router.name for router, (counts, _) in totals.items() if not counts.any()]:
        raise ValueError(f"no calibration tokens reached {', '.join(unused)}; pass batches that reach these gates")
    return {router: sums / counts.clamp(min=1) if by == "reap" else counts for router, (counts, sums) in totals.items()}


def attach_score_hooks(attached: Attachments, router: RouterHandle, by: str) -> Tensor:
    """Register hooks that accumulate the results of `measure_call` for a router's experts, and return the tensor that
    holds the sums."""
    total = torch.zeros(2, router.num_experts, dtype=torch.float64)
    last: list[Routing] = []

    def decided(gate: nn.Module, args: object, routing: Routing) -> None:
        last[:] = [replace(routing, padding_weight=None)]  # without padding

    def read(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        total.add_(measure_call(experts, args[0], join_groups(*last), by).cpu())

    attached.add_forward_hook(router.hook_target, decided)
    attached.add_forward_pre_hook(find_computing_experts(router), read)
    return total


def find_computing_experts(router: RouterHandle) -> nn.Module:
    """Return the module that runs a router's experts on rows of tokens, without the modules that wrap it."""
    return next(e for e in list_nested_experts(get_layer(router).experts) if getattr(e, "works_on", None) != "tokens")


def measure_call(experts: Any, x: Tensor, assignments: Assignments, by: str) -> Tensor:
    """Return statistics `(2, e)` for one call to the experts. The first row contains the number of tokens that each
    expert processes. For "reap", the second row contains the router weight times the output norm, summed over these
    tokens."""
    permutation = permute_without_gaps(assignments)
    counts = permutation.rows_per_expert
    assert counts is not None
    numbers = torch.stack([counts, torch.zeros_like(counts)]).double()
    if by == "reap":
        rows, weight = dispatch(x, permutation), permutation.row_weight()
        if getattr(experts, "works_on", None) == "inputs":
            rows, weight = (rows * weight.unsqueeze(-1)).to(x.dtype), torch.ones_like(weight)
        expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        norm = torch.linalg.vector_norm(experts.compute(rows, counts)[: len(expert)].double(), dim=-1)
        numbers[1].index_add_(0, expert, weight[: len(expert)] * norm)
    return numbers


def run_calibration_batch(model: nn.Module, batch: Any) -> None:
    """Run the model on a batch of calibration data."""
    named, several = isinstance(batch, Mapping), isinstance(batch, tuple | list)
    parts = batch.values() if named else batch if several else [batch]
    if not any(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            "expected `calibration` to be batches of tokens (tensors, or dicts or tuples of tensors, such as a "
            f"tokenizer's output with return_tensors='pt'), but got {batch!r:.99}"
        )
    _ = model(**batch) if named else model(*parts)
