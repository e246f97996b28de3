"""Checks the kernels' results on a card before the kernels are first used on it.

Axes: t (tokens), k (choices), e (experts), d (model dimension), h (hidden dimension), o (output dimension).

A `CallKind` contains everything that determines the compiled programs. For each kind and each schedule entry, the
kernels compute the outputs and all gradients for generated tokens three times. All rows are compared with those of the
batched implementation in float32, and repeated results must be bitwise identical. The sums are long enough to use each
pipeline buffer several times, and several programs write the table of tiles. If any results differ or an error is
raised, the Triton implementation is disabled for the process, with a warning.

Before the first call with a tensor of more than 2^31 elements, the kernels also compute the same tokens and experts as
part of a larger call, whose weights and rows exceed this size. All other tokens and weights in the larger call are zero
and have no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments, assign_experts
from mixture_of_experts.kernels.launching import SelfCheck
from mixture_of_experts.ops import batched
from mixture_of_experts.ops.activations import ClampedSwiGLU, SquaredReLU
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton.network_spec import NetworkSpec
from mixture_of_experts.ops.triton.schedule import TILES_PER_PROGRAM, Schedule, find_entries, find_schedule
from mixture_of_experts.support.private_torch import assume_constant_result

INT32_ELEMENTS = 1 << 31  # number of elements that int32 can index
# minimum row count and dimension of the generated call; `CallKind.sizes` is added to MIN_DIM
MIN_ROWS, MIN_DIM = 512, 704
BUSIEST_EXPERT_SHARE = 0.6  # the first expert's share of the rows; it is large, so that sums over its rows are long
NUM_REPEATS = 3  # number of times that the kernels compute the call
#: maximum relative error of a row, compared with the batched implementation in float32
MAX_ROW_ERRORS = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}

#: all supported activations that take no arguments
KERNEL_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu_squared": SquaredReLU,
    "identity": nn.Identity,
}


class CallKind(NamedTuple):
    """The properties of a call that determine which programs are compiled.

    Attributes:
        device: the GPU.
        dtype: dtype of x and the weights.
        spec: layout and activation of the network.
        biases: whether there are input biases, and whether there are output biases.
        transposed: a flag for the input weights and a flag for the output weights, True if they are stored transposed.
        sizes: d, h and o modulo 64, which determine whether they are multiples of the block sizes.
        num_choices: k.
        decoding: whether only the forward pass is launched.
        far: whether any tensor has more elements than int32 can index.
    """

    device: torch.device
    dtype: torch.dtype
    spec: NetworkSpec
    biases: tuple[bool, bool]
    transposed: tuple[bool, bool]
    sizes: tuple[int, int, int]
    num_choices: int
    decoding: bool
    far: bool = False


# runs separately for each kind of call and schedule entry
EXPERTS_SELF_CHECK = SelfCheck("the Triton kernels of experts")


@assume_constant_result  # runs during tracing without being traced itself
def run_self_check(mean_rows: int | None, *kind_of_call: Any) -> str | None:
    """Check the kernels for one kind of call. `mean_rows` is the mean number of rows per expert, or None for any
    number.

    The kind is passed as plain tuples, because graphs do not support named tuples. Return the fault found, or None.
    """
    if not torch.cuda.is_available():
        return None  # the call's tensors are fake
    kind = CallKind(*kind_of_call)
    entries = find_entries(kind.device, kind.dtype)
    wanted = entries if mean_rows is None else (find_schedule(entries, mean_rows),)
    kind = kind._replace(spec=NetworkSpec(*kind.spec))
    near = check_entries(kind._replace(far=False), entries, wanted)
    return check_entries(kind, entries, wanted) if near is None and kind.far else near


def check_entries(kind: CallKind, entries: tuple[Schedule, ...], wanted: tuple[Schedule, ...]) -> str | None:
    """Check the kernels with the `wanted` schedule entries, and return the fault found, or None."""
    for entry in wanted:
        precision = torch.backends.cuda.matmul.fp32_precision
        find = partial(find_fault, kind, entries, entry, precision)
        if wrong := EXPERTS_SELF_CHECK.failure_reason(kind.device, (*kind[1:], entry), find):
            return wrong
    return None


def find_fault(kind: CallKind, entries: tuple[Schedule, ...], entry: Schedule, precision: Any) -> str | None:
    """Check the kernels with one schedule entry and one precision setting for float32 products. Return the fault found,
    or None."""
    torch.backends.cuda.matmul.fp32_precision = precision
    call = make_call(kind, *find_call_size(entries, entry))
    said = f"for {kind.spec.layout} experts with {kind.spec.activation}, {kind.dtype} and tiles of {entry.rows} rows,"
    compute = partial(compute_by_kernels, call, kind)
    if kind.far:
        compute = partial(compute_far_by_kernels, kind, *make_far_call(call))
    found = compute()
    if not are_permutations_equal(call.assignments):
        return f"{said} the kernels for few and for many assignments compute different permutations"
    wanted = compute_by_operators(call)
    for name, got in found.items():
        error = compute_max_row_error(got, wanted[name.partition(", ")[0]])
        if not error < MAX_ROW_ERRORS[kind.dtype]:
            return f"{said} a row of {name} differs from the batched implementation by {error:.1e} times its norm"
    del wanted
    for _ in range(NUM_REPEATS - 1):
        for name, again in compute().items():
            if not torch.equal(again, found[name]):
                return f"{said} {name} differs between two identical calls"
    return None


def find_call_size(entries: tuple[Schedule, ...], entry: Schedule) -> tuple[int, int]:
    """Return the smallest numbers of rows and experts for which a schedule entry is used.

    There are at least three experts, and enough rows for several programs to write the table of tiles, although some
    rows are unused.
    """
    min_rows = max(MIN_ROWS, TILES_PER_PROGRAM * entry.rows * 5 // 4)
    sizes = ((rows, e) for rows in (min_rows, 2 * min_rows) for e in range(3, rows // 8 + 1))
    return next(size for size in sizes if find_schedule(entries, size[0] // size[1]) is entry)


def compute_max_row_error(got: Tensor, want: Tensor) -> float:
    """Return the maximum relative error over the rows of a tensor of shape `(..., p, q)`.

    The error is relative to the larger of the row's norm and the mean norm of the matrix's rows. If it were relative to
    the norm of the whole tensor, isolated errors would go unnoticed.
    """
    got, want = (tensor.double().unsqueeze(-1) if tensor.ndim == 1 else tensor.double() for tensor in (got, want))
    norms = want.norm(dim=-1)
    mean = norms.square().mean(dim=-1, keepdim=True).sqrt()
    errors = (got - want).norm(dim=-1) / torch.maximum(norms, mean).clamp(min=1e-6)
    return float(errors.max())


def make_call(kind: CallKind, rows: int, experts: int) -> Call:
    """Return a randomly generated call. The first expert has most of the rows, the second has none, and some choices
    have no expert.

    Tokens, input weights and input biases are small integers times a power of two. Therefore, pre-activations are exact
    in every dtype and summation order, and rounding cannot move them across a kink of the activation.
    """
    options: Any = dict(generator=torch.Generator(kind.device).manual_seed(0), device=kind.device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, **options)

    def weight(drawn: Tensor, transposed: bool) -> Tensor:
        drawn = drawn.to(kind.dtype)
        return drawn.mT.contiguous().mT if transposed else drawn

    layout, name, *arguments = kind.spec
    activation = KERNEL_ACTIVATIONS[name]() if name in KERNEL_ACTIVATIONS else ClampedSwiGLU(*arguments)
    d, h, o = (MIN_DIM + size for size in kind.sizes)
    fused = layout in ("concatenated", "interleaved")
    width, number = (2 * h if fused else h), (2 if layout == "gated" else 1)
    step = 2.0 ** -round(math.log2(d) / 2)
    weights = [weight(draw(experts, d, width).round() * step, kind.transposed[0]) for _ in range(number)]
    network = Network(
        tuple(weights),
        weight(draw(experts, h, o) / math.sqrt(h), kind.transposed[1]),
        activation,
        tuple(draw(experts, width).round().to(kind.dtype) if kind.biases[0] else None for _ in range(number)),
        draw(experts, o).to(kind.dtype) if kind.biases[1] else None,
        layout if fused else None,  # type: ignore[arg-type]
    )
    tokens = -(-rows // kind.num_choices)
    expert = torch.randint(1, experts, (tokens, kind.num_choices), **options)
    expert[expert == 1] = experts - 1
    expert[torch.rand(tokens, kind.num_choices, **options) < BUSIEST_EXPERT_SHARE] = 0
    expert[::17, 0] = -1
    weights = torch.rand(tokens, kind.num_choices, **options) + 0.5
    return Call(draw(tokens, d).round().to(kind.dtype), assign_experts(expert, weights, experts), network, True)


def are_permutations_equal(assignments: Assignments) -> bool:
    """Return whether the kernel for few assignments and the kernel for many assignments compute the same permutation.
    The checked call itself uses only the kernel for few assignments."""
    from mixture_of_experts.ops.triton.row_permutation import permute_by_kernel

    one, other = (permute_by_kernel(assignments, few).tensors() for few in (0, assignments.weight.shape[0]))
    return all(torch.equal(one[name], other[name]) for name in one)


def draw_output_gradient(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a random gradient of the output, whose elements can be represented exactly in `dtype`."""
    drawn = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device)
    return drawn.to(dtype).to(out.dtype)


