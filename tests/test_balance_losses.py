"""Balancing losses by name, each against a loop that follows its paper token by token.

`test_parallel_two_ranks.py` and `test_parallel.py` have them over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.layer_variants import run_layer
from torch import Tensor

from mixture_of_experts import ExpertChoiceGating, HeirarchicalMoE, MoE, NoisyTopKGating, Top2Gating, TopKGating
from mixture_of_experts.gating import BALANCE_LOSSES
from mixture_of_experts.gating.base import TokenChoiceGate
from mixture_of_experts.stats import track_routing

E, K, D, M = 8, 3, 4, 2  # experts, choices, devices (expert groups), devices of a token
DEVICES = [range(2 * i, 2 * i + 2) for i in range(D)]

GATES = {
    "softmax": dict(normalize=False),
    "sigmoid, bias": dict(score="sigmoid", expert_bias=True),
}


def make_gate(name: str, **more) -> TopKGating:
    torch.manual_seed(0)
    gate = TopKGating(6, E, K, num_groups=D, top_groups=M, **GATES[name], **more).double()
    if gate.expert_bias is not None:
        gate.expert_bias.normal_()
    return gate


# The slow losses of a unit: scores `(e,)` and chosen experts of its tokens that count, and the divisor of means


def f_and_p(scores: list[Tensor], experts: list[list[int]], length: float) -> tuple[list[float], list[Any]]:
    normalized = [s / s.sum() for s in scores]  # equation 19; the scores of a softmax are
    p = [sum(s[i] for s in normalized) / length for i in range(E)]
    return [E / (K * length) * sum(i in chosen for chosen in experts) for i in range(E)], p


def loss_over_experts(*tokens: Any) -> Any:
    return sum(f * p for f, p in zip(*f_and_p(*tokens), strict=True))


def loss_over_scores(scores: list[Tensor], experts: object, length: float) -> Any:
    best = [sorted(range(E), key=lambda i, s=s: (-s[i].item(), i))[:K] for s in scores]  # equation 18
    return loss_over_experts(scores, best, length)


def loss_over_devices(*tokens: Any) -> Any:
    f, p = f_and_p(*tokens)  # equations 26 to 28 of DeepSeek-V2
    return sum(sum(f[i] for i in device) / len(device) * sum(p[i] for i in device) for device in DEVICES)


def loss_over_communication(scores: list[Tensor], experts: list[list[int]], length: float) -> Any:
    _, p = f_and_p(scores, experts, length)  # equations 29 to 31
    sent = [sum(any(i in device for i in chosen) for chosen in experts) for device in DEVICES]
    return sum(D / (M * length) * n * sum(p[i] for i in device) for n, device in zip(sent, DEVICES, strict=True))


#: of each loss the slow one of a unit, and whether a unit is a group or all tokens
REFERENCE: dict[str, tuple[Callable[..., Any], str]] = {
    "balance_group": (loss_over_experts, "group"),
    "balance_batch": (loss_over_experts, "all"),
    "balance_score": (loss_over_scores, "group"),
    "balance_device": (loss_over_devices, "group"),
    "balance_communication": (loss_over_communication, "group"),
}


def reference_loss(name: str, gate: TopKGating, x: Tensor, counted: Tensor, length: Tensor) -> Tensor:
    """Of tokens `(*outer, b, n, d)`, those `counted`, in groups of so many real ones."""
    expert = gate(x).expert.unflatten(-1, (-1, K))  # who is chosen is tested elsewhere
    (of_unit, unit), units = REFERENCE[name], []
    for outer in [()] if not gate.outer_expert_dims else [(i,) for i in range(gate.outer_expert_dims[0])]:
        scores = x[outer] @ gate.w_gating[outer]
        scores = scores.softmax(-1) if gate.score == "softmax" else scores.sigmoid()
        of_groups = [
            ([g[t] for t in range(len(g)) if c[t]], [e[t].tolist() for t in range(len(g)) if c[t]], float(n))
            for g, e, c, n in zip(scores, expert[outer], counted[outer], length[outer], strict=True)
        ]
        if unit == "group":
            units += of_groups
        else:
            s, e, n = zip(*of_groups, strict=True)
            units.append((list(chain(*s)), list(chain(*e)), sum(n)))
    found = [of_unit(*tokens) for tokens in units if tokens[2] > 0]
    return sum(found, x.new_zeros(())) / len(found)


@pytest.mark.parametrize("kind", ["all", "mask", "mask, two levels", "importance, two levels"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_every_loss_is_its_papers(name: str, gate: str, kind: str):
    outer = (2,) if "two levels" in kind else ()
    made = make_gate(gate, outer_expert_dims=outer)
    x = torch.randn(*outer, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    counted, length, given = torch.ones(x.shape[:-1], dtype=torch.bool), torch.full(x.shape[:-2], 7), {}
    if "mask" in kind:
        length = torch.tensor([[7, 0, 4], [0, 3, 5]])[slice(2) if outer else 0]  # one group has no token
        counted = torch.arange(7) < length.unsqueeze(-1)
        given = {"mask": counted}
    elif outer:
        importance = torch.randint(3, x.shape[:-1]) / 2
        counted, given = importance == 1, {"importance": importance.to(torch.float64)}
    fast = made(x, losses=[name], **given).losses[name]
    expected = reference_loss(name, made, x, counted, length)
    torch.testing.assert_close(fast, expected)
    ours, theirs = (torch.autograd.grad(loss, [x, made.w_gating]) for loss in (fast, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("over", ["group", "batch"])
def test_custom_gate_loss_is_reported(over):
    gate = make_gate("sigmoid, bias", balance_over=over)
    mask = torch.arange(7) < torch.tensor([7, 0, 4]).unsqueeze(-1)
    losses = gate(torch.randn(3, 7, 6, dtype=torch.float64), mask=mask, losses=tuple(BALANCE_LOSSES)).losses
    assert torch.equal(losses["balance"], losses[f"balance_{over}"])
    assert len({losses[f"balance_{other}"].item() for other in ("group", "batch")}) == 2


@pytest.mark.parametrize(
    "make",
    [lambda: Top2Gating(6, E, second_policy_train="none"), lambda: NoisyTopKGating(6, E), lambda: make_gate("softmax")],
)
def test_any_gate_of_token_choice_reports_them(make):
    """Of the choices that are made: without second ones, a Top-2 gate has half of its load."""
    gate, x = make().float(), torch.randn(2, 9, 6)
    routing = gate(x, losses=["balance_batch"])
    made = routing.expert[routing.sent] if isinstance(gate, Top2Gating) else routing.expert
    f = made.flatten().bincount(minlength=E) / (18 * gate.k)
    torch.testing.assert_close(routing.losses["balance_batch"], E * (f * routing.probs.mean((0, 1))).sum())


def test_a_layer_weighs_several_and_shows_them():
    coefs = {"balance_batch": 0.5, "balance_device": 0.05, "balance_communication": 0.0}
    moe = MoE(6, gate=make_gate("softmax").float(), loss_coef=0.1, loss_coefs=coefs)
    x = torch.randn(2, 9, 6)
    with track_routing(moe) as stats:
        _, aux_loss = moe(x)
    found = moe.gate(x, losses=tuple(coefs)).losses
    wanted = 0.1 * found["balance"] + 0.5 * found["balance_batch"] + 0.05 * found["balance_device"]
    torch.testing.assert_close(aux_loss, wanted)
    assert set(stats.last("gate").losses) == {"balance", "z", "balance_batch", "balance_device"}
    moe.loss_coefs = {}
    with patch.object(TokenChoiceGate, "named_losses", side_effect=AssertionError):  # nobody asks: nothing is computed
        moe(x)
    assert set(moe.gate(x).losses) == {"balance", "z"}


def test_two_levels_add_theirs_up():
    inner = TopKGating(6, 4, num_groups=2, top_groups=2, outer_expert_dims=(3,))
    moe = HeirarchicalMoE(6, (3, 4), gate_inner=inner, loss_coef=0, loss_coefs={"balance_batch": 0.5})
    seen = []
    for gate in (moe.gate_outer, moe.gate_inner):
        gate.register_forward_hook(lambda gate, args, routing: seen.append(routing.losses))
    _, aux_loss = run_layer(moe, torch.randn(2, 9, 6))
    torch.testing.assert_close(aux_loss, 0.5 * (seen[0]["balance_batch"] + seen[1]["balance_batch"]))
    moe.loss_coefs = {"balance_device": 1.0}  # only the inner gate has expert groups
    assert run_layer(moe, torch.randn(2, 9, 6))[1] == seen[-1]["balance_device"]


@pytest.mark.parametrize("gate", [TopKGating(6, E), ExpertChoiceGating(6, E)])
def test_unreported_losses_raise(gate):
    coefs = {"balance_device": 0.1}
    wrong = pytest.raises(
        ValueError,
        match=r"'balance_device', but this layer's gates report only.* set num_groups",
    )
    x = torch.randn(1, 3, 6)
    moe = MoE(6, gate=gate, loss_coefs=coefs)
    with wrong:
        moe(x)
    moe.loss_coefs = {"balance_device": 0.0}  # weighs nothing
    moe(x)
    grouped = TopKGating(6, 4, num_groups=2, top_groups=2, outer_expert_dims=(3,))
    HeirarchicalMoE(6, (3, 4), gate_inner=grouped, loss_coefs=coefs)(x)  # one of both reports it
    with wrong:
        HeirarchicalMoE(6, (3, 4), loss_coefs=coefs)(x)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_inputs(shape):
    losses = make_gate("softmax").float()(torch.randn(*shape, 6), losses=tuple(BALANCE_LOSSES)).losses
    assert all(losses[name] == 0 for name in BALANCE_LOSSES)


def test_every_loss_over_experts_with_a_single_expert():
    """`Top2Gating` makes two choices there, the second of which has no expert of its own."""
    gate = Top2Gating(6, 1)
    losses = gate(torch.randn(2, 5, 6), losses=("balance_group", "balance_batch", "balance_score")).losses
    assert losses["balance_score"] == losses["balance_group"] == losses["balance_batch"]
