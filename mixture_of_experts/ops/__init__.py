"""Routed feed-forward networks, and the functions that select their implementation.

Axes: t (tokens), k (choices), e (experts), d (model dimension), h (hidden dimension), o (output dimension).

Each implementation provides the functions `unsupported_reason(call)` and `run(call)`, which take a `Call` and are
described in `support/implementations.py`. Implementations are tried in the order of `IMPLEMENTATIONS`.
`unsupported_reason` must not depend on tensor values, the number of tokens or the grad mode, so that a recomputation
uses the same implementation as its forward pass. Decoding in eval mode is exempt: it has its own implementation on some
cards, and is a branch of another implementation on others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments, assign_experts
from mixture_of_experts.kernels.launching import clear_out_of_memory_verdicts
from mixture_of_experts.ops import batched, cpu, grouped, plain, triton
from mixture_of_experts.ops.activations import (
    ActivationLike,
    ClampedGLU,
    ClampedSwiGLU,
    SiTU,
    SquaredReLU,
    module_for_function,
    takes_gate_and_up,
)
from mixture_of_experts.ops.cpu import batch_invariant
from mixture_of_experts.ops.grouped import grouped_matmul
from mixture_of_experts.ops.network import Call, GateUpLayout, Network, cast_operands
from mixture_of_experts.ops.plain import expand_bias
from mixture_of_experts.support.batch_invariance import BATCH_INVARIANT
from mixture_of_experts.support.checks import check_choice, check_devices, check_size, check_sizes, check_tensors
from mixture_of_experts.support.implementations import (
    ENVIRONMENT_VARIABLE,
    INITIAL_IMPLEMENTATION,
    Explanation,
    collect_explanations,
    requested_implementation,
    run_first_supported,
    update_requests,
)

__all__ = [
    "ClampedGLU",
    "ClampedSwiGLU",
    "Explanation",
    "Network",
    "SiTU",
    "SquaredReLU",
    "expand_bias",
    "explain_call",
    "grouped_matmul",
    "moe_ffn",
    "prepare",
    "routed_ffn",
    "use",
]

# fastest first; "plain" supports all calls, so the implementations after it run only if selected with `use`
IMPLEMENTATIONS: dict[str, Any] = {"cpu": cpu, "triton": triton, "grouped": grouped, "batched": batched, "plain": plain}
IMPLEMENTATIONS |= {BATCH_INVARIANT: batch_invariant}
check_choice(ENVIRONMENT_VARIABLE, INITIAL_IMPLEMENTATION, ("auto", *IMPLEMENTATIONS))


@contextmanager
def use(
    implementation: Literal["auto", "cpu", "triton", "grouped", "batched", "plain", "batch_invariant"],
    *,
    router_kernels: bool | None = None,
) -> Iterator[None]:
    """Context manager that selects the implementation of experts in all calls to `routed_ffn` and `moe_ffn`, and
    controls whether routers and queues use Triton kernels.

    "auto" selects the fastest implementation for each call. With "batch_invariant", a dropless layer on a CPU,
    including its router and shared expert, computes bitwise identical outputs for a token in any batch. If any part of
    a layer is not known to be batch-invariant, an error is raised before anything is computed. The other
    implementations have no effect on lists of modules, quantized experts, and any other experts that are not computed
    by these implementations.

    The context applies to all threads of the process, because the backward pass on a GPU runs in its own thread. If
    several contexts are active, the most recently entered one applies. Activation checkpointing must recompute in the
    same context, so run the backward pass inside it. To select an implementation for the whole process, set the
    environment variable `MIXTURE_OF_EXPERTS_KERNELS`.

    Args:
        implementation: the implementation of experts.
        router_kernels: True uses the kernels for routers and queues wherever they are supported. False uses torch's
            operators. None uses the device's default, or the kernels if "triton" is requested. Traced graphs and
            "batch_invariant" always use torch's operators.

    Raises:
        ValueError: the name is unknown, or the implementation does not support a call. The error message states the
            reason.
        RuntimeError: a call cannot be computed. "batch_invariant" raises this error if matrix products with the
            experts' dimensions depend on the batch for every block size that was tried on this CPU. "triton" raises
            this error if a second derivative is computed, or if the tokens and a weight are on different GPUs.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> with use("plain"):
        ...     out, aux_loss = MoE(dim=32, num_experts=4)(torch.randn(2, 10, 32))
    """
    check_choice("implementation", implementation, ("auto", *IMPLEMENTATIONS))
    context = object()
    update_requests({context: (implementation, router_kernels)}, ())
    try:
        yield
    finally:
        update_requests({}, [context])


def explain_call(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Call a layer without gradients. Report which implementations computed its experts and gates, and why faster
    implementations were not used.

    The layer is called normally in its current mode, so hooks run and buffers may change. The states of random number
    generators are restored.

    Args:
        layer: an `MoE`, a `HeirarchicalMoE`, or any module that calls `moe_ffn`. Only the first call is explained.
        x, args, kwargs: arguments to the layer.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> explain_call(MoE(dim=32, num_experts=4), torch.randn(2, 10, 32)).implementation
        'cpu'
    """
    with (
        torch.no_grad(),
        torch.random.fork_rng([x.device] if x.is_cuda else []),
        collect_explanations() as explanations,
    ):
        layer(x, *args, **kwargs)
    return _summarize_explanations(explanations)


