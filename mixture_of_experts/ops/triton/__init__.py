"""Implements experts with Triton kernels for NVIDIA GPUs.

The kernels are tested without a GPU, and a self-check runs on each card at first use. The kernels have not been timed
on any card, so they are used only on request; see `DEFAULT_FAMILIES`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixture_of_experts.kernels import launching
from mixture_of_experts.kernels.launching import device_unsupported_reason, find_card_family
from mixture_of_experts.ops import few_tokens
from mixture_of_experts.ops.activations import unknown_activation_reason
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton.network_spec import get_network_spec
from mixture_of_experts.ops.triton.schedule import MAX_LOW_MEAN_ROWS, count_permuted_rows
from mixture_of_experts.support.implementations import requested_implementation
from mixture_of_experts.support.private_torch import (
    is_exporting,
    is_fake_tensor,
    is_in_transform,
    statically_known_true,
)
from mixture_of_experts.support.tracing import get_device_capability

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# dimensions must be multiples of this value, because unaligned loads are slow and use more registers
SIZE_MULTIPLE = 16
MAX_WIDTH = 1 << 24  # maximum width for which offsets within a tile of 128 rows fit into int32


def unsupported_reason(call: Call) -> str | None:
    """Return the reason why the kernels are not used for a call, or None if they are used.

    Either the kernels do not support the call, or they were not requested and another implementation may be as fast.
    """
    x, network = call.x, call.network
    if requested_implementation() != "triton" and (reason := _not_default_reason(call)) is not None:
        return reason
    if is_in_transform():
        return "the kernels do not support torch.func transforms"
    if is_exporting():
        return "an exported graph may contain only torch's own operators"
    if call.assignments.k is None:
        return "the kernels support only token choice, not expert choice"
    return (
        device_unsupported_reason(x.device)
        or _unsupported_network_reason(x.dtype, network)
        or _experts_check_failure(call)
    )


def _not_default_reason(call: Call) -> str | None:
    """Return the reason why the kernels are not used by default, or None if no other implementation is known to be as
    fast."""
    x = call.x
    if not x.is_cuda or torch.version.hip is not None:
        return "the kernels support only NVIDIA GPUs"
    family = find_card_family(get_device_capability(x.device))
    if family not in launching.DEFAULT_FAMILIES and not (family in launching.DECODING_FAMILIES and _is_decoding(call)):
        return "on compute capability {}.{}, the kernels are used only on request".format(
            *get_device_capability(x.device)
        )
    if x.dtype == torch.float32:
        return "for float32, the kernels are used only on request"
    return None


def run(call: Call) -> Tensor:
    """Compute the outputs `(t, o)` of a call."""
    from mixture_of_experts.ops.triton import forward_backward  # importing triton takes a second

    return forward_backward.run(call)


def _is_decoding(call: Call) -> bool:
    """Return whether this is a decoding call with few rows per tile, for which products use `mma.sync` on all cards."""
    low = MAX_LOW_MEAN_ROWS * call.network.w_out.shape[0]
    return few_tokens.supports_call(call) and statically_known_true(count_permuted_rows(call.assignments) <= low)


def _experts_check_failure(call: Call) -> str | None:
    """Return the fault that the self-check found on this card, or None. Fake tensors are not checked."""
    x, network = call.x, call.network
    compiling = torch.compiler.is_compiling()
    if not x.is_cuda or (not compiling and is_fake_tensor(x)):
        return None
    from mixture_of_experts.ops.triton import self_check

    form, (d, _), (h, o) = get_network_spec(network), network.w_in[0].shape[-2:], network.w_out.shape[-2:]
    assert form is not None
    assert call.assignments.k is not None
    return self_check.run_self_check(
        # in a graph, the number of tokens may be dynamic
        None if compiling else count_permuted_rows(call.assignments) // network.w_out.shape[0],
        x.device,
        x.dtype,
        tuple(form),
        (network.b_in[0] is not None, network.b_out is not None),
        (network.w_in[0].stride(-1) != 1, network.w_out.stride(-1) != 1),
        (d % 64, h % 64, o % 64),
        call.assignments.k,
        few_tokens.supports_call(call),
        _has_large_tensor(call),
    )


def _has_large_tensor(call: Call) -> bool:
    """Return whether int32 is too small to index a weight or, if the row count is known, a tensor of rows."""
    weights = (*call.network.w_in, call.network.w_out)
    last = (sum((n - 1) * stride for n, stride in zip(w.shape, w.stride(), strict=True)) for w in weights)
    width = max(size for weight in weights for size in weight.shape[1:])
    rows = count_permuted_rows(call.assignments)
    return max(last) >= 1 << 31 or statically_known_true(rows * width > 1 << 31)


def _unsupported_network_reason(dtype: torch.dtype, network: Network) -> str | None:
    if dtype not in KERNEL_DTYPES:
        return f"the kernels support bfloat16, float16 and float32, got {dtype}"
    if get_network_spec(network) is None:
        return f"the kernels do not support the activation {network.activation!r}"
    if network.dropout:
        return network.unsupported_activation_reason()
    if len({bias is None for bias in network.b_in}) > 1:
        return "the kernels require that all input weights have biases, or none"
    for weight in (*network.w_in, network.w_out):
        sizes = weight.shape[-2:]
        # upper bound on the distance between the first and last elements
        span = sum(size * stride for size, stride in zip(sizes, weight.stride()[-2:], strict=True))
        if any(size % SIZE_MULTIPLE for size in sizes):
            return f"the kernels require dimensions that are multiples of {SIZE_MULTIPLE}, got {tuple(sizes)}"
        if max(sizes) > MAX_WIDTH or max(math.prod(sizes), span) >= 1 << 31:
            return f"the kernels use int32 indices, for which an expert weight of shape {tuple(sizes)} is too large"
    return unknown_activation_reason(network.activation)
