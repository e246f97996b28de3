"""Variants of the implementations in `ops` for networks with low-rank updates. The rows are multiplied by the low-rank
factors, so the updates are never added to the weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from mixture_of_experts.huggingface.lora import adapted_row_network
from mixture_of_experts.ops import batched, cpu, grouped, plain
from mixture_of_experts.ops.cpu import chunked, decode
from mixture_of_experts.ops.network import Call
from mixture_of_experts.support.implementations import Implementation


def run_grouped(call: Call) -> Tensor:
    """Run the experts with grouped matrix multiplication, and return their output `(t, o)`."""
    if call.x.is_cuda and batched.unsupported_reason(call) is None:
        return batched.run_rows(call, grouped.GroupedLayout, adapted_row_network)
    return run_with_operators(call, grouped.grouped_matmul)


def run_with_operators(call: Call, product: plain.ProductFunction = plain.expert_product) -> Tensor:
    """Run the experts with operators that autograd can differentiate, and return their output `(t, o)`."""
    permutation = plain.choose_permutation(call.assignments)
    return plain.run_permuted(call.x, permutation, call.network, partial(multiply_adapted, product))


def multiply_adapted(product: Any, x: Tensor, weight: Any, expert_counts: Any) -> Tensor:
    """Return `product(x, weight, expert_counts)` for a weight that may have a low-rank update."""
    if isinstance(weight, Tensor):
        return product(x, weight, expert_counts)
    low_rank_activation = product(x, weight.down, expert_counts)
    return product(x, weight.weight, expert_counts) + product(low_rank_activation, weight.up, expert_counts)


def run_on_cpu(call: Call) -> Tensor:
    """Run the experts on the CPU, and return their output `(t, o)`. Each adapted weight requires three matrix products,
    so running the experts one by one is faster only for a single token."""
    if call.x.shape[0] == 1 and call.is_inference():
        return decode.compute_expert_by_expert(call, partial(multiply_adapted, grouped.multiply_by_expert))
    return chunked.run(call, adapted_row_network)


LORA_IMPLEMENTATIONS = {
    "cpu": Implementation(cpu.unsupported_reason, run_on_cpu),
    "grouped": Implementation(grouped.unsupported_reason, run_grouped),
    "batched": Implementation(batched.unsupported_reason, partial(batched.run_rows, row_functions=adapted_row_network)),
    "plain": Implementation(plain.unsupported_reason, run_with_operators),
}
