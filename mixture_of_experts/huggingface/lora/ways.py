"""The ways of `ops` for adapted networks: each computes low-rank parts on rows, and none sums weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mixture_of_experts.huggingface.lora import rows
from mixture_of_experts.huggingface.lora.network import AdaptedNetwork, LowRank
from mixture_of_experts.ops import batched, cpu, grouped, plain
from mixture_of_experts.ops.cpu import fused
from mixture_of_experts.ops.network import Call


class Way(NamedTuple):
    """A way to compute a call: the two functions that a module of `ops` has, too."""

    why_not: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]


def why_not_grouped(call: Call) -> str | None:
    """Why there is no grouped operator for a weight or a part of one."""
    parts = [part for _, *weights in adapted(call).adapted() for part in weights]
    weights = [part for part in parts if part is not None]
    return next((reason for weight in weights if (reason := grouped.why_no_operator(call.x, weight))), None)


def run_grouped(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`."""
    if call.x.is_cuda and batched.why_not(call) is None:
        return batched.run_rows(call, grouped.GroupedProducts, rows)
    return run_operators(call, grouped.grouped_product)


def run_operators(call: Call, product: plain.Product = plain.expert_product) -> Tensor:
    """Compute a call in operators that autograd differentiates; return `(t, o)`."""

    def multiply(x: Tensor, weight: Any, num_tokens_per_expert: Tensor | None) -> Tensor:
        w: LowRank = weight
        out = product(x, w.weight, num_tokens_per_expert)
        if w.down is None:
            return out
        return out + product(product(x, w.down, num_tokens_per_expert), w.up, num_tokens_per_expert)

    return plain.compute(call.x, plain.plan_of(call.decision), adapted(call).spelled(), multiply)


def adapted(call: Call) -> AdaptedNetwork:
    """The network of a call."""
    assert isinstance(call.network, AdaptedNetwork)
    return call.network


WAYS = {
    "cpu": Way(cpu.why_not, lambda call: fused.run(call, rows)),
    "grouped": Way(why_not_grouped, run_grouped),
    "batched": Way(batched.why_not, lambda call: batched.run_rows(call, on_rows=rows)),
    "plain": Way(plain.why_not, run_operators),
}
