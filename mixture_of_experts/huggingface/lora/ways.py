"""The ways of `ops` for adapted networks: each computes low-rank parts on rows, and none sums weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mixture_of_experts.huggingface.lora import rows
from mixture_of_experts.ops import batched, cpu, grouped, plain
from mixture_of_experts.ops.cpu import fused
from mixture_of_experts.ops.network import Call


class Way(NamedTuple):
    """A way to compute a call: the two functions that a module of `ops` has, too."""

    why_not: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]


def why_not_grouped(call: Call) -> str | None:
    """Why there is no grouped operator for a weight or a part of one."""
    weights = [tensor for tensor in call.network.tensors().values() if tensor.ndim == 3]
    return next((reason for weight in weights if (reason := grouped.why_no_operator(call.x, weight))), None)


def run_grouped(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`."""
    if call.x.is_cuda and batched.why_not(call) is None:
        return batched.run_rows(call, grouped.GroupedProducts, rows)
    return run_operators(call, grouped.grouped_product)


def run_operators(call: Call, product: plain.Product = plain.expert_product) -> Tensor:
    """Compute a call in operators that autograd differentiates; return `(t, o)`."""

    def multiply(x: Tensor, weight: Any, num_tokens_per_expert: Tensor | None) -> Tensor:
        if isinstance(weight, Tensor):
            return product(x, weight, num_tokens_per_expert)
        thin = product(x, weight.down, num_tokens_per_expert)
        return product(x, weight.weight, num_tokens_per_expert) + product(thin, weight.up, num_tokens_per_expert)

    return plain.compute(call.x, plain.plan_of(call.decision), call.network, multiply)


WAYS = {
    "cpu": Way(cpu.why_not, lambda call: fused.run(call, rows)),
    "grouped": Way(why_not_grouped, run_grouped),
    "batched": Way(batched.why_not, lambda call: batched.run_rows(call, on_rows=rows)),
    "plain": Way(plain.why_not, run_operators),
}
