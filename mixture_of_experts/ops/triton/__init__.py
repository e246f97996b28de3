"""The way by Triton kernels, for NVIDIA GPUs. It is tested without a GPU, and checks itself on each card at first use;
it has not been timed on one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixture_of_experts.kernels.launching import family_of, why_not_on
from mixture_of_experts.ops import few_tokens
from mixture_of_experts.ops.activations import why_unknown
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton.form import form_of
from mixture_of_experts.ops.triton.schedule import LOW, num_rows
from mixture_of_experts.support.private_torch import exporting, in_transform, is_fake, statically_known_true
from mixture_of_experts.support.tracing import capability
from mixture_of_experts.support.ways import asked_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BY_DEFAULT = ((8, 0), (8, 6), (12, 0))  # families on which torch's grouped product is a loop of many kernels
FOR_DECODING = ((9, 0), (10, 0))  # families on which that product is one kernel, but a few tokens go without it
MULTIPLE = 16  # sizes are multiples of this: loads that are not aligned are slow and take more registers
WIDEST = 1 << 24  # up to this width, places in a tile of 128 rows fit into int32


def why_not(call: Call) -> str | None:
    """Why the kernels do not compute a call, None if they do: they cannot, or nobody asks for them and another way may
    be as good."""
    x, network = call.x, call.network
    if asked_for() != "triton" and (reason := _why_not_unasked(call)) is not None:
        return reason
    if in_transform():
        return "kernels do not run under transforms of torch.func"
    if exporting():
        return "an exported graph has torch's own operators only"
    if call.decision.k is None:
        return "kernels compute token choice: experts that choose fill equal slots, which batched products compute"
    return why_not_on(x.device) or _why_not_of(x.dtype, network) or _why_wrong(call)


def _why_not_unasked(call: Call) -> str | None:
    """Why the kernels serve a call only if the user asks for them; None where no other way is known to be as good."""
    x = call.x
    if not x.is_cuda or torch.version.hip is not None:
        return "kernels are for NVIDIA GPUs"
    family = family_of(capability(x.device))
    if family not in BY_DEFAULT and not (family in FOR_DECODING and _decodes(call)):
        return "on compute capability {}.{} they are not taken unless they are asked for".format(*capability(x.device))
    if x.dtype == torch.float32:
        return "float32 is computed by torch's products unless they are asked for"
    return None


def run(call: Call) -> Tensor:
    """Compute a call; return `(t, o)`."""
    from mixture_of_experts.ops.triton import forward_backward  # imports triton, which takes a second

    return forward_backward.run(call)


def _decodes(call: Call) -> bool:
    """Whether a call is one of decoding on low tiles: these are multiplied by `mma.sync` on all cards."""
    low = LOW * call.network.w_out.shape[0]
    return few_tokens.serves(call) and statically_known_true(num_rows(call.decision) <= low)


def _why_wrong(call: Call) -> str | None:
    """What a check of the kernels on this card found wrong; None if nothing. Fake tensors are not checked."""
    x, network = call.x, call.network
    compiling = torch.compiler.is_compiling()
    if not x.is_cuda or (not compiling and is_fake(x)):
        return None
    from mixture_of_experts.ops.triton import self_check

    form, (d, _), (h, o) = form_of(network), network.w_in[0].shape[-2:], network.w_out.shape[-2:]
    assert form is not None
    assert call.decision.k is not None
    return self_check.why_wrong(
        # in a graph the number of tokens may be dynamic
        None if compiling else num_rows(call.decision) // network.w_out.shape[0],
        x.device,
        x.dtype,
        tuple(form),
        (network.b_in[0] is not None, network.b_out is not None),
        (network.w_in[0].stride(-1) != 1, network.w_out.stride(-1) != 1),
        (d % 64, h % 64, o % 64),
        call.decision.k,
        few_tokens.serves(call),
    )


def _why_not_of(dtype: torch.dtype, network: Network) -> str | None:
    if dtype not in DTYPES:
        return f"kernels compute bfloat16, float16 and float32, not {dtype}"
    if form_of(network) is None:
        return f"no kernel knows the activation {network.activation!r} of these experts"
    if network.dropout:
        return network.why_not_written()
    if len({bias is None for bias in network.b_in}) > 1:
        return "kernels take a bias for every input weight or for none"
    for weight in (*network.w_in, network.w_out):
        sizes = weight.shape[-2:]
        # from its first to its last element, at most
        span = sum(size * stride for size, stride in zip(sizes, weight.stride()[-2:], strict=True))
        if any(size % MULTIPLE for size in sizes):
            return f"kernels want sizes that are multiples of {MULTIPLE}, not {tuple(sizes)}"
        if max(sizes) > WIDEST or max(math.prod(sizes), span) >= 1 << 31:
            return f"an expert's matrix {tuple(sizes)} is too large: kernels index it by int32"
    return why_unknown(network.activation)
