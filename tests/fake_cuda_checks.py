"""What runs in the process of fake CUDA: the layer on 'cuda', where a wrong device and a host sync raise.

Axes: b sequences, n tokens of one, d model dim, e experts, k choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from fake_cuda import card
from fake_cuda_counts import Counts, count
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    Top2Gating,
    TopKGating,
)
from mixture_of_experts.stats import track_routing

DIM, HIDDEN = 64, 96
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def factors(capacity: float | None) -> dict[str, float | None]:
    return dict(capacity_factor_train=capacity, capacity_factor_eval=capacity)


def grouped(capacity: float | None, outer: tuple[int, ...] = ()) -> TopKGating:
    options = dict(num_groups=4, top_groups=2, expert_bias=True, bias=True, score="sigmoid", scale=2.5)
    return TopKGating(DIM, 8, 3, **options, outer_expert_dims=outer, **factors(capacity))


ROUTERS: dict[str, Callable[[float | None], nn.Module]] = {
    "top 2": lambda c: Top2Gating(DIM, 8, **factors(c)),
    "top 2, by score": lambda c: Top2Gating(DIM, 8, priority="score", **factors(c)),
    "switch": lambda c: TopKGating(DIM, 8, 1, jitter=0.01, **factors(c)),
    "top 3": lambda c: TopKGating(DIM, 8, 3, balance_over="batch", **factors(c)),
    "top 3, by token": lambda c: TopKGating(DIM, 8, 3, priority="token", **factors(c)),
    "top 3 of groups": grouped,
    "noisy": lambda c: NoisyTopKGating(DIM, 8, 2, **factors(c)),
    "expert choice": lambda c: ExpertChoiceGating(DIM, 8),
}
EXPERTS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda num: Experts(DIM, num, HIDDEN),
    "gated": lambda num: GatedExperts(DIM, num, HIDDEN),
    "gated with biases": lambda num: GatedExperts(DIM, num, HIDDEN, nn.GELU, bias=True),
}


@contextmanager
def on_gpu(dtype: torch.dtype, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Where modules are made on the GPU, in `dtype` (fake parameters cannot be cast afterwards)."""
    before = torch.get_default_dtype()
    with card(capability), FakeTensorMode(), torch.device("cuda"):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def autocasting() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which asks whether there is a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def one_level(router: str, experts: str, capacity: float | None) -> MoE:
    return MoE(DIM, 8, gate=ROUTERS[router](capacity), experts=EXPERTS[experts](8))


def two_levels(experts: str, capacity: float | None) -> HeirarchicalMoE:
    inner = TopKGating(DIM, 4, 2, outer_expert_dims=(2,), **factors(capacity))
    outer = Top2Gating(DIM, 2, **factors(capacity))
    return HeirarchicalMoE(DIM, (2, 4), gate_outer=outer, gate_inner=inner, experts=EXPERTS[experts]((2, 4)))


def check_layer(
    router: str,
    experts: str,
    capacity: float | None,
    dtype: str = "bf16",
    *,
    masked: bool = False,
    autocast: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> None:
    """Forward and backward, training and not: everything is on the GPU and of the right dtype, nothing waits for it."""
    with on_gpu(DTYPES[dtype], capability):
        layer = two_levels(experts, capacity) if router == "two levels" else one_level(router, experts, capacity)
        for training in (True, False):
            layer.train(training)
            check_call(layer, DTYPES[dtype], masked, autocast)


def check_call(layer: nn.Module, dtype: torch.dtype, masked: bool, autocast: bool) -> None:
    x = torch.empty(2, 40, DIM, dtype=dtype, requires_grad=True)
    mask = torch.empty(2, 40, dtype=torch.bool) if masked else None
    with autocasting() if autocast else nullcontext():
        out, aux_loss = layer(x, mask=mask)
    assert (out.device.type, out.dtype, out.shape) == ("cuda", dtype, x.shape)
    assert aux_loss.device.type == "cuda"
    assert aux_loss.shape == ()
    (out.float().square().mean() + aux_loss).backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        grad = tensor.grad
        assert grad is not None, name
        assert (grad.device, grad.dtype, grad.shape) == (tensor.device, tensor.dtype, tensor.shape), name
        tensor.grad = None


def check_statistics() -> None:
    """Recording what a gate does waits for nothing; reading it does, and that is seen here."""
    with on_gpu(torch.bfloat16):
        layer = one_level("top 3", "gated", 1.0)
        with track_routing(layer) as stats:
            for _ in range(2):
                check_call(layer, torch.bfloat16, masked=True, autocast=False)
                stats.step()


def check_sync_is_seen() -> None:
    """The tools see what they are for: numbers that are read, a shape that depends on them, two devices."""
    with on_gpu(torch.float32):
        x = torch.empty(4)
        wrong = {
            "DataDependentOutputException": lambda: x.sum().item(),
            "DynamicOutputShapeException": lambda: x.nonzero(),
            "FakeTensorDeviceMismatchError": lambda: x + torch.empty(4, device="cpu"),
        }
        for error, call in wrong.items():
            with pytest.raises(Exception) as raised:  # noqa: PT011  (torch keeps these classes in private places)
                call()
            assert raised.typename == error


# ---- budgets ----


def layer_counts(
    tokens: int,
    dim: int,
    hidden: int,
    experts: int,
    choices: int,
    *,
    dtype: str = "bf16",
    capability: tuple[int, int] = (9, 0),
    gated: bool = True,
) -> dict[str, Any]:
    """Counts of a dropless top-k layer at one size, and its x and pre-activations in bytes."""
    with on_gpu(DTYPES[dtype], capability):
        gate = TopKGating(dim, experts, choices)
        network = (GatedExperts if gated else Experts)(dim, experts, hidden)
        layer = MoE(dim, experts, gate=gate, experts=network)
        x = torch.empty(1, tokens, dim, dtype=DTYPES[dtype], requires_grad=True)
        known: list[Tensor] = [x, *layer.parameters()]
        counts, _ = count(lambda: layer(x), known)
        pre = tokens * choices * hidden * (2 if gated else 1)
        return {**Counts._asdict(counts), "floor": (x.numel() + pre) * x.element_size()}