def prepare(
    layer: nn.Module, tokens: int | Sequence[int], *, sequences: int | Sequence[int] = 1
) -> dict[tuple[int, int], Explanation]:
    """Compile and check the kernels that a layer launches, before training or serving.

    When a kernel is first launched, Triton compiles it and its self-check runs. Compilation and the self-check take
    seconds in each process. This function calls the layer with random tokens of each given shape. The tokens have the
    experts' dtype. The layer remains in its current mode, and the caller's autocast settings apply. In training mode,
    both a forward and a backward pass are run. In eval mode, only a forward pass is run. Gradients, buffers and random
    number generators are left unchanged, but hooks run, so call this function before wrapping or monitoring the layer.
    Self-checks that previously ran out of memory are repeated. One call is enough for all layers with the same
    settings.

    Args:
        layer: an `MoE`, a `HeirarchicalMoE`, or another module with parameters that accepts inputs `(sequences, tokens,
            layer.dim)`.
        tokens: number of tokens per sequence, as an integer or a sequence of integers.
        sequences: number of sequences, as an integer or a sequence of integers. The layer is called with each
            combination of `sequences` and `tokens`.

    Returns:
        A dict that maps each `(sequences, tokens)` pair to an `Explanation`, as returned by `explain_call`.

    Example:
        >>> from mixture_of_experts import MoE
        >>> found = prepare(MoE(dim=32, num_experts=4), tokens=[16, 64])
        >>> {shape: explanation.implementation for shape, explanation in found.items()}
        {(1, 16): 'cpu', (1, 64): 'cpu'}
    """
    dim, weight = check_size("layer.dim", getattr(layer, "dim", None)), next(layer.parameters())
    dtype = next(getattr(layer, "experts", layer).parameters(), weight).dtype  # the router may have a different dtype
    shapes = itertools.product(check_sizes("sequences", sequences), check_sizes("tokens", tokens))
    clear_out_of_memory_verdicts()
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    found = {}
    for shape in shapes:
        with (
            torch.random.fork_rng([weight.device] if weight.is_cuda else []),
            torch.set_grad_enabled(layer.training),
            collect_explanations() as explanations,
        ):
            x = torch.randn(*shape, dim, device=weight.device, dtype=dtype, requires_grad=layer.training)
            made = torch.func.functional_call(layer, buffers, (x,))
            if layer.training:
                total = sum(part.float().square().sum() for part in (made if isinstance(made, tuple) else (made,)))
                leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
                torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
        found[shape] = _summarize_explanations(explanations)
    return found


def _summarize_explanations(explanations: Sequence[tuple[str, Explanation]]) -> Explanation:
    """Return the explanation of the first expert call, including the explanations of the gates that were called before
    it."""
    parts = [part for part, _ in explanations]
    first = parts.index("experts") if "experts" in parts else len(parts)
    gates = tuple(found for part, found in explanations[:first] if part == "gate")
    return replace(explanations[first][1] if first < len(parts) else Explanation("module"), gates=gates)


def routed_ffn(
    x: Tensor,
    assignments: Assignments,
    network: Network,
    *,
    training: bool = False,
    implementations: Mapping[str, Any] | None = None,
) -> Tensor:
    """Apply the assigned experts to all tokens, and return each token's weighted sum of expert outputs `(t, o)`.

    Args:
        x: `(t, d)`.
        assignments: the expert assignments of the tokens.
        network: the experts' weights.
        training: whether the experts are in training mode.
        implementations: a table that replaces `IMPLEMENTATIONS` for other kinds of networks, with keys from the same
            set of names. The last implementation must support all calls.
    """
    dtype, implementations = x.dtype, IMPLEMENTATIONS if implementations is None else implementations
    check_devices("the experts' weights", x, (network.w_out,))
    x, network = cast_operands(x, network)
    call = Call(x, assignments, network, training)
    return run_first_supported("experts", implementations, call, requested=requested_implementation()).to(dtype)


