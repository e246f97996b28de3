"""Checks on this card that the kernels compute what they should, before they serve a first call.

Axes: t tokens, k choices, e experts, d model dim, h hidden dim, o output dim.

A `Kind` describes what the kernels' programs depend on. For each kind and each entry of the schedule, kernels compute
outputs and all gradients of made-up tokens, which are compared with the lean way in float32. If they differ, or raise,
the Triton way is off for the whole process, with a warning.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.decision import Decision, decision_on
from mixture_of_experts.launching import SelfCheck
from mixture_of_experts.ops import lean
from mixture_of_experts.ops.activations import ActivationLike, ClampedSwiGLU, SquaredReLU
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton.form import Form
from mixture_of_experts.ops.triton.schedule import Schedule, find_schedule
from mixture_of_experts.private_torch import constant_in_graphs

TOKENS, CHOICES, DIM = 256, 2, 192  # sizes of the made-up call; to DIM a kind's `sizes` are added
#: largest difference between the kernels and the lean way in float32, relative to the norm of the latter
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}
FAR = 1 << 31  # more elements than int32 can index

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu_squared": SquaredReLU,
    "identity": nn.Identity,
}


class Kind(NamedTuple):
    """What the kernels' programs depend on.

    Attributes:
        device: index of the GPU.
        dtype: dtype of x and weights.
        form: form of the network.
        biases: whether there are input biases, and output biases.
        transposed: whether the input weights, and the output weights, are stored transposed.
        sizes: d, h and o modulo 64, which say whether blocks fit into them.
    """

    device: int
    dtype: torch.dtype
    form: Form
    biases: tuple[bool, bool]
    transposed: tuple[bool, bool]
    sizes: tuple[int, int, int]


CHECK = SelfCheck("the Triton kernels of experts")  # of a kind and an entry of the schedule


@constant_in_graphs  # a traced graph runs this function instead of tracing it
def why_wrong(
    device: int,
    dtype: torch.dtype,
    form: tuple[str, str, float, float],
    biases: tuple[bool, bool],
    transposed: tuple[bool, bool],
    sizes: tuple[int, int, int],
    mean_rows: int | None,
) -> str | None:
    """Why the kernels are not taken for a kind of calls whose experts have `mean_rows` rows on average (None: any
    number); None if they are right."""
    if not torch.cuda.is_available():
        return None  # the call's tensors are fake
    from mixture_of_experts.ops.triton.operators import entries_for

    entries = entries_for(torch.device("cuda", device), dtype)
    kind = Kind(device, dtype, Form(*form), biases, transposed, sizes)
    wanted = entries if mean_rows is None else (find_schedule(entries, mean_rows),)
    return judge(kind, torch.device("cuda", device), entries, wanted)


def judge(kind: Kind, device: torch.device, entries: tuple[Schedule, ...], wanted: tuple[Schedule, ...]) -> str | None:
    """Why the kernels are not taken with the `wanted` entries of the schedule; None if they are right with them."""
    for entry in wanted:
        if wrong := CHECK.why_wrong(device, (kind, entry), partial(fault, kind, device, entries, entry)):
            return wrong
    return None


def forget() -> None:
    """Forget all verdicts."""
    CHECK.verdicts.clear()


def fault(kind: Kind, device: torch.device, entries: tuple[Schedule, ...], entry: Schedule) -> str | None:
    """What is wrong with the kernels for one entry of the schedule; None if nothing."""
    rows = TOKENS * CHOICES
    experts = max(e for e in range(1, rows // 8 + 1) if find_schedule(entries, rows // e) is entry)
    far = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 8 * FAR * kind.dtype.itemsize
    call = make_call(kind, device, experts, far and experts > 1 and entry is entries[-1])
    said = f"on {kind.form.layout} experts of {kind.form.activation} in {kind.dtype}, tiles of {entry.rows} rows,"
    try:
        found = results(call, kernels=True)
        if not same_plans(call.decision):
            return f"{said} plans of few and of many assignments differ"
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # whatever a compiler or a driver raises
        return f"{said} they raise {type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
    wide = call._replace(x=call.x.float(), network=call.network.map(lambda weight: weight.float()))
    for name, got, want in zip(names(call), found, results(wide, kernels=False), strict=True):
        error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6))
        if not error < TOLERANCE[kind.dtype]:
            return f"{said} {name} differs from the lean way's by {error:.1e} of its norm"
    return None


def make_call(kind: Kind, device: torch.device, experts: int, far: bool) -> Call:
    """A made-up call of numbers of unit scale. Some choices have no expert; of three experts or more the last has no
    tokens. With `far` the last experts' input weights lie beyond what int32 can index."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(kind.dtype)

    def weight(p: int, q: int, transposed: bool, apart: int = 0) -> Tensor:
        drawn = draw(experts, q, p).mT if transposed else draw(experts, p, q)
        drawn = drawn / math.sqrt(p)
        if not apart:
            return drawn
        memory = torch.empty(apart * (experts - 1) + p * q, dtype=kind.dtype, device=device)
        strides = apart, *drawn.stride()[1:]
        return memory.as_strided(drawn.shape, strides).copy_(drawn)

    d, h, o = (DIM + size for size in kind.sizes)
    fused = kind.form.layout in ("concatenated", "interleaved")
    width, number = (2 * h if fused else h), (2 if kind.form.layout == "gated" else 1)
    apart = -(-FAR // (experts - 1) // 64) * 64 if far else 0
    network = Network(
        tuple(weight(d, width, kind.transposed[0], apart if i == 0 and number == 1 else 0) for i in range(number)),
        weight(h, o, kind.transposed[1], apart),
        activation_of(kind.form),
        tuple(draw(experts, width) if kind.biases[0] else None for _ in range(number)),
        draw(experts, o) if kind.biases[1] else None,
        kind.form.layout if fused else None,  # type: ignore[arg-type]
    )
    used = experts - 1 if experts > 2 else experts
    expert = torch.randint(0, used, (TOKENS, CHOICES), generator=generator, device=device)
    expert[::17, 0] = -1
    weights = torch.rand(TOKENS, CHOICES, generator=generator, device=device) + 0.1
    return Call(draw(TOKENS, d), decision_on(expert, weights, experts), network, True)


def activation_of(form: Form) -> ActivationLike:
    if form.activation == "clamped_swiglu":
        return ClampedSwiGLU(form.alpha, form.limit)
    return nn.GELU("tanh") if form.activation == "gelu_tanh" else ACTIVATIONS[form.activation]()


def same_plans(decision: Decision) -> bool:
    """Whether the kernel for many assignments makes the same plan as the one for few, by which `results` computes."""
    from mixture_of_experts.ops.triton.plan import plan_of

    one, other = (plan_of(decision, few).tensors() for few in (0, decision.weight.shape[0]))
    return all(torch.equal(one[name], other[name]) for name in one)


def results(call: Call, *, kernels: bool) -> list[Tensor]:
    """Outputs, and the gradients of tokens, of the choices' weights and of all tensors of the network."""
    from mixture_of_experts.ops.triton import network as by_kernels

    given = call.decision
    x, weight = call.x.detach().requires_grad_(), given.weight.detach().requires_grad_()
    network = call.network.map(lambda tensor: tensor.detach().requires_grad_())
    expert = torch.where(given.kept, given.expert, -1)
    decision = decision_on(expert.view(-1, CHOICES), weight.view(-1, CHOICES), network.w_out.shape[0])
    out = (by_kernels if kernels else lean).run(Call(x, decision, network, True))
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).sin().view_as(out).to(call.x.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, weight, *network.tensors().values()], grad)]


def names(call: Call) -> list[str]:
    """Names of what `results` returns."""
    return ["the output", *(f"the gradient of {name}" for name in ("x", "weights", *call.network.tensors()))]
