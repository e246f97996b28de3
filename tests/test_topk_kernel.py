"""Which calls of a gate its kernel supports, with which arguments it is called, and its self-check. torch's operators
stand in for the kernel, which `test_triton.py` runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checks_in_this_process import run_here
from torch import Tensor, nn

from mixture_of_experts import HashGating, TopKGating, ops
from mixture_of_experts.gating import RouterLogits, kernel_checks, topk_by_kernel
from mixture_of_experts.gating.choices import top_choices
from mixture_of_experts.kernels import check_process
from mixture_of_experts.kernels.launching import can_launch_kernels

DIM, E = 4, 5
Spoil = Callable[[list[Tensor]], Any]


def choose_by_topk(
    logits: Tensor, bias: Tensor | None, k: int, softmax: bool, of_chosen: bool, normalized: bool, *numbers: float
):
    """Compute the results of the kernel for logits `(b, n, e)`: choices, weights, probabilities, and each group's
    contribution `(b, 2)` to the two losses."""
    scale, eps, of_balance, of_z = numbers
    score = logits.softmax(-1) if softmax else logits.sigmoid()
    expert = top_choices(score if bias is None else score + bias, k)
    weight, probs = score.gather(-1, expert), score / score.sum(-1, keepdim=True)
    weight = scale * (weight / (weight.sum(-1, keepdim=True) + eps) if normalized else weight)
    if of_chosen:
        weight = scale * logits.gather(-1, expert).softmax(-1)
    load = F.one_hot(expert, logits.shape[-1]).sum(dim=(1, 2))
    balance, z_loss = (load * probs.sum(dim=1)).sum(-1), logits.logsumexp(-1).square().sum(-1)
    return expert, weight, probs, torch.stack([of_balance * balance, of_z * z_loss], dim=-1)


class Kernel:
    """Counts its calls. `spoil` changes the results of the next ones; without `there`, operators decide."""

    there: bool = True
    calls: int = 0
    spoil: Spoil | None = None

    def __call__(self, *arguments: Any) -> list[Tensor]:
        self.calls += 1
        found = list(choose_by_topk(*arguments))
        if self.spoil is not None:
            self.spoil(found)
        return found


@pytest.fixture
def fake_kernel(monkeypatch) -> Iterator[Kernel]:
    kernel = Kernel()
    monkeypatch.setitem(sys.modules, "mixture_of_experts.kernels.top_k", SimpleNamespace(choose_top_k=kernel))
    monkeypatch.setattr(kernel_checks, "can_launch_kernels", lambda device: kernel.there)
    monkeypatch.setattr(topk_by_kernel.SELF_CHECK, "verdicts", {})
    monkeypatch.setattr(check_process, "run_in_process", run_here)
    with torch.no_grad():
        yield kernel


def make_gate(num_experts: int = E, dim: int = DIM, kind: type[TopKGating] = TopKGating, **settings: Any) -> TopKGating:
    torch.manual_seed(0)
    gate = kind(dim, num_experts, **settings).eval()
    if gate.expert_bias is not None:
        gate.expert_bias.normal_(std=0.1)
    return gate


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(score="sigmoid", expert_bias=True, scale=2.5, eps=0.5, bias=True),
        dict(k=3, weigh="softmax", normalize=False, balance_over="batch"),
        dict(k=1, capacity_factor_eval=1.0, min_expert_capacity=1),
        dict(normalize=False, logits=RouterLogits(DIM, E, norm_eps=1e-6)),
        dict(num_experts=topk_by_kernel.MAX_EXPERTS, k=topk_by_kernel.MAX_CHOICES, priority="token"),
    ],
)
def test_supported_calls(settings, fake_kernel):
    """Groups of up to eight tokens. The kernel is checked once, and its results equal those of operators."""
    gate = make_gate(**settings)
    for number, (b, n) in enumerate([(3, 1), (1, 3), (2, topk_by_kernel.MAX_TOKENS)]):
        x, random = torch.randn(b, n, DIM), torch.get_rng_state()
        found = gate(x)
        assert fake_kernel.calls == number + 2
        assert torch.equal(torch.get_rng_state(), random)
        fake_kernel.there = False
        wanted = gate(x)
        fake_kernel.there = True
        for field in ("expert", "kept", "weight", "probs", "balance_loss", "z_loss"):
            torch.testing.assert_close(getattr(found, field), getattr(wanted, field), rtol=1e-5, atol=1e-6, msg=field)
    assert fake_kernel.calls == 4


class CustomGating(TopKGating):
    def decide(self, tokens):
        return super().decide(tokens)


@pytest.mark.parametrize(
    "settings",
    [
        dict(score="sqrt_softplus"),
        dict(score="sigmoid", weigh="softmax"),
        dict(weigh="softmax", eps=0.01),  # added to a sum of all probabilities, it is another share
        dict(weigh=lambda logits, score, expert: score.gather(-1, expert)),
        dict(select="logits"),
        dict(normalize=lambda weight: weight),
        dict(num_experts=4, num_groups=2, top_groups=1),
        dict(priority="score"),
        dict(logits=nn.Linear(DIM, E)),
        dict(kind=CustomGating),
        dict(num_experts=topk_by_kernel.MAX_EXPERTS + 1),
        dict(num_experts=topk_by_kernel.MAX_CHOICES + 1, k=topk_by_kernel.MAX_CHOICES + 1),
        dict(dtype=torch.float64),
    ],
)
def test_unsupported_gates(settings, fake_kernel):
    make_gate(**settings)(torch.randn(2, 1, DIM))
    assert not fake_kernel.calls


def test_unsupported_calls(fake_kernel):
    gate, x = make_gate(), torch.randn(2, 2, DIM)
    gate(x, mask=torch.ones(2, 2, dtype=torch.bool))
    gate(x, importance=torch.ones(2, 2))
    gate(x, length=torch.tensor([2, 1]))
    gate(x, given_experts=torch.arange(2).expand(2, 2, 2))
    gate(torch.randn(1, topk_by_kernel.MAX_TOKENS + 1, DIM))
    gate(x[:0])
    gate(x[:, :0])
    gate(x.double())
    make_gate(outer_expert_dims=(2,))(x.expand(2, 2, 2, DIM))
    make_gate(kind=HashGating, num_ids=3)(x, token_ids=torch.ones(2, 2, dtype=torch.int64))
    gate.train()(x)
    gate.eval()
    with torch.enable_grad():
        gate(x)
    fake_kernel.there = False
    gate(x)
    assert not fake_kernel.calls
    fake_kernel.there = True
    gate(x)
    assert fake_kernel.calls


def test_cpu_launches_kernels_on_request(monkeypatch):
    """Kernels need Triton's interpreter, and are not launched within a transform."""
    found = {}
    for implementation in ("auto", "plain", "cpu", "triton", "batch_invariant"):
        for router_kernels in (None, True, False):
            for variable in ("1", "0"):
                monkeypatch.setenv("TRITON_INTERPRET", variable)
                with ops.use("triton"), ops.use(implementation, router_kernels=router_kernels):  # the inner one applies
                    found[implementation, router_kernels, variable] = can_launch_kernels(torch.device("cpu"))
    requested = [("auto", True), ("plain", True), ("cpu", True), ("triton", None), ("triton", True)]
    assert [case for case, launches in found.items() if launches] == [(*case, "1") for case in requested]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.use("triton"):
        torch.func.vmap(lambda x: found.update(vmap=can_launch_kernels(x.device)) or x)(torch.ones(2))
        assert not can_launch_kernels(torch.device("meta"))
    assert not found["vmap"]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("weights", lambda found: found[1].mul_(1.01)),
        ("experts", lambda found: found[0][:2].copy_((found[0][:2] + 1) % E)),
        ("experts", lambda found: found[0].fill_(E)),  # there is none
        ("probabilities", lambda found: found[2][0, 0, 0].add_(0.01)),
        ("balance", lambda found: found[3][0, 0].add_(0.1)),
        ("z", lambda found: found[3][0, 1].add_(0.1)),
    ],
)
def test_wrong_kernel_is_disabled(name, spoil, fake_kernel):
    """A wrong kernel is disabled for all gates with a warning, and the results are right."""
    gate, x = make_gate(), torch.randn(2, 1, DIM)
    fake_kernel.spoil = spoil
    said = f"^the Triton kernels of gates are disabled in this process: their {name} differ from those of torch's"
    with pytest.warns(UserWarning, match=said):
        found = gate(x)
    fake_kernel.spoil = None
    make_gate(k=3)(x)
    assert fake_kernel.calls == 1
    fake_kernel.there = False
    assert torch.equal(found.expert, gate(x).expert)