def compute_by_kernels(call: Call, kind: CallKind, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Return the kernels' outputs in inference and, unless the kind is for decoding, their outputs and gradients in
    training.

    All gradients are computed together, and the gradients of the choices' weights are also computed alone. Each of
    these cases uses different programs. The gradient of the output is random unless `grad` is given.
    """
    from mixture_of_experts.ops.triton.forward_backward import triton_backward, triton_forward
    from mixture_of_experts.ops.triton.row_permutation import permute_by_kernel

    given, names = (call.x, permute_by_kernel(call.assignments), call.network), list(call.network.tensors())
    found = {"the output, in inference": triton_forward(*given, save=False)[0]}
    if kind.decoding:
        return found
    found["the output"], saved = triton_forward(*given, save=True)
    grad = draw_output_gradient(found["the output"], call.x.dtype) if grad is None else grad
    grads: dict[str, Any] = {"weights, alone": triton_backward(*given, saved, grad, ()).weight}
    grads["x"], grads["weights"], network = triton_backward(*given, saved, grad, {"x", *names})
    return found | {f"the gradient of {name}": value for name, value in (grads | network).items()}


def place_among_zeros(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return a tensor `(size, ...)` that contains `values` at the positions in `index` and zeros elsewhere. The result
    has the same memory layout as `values`."""
    if values.ndim == 3 and values.stride(-1) != 1:
        return place_among_zeros(values.mT, index, size).mT
    return values.new_zeros(size, *values.shape[1:]).index_copy_(0, index, values)


def make_far_call(call: Call) -> tuple[Call, Tensor, Tensor]:
    """Return a larger call that contains the tokens and experts of `call`, and the indices of these tokens and experts.

    The indices include the larger call's first and last tokens and experts. All weights in the larger call have more
    than `INT32_ELEMENTS` elements. All tensors of rows exceed this size as well if there are many rows per expert.
    """
    given, device, (t, d), (e, h, o) = call.assignments, call.x.device, call.x.shape, call.network.w_out.shape
    number, k = given.weight.shape[0], given.weight.shape[0] // t
    experts = e + INT32_ELEMENTS // (h * min(d, o))
    tokens = t + min(number // e * experts, INT32_ELEMENTS // min(d, h, o)) // k
    token, of_expert = (
        torch.arange(size, device=device) * (total - 1) // (size - 1) for size, total in ((t, tokens), (e, experts))
    )
    expert = torch.randint(experts, (tokens, k), device=device)
    expert[token] = torch.where(given.kept, of_expert[given.expert], -1).view(t, k)
    weight = place_among_zeros(given.weight.view(t, k), token, tokens)
    network = call.network.map(lambda values: place_among_zeros(values, of_expert, experts))
    x, assignments = place_among_zeros(call.x, token, tokens), assign_experts(expert, weight, experts)
    return Call(x, assignments, network, call.training), token, of_expert


def compute_far_by_kernels(kind: CallKind, far: Call, token: Tensor, expert: Tensor) -> dict[str, Tensor]:
    """Return the same results as `compute_by_kernels(call, kind)`, computed by the larger call that
    `make_far_call(call)` returned. All other tokens in the larger call have no gradient."""
    grad = draw_output_gradient(far.x.new_empty(len(token), far.network.w_out.shape[-1]), far.x.dtype)
    found = compute_by_kernels(far, kind, place_among_zeros(grad, token, len(far.x)))

    def select(name: str, values: Tensor) -> Tensor:
        if name.startswith("the gradient of weights"):
            return values.view(len(far.x), -1)[token].flatten()
        return values[expert if name.startswith(("the gradient of w", "the gradient of b")) else token]

    return {name: select(name, values) for name, values in found.items()}


def compute_by_operators(call: Call) -> dict[str, Tensor]:
    """Use the batched implementation in float32 to compute the same results as `compute_by_kernels`."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().float().requires_grad_()

    given, x, weight, network = call.assignments, leaf(call.x), leaf(call.assignments.weight), call.network.map(leaf)
    sizes = dict(k=given.k, num_tokens=given.num_tokens, expert_dims=given.expert_dims)
    assignments = Assignments(given.expert, weight, given.kept, given.kept, **sizes)  # type: ignore[arg-type]
    out, leaves = batched.run(Call(x, assignments, network, True)), {"x": x, "weights": weight, **network.tensors()}
    grads = torch.autograd.grad(out, list(leaves.values()), draw_output_gradient(out, call.x.dtype))
    return {"the output": out.detach(), **dict(zip((f"the gradient of {name}" for name in leaves), grads, strict=True))}