def moe_ffn(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None = None,
    *,
    activation: ActivationLike,
    gate_up: GateUpLayout | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """Apply feed-forward experts to tokens that you have routed yourself: `sum_k weight_k * expert_k(x)`.

    Experts compute `act(x w1) w2` or, if gated, `(act(x w1) * (x w3)) w2`. No choices are dropped. The result is
    differentiable with respect to `x`, `weight`, and all weights and biases.

    Args:
        x: `(t, d)`.
        expert: `(t, k)` integers, the experts of each token. Expert ids below 0 or above e - 1 are ignored. A token may
            choose the same expert twice.
        weight: `(t, k)`, weight of each choice. The sum over choices is computed in float32 or higher precision.
        w1: `(e, d, h)`, or `(e, d, 2 h)` with `gate_up`. Any strides are supported, so transposed views need not be
            copied.
        w2: `(e, h, o)`; o may differ from d.
        w3: `(e, d, h)`, for gated experts with separate weights.
        activation: a function of one tensor, such as `F.silu` or `nn.SiLU()`. For gated experts, it may also be a
            function `(gate, up)` that returns the hidden layer, such as `ClampedSwiGLU()`. If it is a module, its
            parameters receive gradients.
        gate_up: layout of the gate and up projections in w1: "concatenated" (gate, then up) or "interleaved"
            (alternating columns). None if w1 holds a single projection.
        b1, b2, b3: biases for `w1`, `w2` and `w3`, with shapes `(e, h)` (or `(e, 2 h)` with `gate_up`), `(e, o)` and
            `(e, h)`.
        training: if False, calls with few tokens and without gradients (decoding) may be computed faster, with the same
            result up to rounding.

    Returns:
        `(t, o)`, with the same dtype as x.

    Raises:
        ValueError: shapes do not match, or an argument is invalid.
        TypeError: an operand is not a tensor, or x is not floating point.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> x, router = torch.randn(10, 8), torch.randn(8, 4)
        >>> weight, expert = (x @ router).softmax(-1).topk(2)
        >>> w1, w3, w2 = torch.randn(4, 8, 16), torch.randn(4, 8, 16), torch.randn(4, 16, 8)
        >>> moe_ffn(x, expert, weight, w1, w2, w3, activation=F.silu).shape
        torch.Size([10, 8])
    """
    if gate_up is not None:
        check_choice("gate_up", gate_up, ("concatenated", "interleaved"))
    if isinstance(activation, type):
        raise ValueError(
            f"activation must be a function or a module, got the class {activation.__name__}; instantiate it first"
        )
    activation = module_for_function(activation)
    optional = {name: value for name, value in dict(w3=w3, b1=b1, b2=b2, b3=b3).items() if value is not None}
    check_tensors(x=x, expert=expert, weight=weight, w1=w1, w2=w2, **optional)
    w_in, b_in = ((w1,), (b1,)) if w3 is None else ((w1, w3), (b1, b3))
    _check_moe_ffn_arguments(x, expert, weight, w_in, w2, b_in, b2, activation, gate_up)
    if w3 is None and b3 is not None:
        raise ValueError("b3 is the bias of w3, but w3 is None; pass w3, or omit b3")
    assignments = assign_experts(expert.to(torch.int64), weight, w2.shape[0])
    return routed_ffn(x, assignments, Network(w_in, w2, activation, b_in, b2, gate_up), training=training)


def _check_moe_ffn_arguments(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    w_in: Sequence[Tensor],
    w2: Tensor,
    b_in: Sequence[Tensor | None],
    b2: Tensor | None,
    activation: ActivationLike,
    gate_up: GateUpLayout | None,
) -> None:
    """Check that shapes and dtypes match."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; embed or cast the tokens first")
    if x.ndim != 2 or w2.ndim != 3:
        raise ValueError(f"x and w2 must have shapes (t, d) and (e, h, o), got {tuple(x.shape)} and {tuple(w2.shape)}")
    (t, d), (e, h, o) = x.shape, w2.shape
    if 0 in w2.shape:
        raise ValueError(f"w2 must have positive dimensions (e, h, o), got {tuple(w2.shape)}; pass at least one expert")
    integers = not expert.is_floating_point() and expert.dtype != torch.bool
    if expert.ndim != 2 or expert.shape[0] != t or expert.shape != weight.shape or not integers or not expert.shape[1]:
        raise ValueError(
            f"expert must contain integers and have the same shape (t, k) as weight, with t={t} and k > 0, got "
            f"{tuple(expert.shape)} {expert.dtype} and {tuple(weight.shape)}"
        )
    if gate_up is not None and len(w_in) == 2:
        raise ValueError(f"w3 must be None with gate_up={gate_up!r}, because w1 contains both projections")
    if takes_gate_and_up(activation) and gate_up is None and len(w_in) == 1:
        raise ValueError(
            f"activation {activation} takes (gate, up); pass w3, or set gate_up and pass both projections in w1"
        )
    width = h if gate_up is None else 2 * h
    wanted = [("w1", w_in[0], (e, d, width)), ("b1", b_in[0], (e, width)), ("b2", b2, (e, o))]
    if len(w_in) == 2:
        wanted += [("w3", w_in[1], (e, d, h)), ("b3", b_in[1], (e, h))]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} to match x {(t, d)} and w2 {(e, h, o)}, got {tuple(tensor.shape)}"
            )
