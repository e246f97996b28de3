"""Computes a routed feed-forward network and its gradients with the kernels. Only tokens and pre-activations are
saved."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.ops import autograd
from mixture_of_experts.ops.autograd import FFNGradients, SavedTensors
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton.network_spec import get_network_spec
from mixture_of_experts.ops.triton.operators import FFNOperands, triton_ffn, triton_ffn_backward
from mixture_of_experts.ops.triton.row_permutation import permute_by_kernel


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call. Rows have no gaps even if the capacity is limited, so empty slots cost
    nothing."""
    return autograd.run_differentiable(
        triton_forward, triton_backward, call.x, permute_by_kernel(call.assignments), call.network
    )


def make_operands(x: Tensor, permutation: Permutation, network: Network) -> FFNOperands:
    form, rows, k = get_network_spec(network), permutation.rows_per_expert, permutation.k
    assert form is not None
    assert rows is not None
    assert k is not None
    token, assignment, row = (
        table.to(torch.int32) for table in (permutation.token, permutation.assignment, permutation.row)
    )
    tables = (permutation.weight.to(torch.float32), token, assignment, row, rows, k)
    b_in, b_out = ([bias for bias in biases if bias is not None] for biases in (network.b_in, (network.b_out,)))
    return FFNOperands(x, *tables, list(network.w_in), network.w_out, b_in, b_out, form)


def triton_forward(x: Tensor, permutation: Permutation, network: Network, save: bool) -> tuple[Tensor, SavedTensors]:
    """Forward function for `run_differentiable`."""
    out, pre = triton_ffn(*make_operands(x, permutation, network).flatten(), save)
    return out, [pre]


def triton_backward(
    x: Tensor, permutation: Permutation, network: Network, saved: SavedTensors, grad: Tensor, wanted: Collection[str]
) -> FFNGradients:
    """Backward function for `run_differentiable`."""
    (pre,) = saved
    need_in = any(name.startswith(("w_in", "b_in")) for name in wanted)
    need_out = "w_out" in wanted or "b_out" in wanted
    needs = "x" in wanted, need_in, need_out
    grad_x, grad_weight, *grads = triton_ffn_backward(
        grad, pre, *make_operands(x, permutation, network).flatten(), *needs
    )
    return FFNGradients(
        grad_x, grad_weight.to(permutation.weight.dtype), dict(zip(network.tensors(), grads, strict=True))
    )
