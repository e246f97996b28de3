"""The implementations of `ops` for adapted networks: all compute low-rank parts on rows, and none sums weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mixture_of_experts.huggingface.lora import adapted_row_network
from mixture_of_experts.ops import batched, cpu, grouped, plain
from mixture_of_experts.ops.cpu import chunked
from mixture_of_experts.ops.network import Call


class LoraImplementation(NamedTuple):
    """An implementation that computes a call, with the two functions that modules of `ops` also have."""

    unsupported_reason: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]


def grouped_unsupported_reason(call: Call) -> str | None:
    """The reason why there is no grouped operator for a weight or its low-rank part; None if there is one."""
    weights = [tensor for tensor in call.network.tensors().values() if tensor.ndim == 3]
    return next((reason for weight in weights if (reason := grouped.no_operator_reason(call.x, weight))), None)


def run_grouped(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`."""
    if call.x.is_cuda and batched.unsupported_reason(call) is None:
        return batched.run_rows(call, grouped.GroupedLayout, adapted_row_network)
    return run_with_operators(call, grouped.grouped_matmul)


def run_with_operators(call: Call, product: plain.ProductFunction = plain.expert_product) -> Tensor:
    """Compute a call with operators that autograd differentiates; return `(t, o)`."""

    def multiply(x: Tensor, weight: Any, num_tokens_per_expert: Tensor | None) -> Tensor:
        if isinstance(weight, Tensor):
            return product(x, weight, num_tokens_per_expert)
        low_rank_activation = product(x, weight.down, num_tokens_per_expert)
        return product(x, weight.weight, num_tokens_per_expert) + product(
            low_rank_activation, weight.up, num_tokens_per_expert
        )

    return plain.run_permuted(call.x, plain.choose_permutation(call.assignments), call.network, multiply)


LORA_IMPLEMENTATIONS = {
    "cpu": LoraImplementation(cpu.unsupported_reason, lambda call: chunked.run(call, adapted_row_network)),
    "grouped": LoraImplementation(grouped_unsupported_reason, run_grouped),
    "batched": LoraImplementation(
        batched.unsupported_reason, lambda call: batched.run_rows(call, row_functions=adapted_row_network)
    ),
    "plain": LoraImplementation(plain.unsupported_reason, run_with_operators),
}
