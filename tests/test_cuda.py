"""Tests on a GPU: `pytest -m cuda`. All implementations are compared with the definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from support import faulty_checks
from torch import Tensor, nn

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    Top2Gating,
    TopKGating,
    ops,
)
from mixture_of_experts.kernels import check_process

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DIM, HIDDEN = 64, 96
GATES = {
    "top 2, capacity": lambda: Top2Gating(DIM, 8, second_policy_train="all"),
    "top 3": lambda: TopKGating(DIM, 8, 3),
    "noisy, in eval": lambda: NoisyTopKGating(DIM, 8, 2),
    "expert choice": lambda: ExpertChoiceGating(DIM, 8),
}
EXPERTS = {
    "plain": lambda num: Experts(DIM, num, HIDDEN),
    "gated": lambda num: GatedExperts(DIM, num, HIDDEN),
    "gated, biases": lambda num: GatedExperts(DIM, num, HIDDEN, nn.GELU, bias=True),
    "clamped": lambda num: GatedExperts(DIM, num, HIDDEN, ops.ClampedSwiGLU, bias=True),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@contextmanager
def forbid_sync() -> Iterator[None]:
    """Where an operation that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_layer(gate: str, experts: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if gate == "two levels":
        layer = HeirarchicalMoE(DIM, (2, 4), experts=EXPERTS[experts]((2, 4)), second_policy_train="all")
    else:
        layer = MoE(DIM, 8, gate=GATES[gate](), experts=EXPERTS[experts](8))
    return layer.to("cuda", dtype).train("eval" not in gate)


def compute_results(layer: nn.Module, x: Tensor, mask: Tensor | None, implementation: str) -> list[Tensor]:
    with ops.use(implementation, router_kernels=None if implementation == "triton" else False):
        out, loss = layer(x, mask=mask)
        gradients = torch.autograd.grad(out.float().square().mean() + loss, [x, *layer.parameters()], allow_unused=True)
    return [out, loss, *(torch.zeros(1, device="cuda") if grad is None else grad for grad in gradients)]


def is_supported(layer: nn.Module, x: Tensor, implementation: str) -> bool:
    try:
        with ops.use(implementation), torch.no_grad():
            layer(x)
    except ValueError:
        return False
    return True


def skip_unless(layer: nn.Module, x: Tensor, implementation: str) -> None:
    if not is_supported(layer, x, implementation):
        pytest.skip(f"{implementation} does not take {x.dtype} here")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("gate", [*GATES, "two levels"])
@pytest.mark.parametrize("implementation", ["triton", "grouped", "batched"])
def test_implementations(implementation: str, gate: str, experts: str, dtype: torch.dtype):
    """Outputs, losses and gradients are those of plain operators in the next wider dtype; nothing waits for the GPU."""
    check_implementation(implementation, gate, experts, dtype, 100)


@pytest.mark.parametrize("implementation", ["triton", "grouped", "batched"])
def test_queues_of_many_assignments(implementation: str):
    """More than kernels compare with each other."""
    check_implementation(implementation, "top 2, capacity", "gated", torch.bfloat16, 1500)


def check_implementation(implementation: str, gate: str, experts: str, dtype: torch.dtype, length: int) -> None:
    layer = make_layer(gate, experts, dtype)
    x = torch.randn(2, length, DIM, device="cuda", dtype=dtype, requires_grad=True)
    skip_unless(layer, x, implementation)
    exact = make_layer(gate, experts, torch.float64)
    exact.load_state_dict(layer.state_dict())
    for mask in (None, torch.rand(2, length, device="cuda") < 0.8):
        with forbid_sync():
            found = compute_results(layer, x, mask, implementation)
        wanted = compute_results(exact, x.double().detach().requires_grad_(), mask, "plain")
        for got, want in zip(found, wanted, strict=True):
            error = (got.double() - want).norm() / want.norm().clamp(min=1e-6)
            assert error < 3 * TOLERANCE[dtype], float(error)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("implementation", ["auto", "triton", "grouped", "batched"])
def test_non_current_device(implementation: str):
    layer = make_layer("top 3", "gated", torch.bfloat16)
    x = torch.randn(2, 100, DIM, device="cuda", dtype=torch.bfloat16)
    skip_unless(layer, x, implementation)
    with ops.use(implementation), torch.no_grad():
        one, two = (layer.to(card)(x.to(card))[0].cpu() for card in ("cuda:0", "cuda:1"))
    torch.testing.assert_close(one, two, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("fault", "reason"), [("break_context", "they raised"), ("sleep_on_gpu", "did not finish")])
def test_faults_in_the_self_check_do_not_reach_this_process(monkeypatch, fault: str, reason: str):
    monkeypatch.setattr(check_process, "TIMEOUT_SECONDS", 60)
    device = torch.device("cuda", 0)
    verdict = check_process.run_in_process(device, partial(getattr(faulty_checks, fault), device))
    assert reason in str(verdict.fault)
    assert torch.ones(3, device=device).sum().item() == 3


@pytest.mark.parametrize("tokens", [1, 4, 64])
@pytest.mark.parametrize("gate", ["top 3", "top 2, capacity", "two levels"])
@pytest.mark.parametrize("implementation", ["auto", "triton", "grouped", "batched"])
@torch.no_grad()
def test_decoding(implementation: str, gate: str, tokens: int):
    """A few tokens in eval: what plain operators compute, and nothing waits for the GPU once kernels are checked."""
    layer, exact = (make_layer(gate, "gated", dtype).eval() for dtype in (torch.bfloat16, torch.float64))
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(tokens, 1, DIM, device="cuda", dtype=torch.bfloat16)
    for of_layer in (layer, exact):
        for module in of_layer.modules():
            if hasattr(module, "second_policy_eval"):
                module.second_policy_eval, module.capacity_factor_eval = "all", None
    skip_unless(layer, x, implementation)
    with forbid_sync(), ops.use(implementation):
        found = layer(x)
    with ops.use("plain", router_kernels=False):
        wanted = exact(x.double())
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).norm() < 3 * TOLERANCE[torch.bfloat16] * want.norm().clamp(min=1e-6)


@pytest.mark.parametrize("implementation", ["triton", "grouped", "batched"])
def test_run_to_run_determinism(implementation: str):
    layer = make_layer("top 3", "gated, biases", torch.bfloat16)
    x = torch.randn(2, 500, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    skip_unless(layer, x, implementation)
    first = compute_results(layer, x, None, implementation)
    for _ in range(5):
        for one, other in zip(first, compute_results(layer, x, None, implementation), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["triton", "grouped", "batched"])
def test_a_graph_captures_a_call(implementation: str):
    layer = make_layer("top 3", "gated", torch.bfloat16).eval()
    x = torch.randn(2, 64, DIM, device="cuda", dtype=torch.bfloat16)
    skip_unless(layer, x, implementation)
    with torch.no_grad(), ops.use(implementation):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # x is made there
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = layer(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(out, layer(x)[0])


@pytest.mark.parametrize("implementation", ["triton", "grouped", "batched"])
def test_one_compiled_graph(implementation: str):
    layer = make_layer("top 3", "gated", torch.bfloat16)
    skip_unless(layer, torch.randn(2, 64, DIM, device="cuda", dtype=torch.bfloat16), implementation)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (40, 64, 100):
        x = torch.randn(2, length, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for got, want in zip(
            compute_results(compiled, x, None, implementation),
            compute_results(layer, x, None, implementation),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