def test_choices_of_one_token_may_differ(fake_kernel):
    """Two experts may be equal up to rounding. Operators define the results for NaN."""

    def spoil(found: list[Tensor]) -> None:
        found[0][0, 0] = (found[0][0, 0] + 1) % E

    fake_kernel.spoil = spoil
    make_gate()(torch.randn(2, 1, DIM))
    assert fake_kernel.calls == 2
    lost = make_gate(k=3)
    lost.w_gating.fill_(torch.nan)
    fake_kernel.spoil = None
    lost(torch.randn(2, 1, DIM))
    assert fake_kernel.calls == 4


def test_one_that_raises_and_one_without_memory(fake_kernel):
    """A lack of memory is a verdict for one kind of gate, and an error for all kinds."""

    def raises(error: Exception) -> Spoil:
        def spoil(found: list[Tensor]) -> None:
            raise error

        return spoil

    x = torch.randn(2, 1, DIM)
    fake_kernel.spoil = raises(torch.OutOfMemoryError("no memory"))
    with pytest.warns(UserWarning, match="there was not enough memory for their self-check"):
        make_gate()(x)
    make_gate()(x)
    assert fake_kernel.calls == 1  # it is not tried again
    fake_kernel.spoil = None
    for number, settings in enumerate([dict(k=3), dict(scale=2.0), dict(score="sigmoid"), dict(num_experts=6)]):
        make_gate(**settings)(x)
        make_gate(**settings)(x)
        assert fake_kernel.calls == 1 + 3 * (number + 1)
    fake_kernel.spoil = raises(RuntimeError("a compiler gives up"))
    with pytest.warns(UserWarning, match="they raised RuntimeError: a compiler gives up"):
        make_gate(k=4)(x)
    make_gate(k=4)(x)
    make_gate()(x)
    assert fake_kernel.calls == 14
