"""The package and the slow reference, by cases that a person can work out.

What TensorFlow recorded is in test_golden.py; that both compute the same, on every path, in test_matrix.py.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import reference
from support.strategies import Router
from torch import Tensor, nn

from mixture_of_experts import HeirarchicalMoE, Routing

# Token t has the probabilities of row t.


@dataclass
class DecisionSummary:
    """What the package or the reference decided, in the same words. Choices are the kept ones of the first group."""

    choices: dict[tuple[int, int], tuple[int, int]]  # (token, order): (expert, slot)
    weights: dict[tuple[int, int], Any]  # approximate
    balance_loss: float
    z_loss: float
    losses: dict[str, float]


def summarize_package(routing: Routing) -> DecisionSummary:
    choices, weights = {}, {}
    for i in routing.kept[0].nonzero().flatten().tolist():
        expert = int(routing.expert[0, i])
        key = int(routing.token[0, i]), expert if routing.k is None else i % routing.k
        choices[key], weights[key] = (expert, int(routing.position[0, i])), pytest.approx(routing.weight[0, i].item())
    losses = {name: loss.item() for name, loss in routing.losses.items()}
    return DecisionSummary(choices, weights, routing.balance_loss.item(), routing.z_loss.item(), losses)


def summarize_reference(assignments: reference.ReferenceDecision) -> DecisionSummary:
    kept = {(c.token.position, c.order): c for c in assignments.choices if c.kept and c.group.index == (0,)}
    choices = {key: (c.expert, c.slot) for key, c in kept.items()}
    weights = {key: pytest.approx(c.weight.item()) for key, c in kept.items()}
    losses = {name: loss.item() for name, loss in assignments.losses.items()}
    return DecisionSummary(choices, weights, assignments.balance_loss.item(), assignments.z_loss.item(), losses)


def build_gate(kind: str, w_gating: Tensor, weights: dict[str, Tensor] | None = None, **arguments):
    """The package's gate with these weights, and the reference on them."""
    *outer, dim, num_experts = w_gating.shape
    router = Router(kind, arguments)
    gate = router.build(dim, num_experts, 0, tuple(outer))
    with torch.no_grad():
        for name, values in {"w_gating": w_gating, **(weights or {})}.items():
            getattr(gate, name).copy_(values)
    return gate, router.reference(gate)


@pytest.fixture(params=["package", "reference"])
def resolve_decider(request: pytest.FixtureRequest) -> str:
    return request.param


def run_decision(
    who: str, x: Tensor, gates, importance: Tensor | None = None, mask: Tensor | None = None
) -> DecisionSummary:
    gate, slow = gates
    if who == "package":
        return summarize_package(gate(x, importance=importance, mask=mask))
    return summarize_reference(slow.decide(reference.make_groups(x, importance, mask)))


def make_toy(rows):
    """Inputs (1, n, n) and w_gating (n, e) with which a softmax router gives token t the probabilities rows[t]."""
    probs = torch.tensor(rows, dtype=torch.float64)
    return torch.eye(len(rows), dtype=torch.float64).unsqueeze(0), probs.log()


TOP2 = {"second_policy_train": "all", "min_expert_capacity": 1}
CROWDED = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2]]  # first choices 0, 0, 1; second choices 1, 1, 0


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        # Firsts in order: 0 and 1 fill expert 0, 2 takes expert 1; of the seconds only token 0's finds a slot.
        ("choice", {(0, 0): (0, 0), (1, 0): (0, 1), (2, 0): (1, 0), (0, 1): (1, 1)}),
        # Token 0 takes both, token 1 takes both, token 2 comes too late for either.
        ("token", {(0, 0): (0, 0), (0, 1): (1, 0), (1, 0): (0, 1), (1, 1): (1, 1)}),
        # Token 1 (0.6) first, then 0 and 2 (0.5 each, by position); its second choice comes before token 0's.
        ("score", {(1, 0): (0, 0), (0, 0): (0, 1), (2, 0): (1, 0), (1, 1): (1, 1)}),
    ],
)
@pytest.mark.parametrize("router", ["top2", "topk"])
def test_priority_by_hand(resolve_decider, router, priority, expected):
    x, w = make_toy(CROWDED)
    if router == "top2":
        gates = build_gate("top2", w, capacity_factor_train=2.0, priority=priority, **TOP2)  # 3 tokens · 2 / 3 experts
    else:  # 2 choices · 3 tokens / 3 experts, two slots as well
        gates = build_gate("topk", w, capacity_factor_train=1.0, min_expert_capacity=1, priority=priority)
    assert run_decision(resolve_decider, x, gates).choices == expected


def test_mask_by_hand(resolve_decider):
    """The middle token is padding: two real tokens, one slot an expert, means over two."""
    x, w = make_toy([[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.6, 0.3, 0.1]])
    gates = build_gate("top2", w, capacity_factor_train=1.5, **TOP2)  # int(2 · 1.5 / 3) = 1
    seen = run_decision(resolve_decider, x, gates, mask=torch.tensor([[True, False, True]]))
    assert seen.choices == {(0, 0): (0, 0), (0, 1): (1, 0)}
    # proxy (1.3, 0.5, 0.2) / 2 times load (2, 0, 0) / 2, mean over 3 experts, times 9
    assert seen.balance_loss == pytest.approx(3 * 0.65)
    assert seen.z_loss == pytest.approx(0.0, abs=1e-12)  # the logits are log-probabilities


def test_top2_importance_by_hand(resolve_decider):
    """Importance 0.5 makes a token's top expert its second choice; 0 makes it no choice at all."""
    x, w = make_toy([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    gates = build_gate("top2", w, capacity_factor_train=None, **TOP2)
    seen = run_decision(resolve_decider, x, gates, importance=torch.tensor([[1.0, 0.5, 0.0]]))
    assert {key: expert for key, (expert, _) in seen.choices.items()} == {(0, 0): 0, (0, 1): 1, (1, 1): 1}
    assert seen.weights == {(0, 0): 0.7 / 0.9, (0, 1): 0.2 / 0.9, (1, 1): 1.0}
    assert seen.balance_loss == pytest.approx(9 / 3 * (0.7 / 3) * (1 / 3))


def test_biased_groups_by_hand(resolve_decider):
    """Sigmoid scores in two groups of two: the bias moves the choice, the weights stay unbiased."""
    scores = torch.tensor([0.6, 0.5, 0.9, 0.1], dtype=torch.float64)
    x, w = torch.ones(1, 1, 1, dtype=torch.float64), scores.logit().unsqueeze(0)
    grouped = {"num_groups": 2, "top_groups": 1, "scale": 2.0}

    def weights(bias: list[float] | None = None, **settings):
        given = {} if bias is None else {"expert_bias": torch.tensor(bias)}
        gates = build_gate("topk", w, given, score="sigmoid", expert_bias=bias is not None, **settings)
        seen = run_decision(resolve_decider, x, gates)
        return {expert: seen.weights[key] for key, (expert, _) in seen.choices.items()}

    assert weights() == {2: 0.6, 0: 0.4}
    assert weights(**grouped) == {0: 2 * 0.6 / 1.1, 1: 2 * 0.5 / 1.1}  # 0.6 + 0.5 beats 0.9 + 0.1
    assert weights([0.0, 0.0, 0.0, 0.3], **grouped) == {2: 2 * 0.9, 3: 2 * 0.1}  # 0.9 + 0.4 beats 1.1


def test_top_k_balance_by_hand(resolve_decider):
    """f counts all k choices: 1.0 at uniform f and P for any k; 4/2 · Σ f·P when two experts take everything."""
    uniform = [[0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.1, 0.2], [0.2, 0.1, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4]]
    for k, rows, expected in ((1, uniform, 1.0), (2, uniform, 1.0), (2, uniform[:2], 4 / 2 * (0.35 + 0.35))):
        for over in ("group", "batch"):
            x, w = make_toy(rows)
            seen = run_decision(resolve_decider, x, build_gate("topk", w, k=k, balance_over=over))
            assert seen.balance_loss == pytest.approx(expected)
    x, w = make_toy(uniform)
    halves = x.reshape(2, 2, 4)  # each group alone is skewed, both together are balanced
    by_group, by_batch = (
        run_decision(resolve_decider, halves, build_gate("topk", w, balance_over=over)) for over in ("group", "batch")
    )
    assert by_group.balance_loss == pytest.approx(1.4)
    assert by_batch.balance_loss == pytest.approx(1.0)


def test_noisy_by_hand(resolve_decider):
    """Two experts, k = 1, logits 1 and 0, unit noise scale: P(x, 0) = Φ(1), P(x, 1) = Φ(-1)."""
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    w_gating = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w_noise = torch.full((1, 2), torch.e - 1.0, dtype=torch.float64).log()  # softplus gives 1
    gate, slow = build_gate("noisy", w_gating, {"w_noise": w_noise}, k=1)
    seen = run_decision(resolve_decider, x, (gate.eval(), slow))  # nothing is drawn
    assert (seen.choices, seen.weights) == ({(0, 0): (0, 0)}, {(0, 0): 1.0})
    likely = 0.8413447460685429
    assert seen.losses["importance"] == pytest.approx(1.0)  # (1, 0): variance 1/4 over mean² 1/4
    assert seen.losses["load"] == pytest.approx((likely - 0.5) ** 2 / 0.25)
    assert seen.balance_loss == pytest.approx(1.0 + (likely - 0.5) ** 2 / 0.25)


def test_expert_choice_by_hand(resolve_decider):
    """Three tokens, two experts, factor 1.4: two tokens an expert; token 2 is taken by both, none by nobody."""
    x, w = make_toy([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    seen = run_decision(resolve_decider, x, build_gate("expert_choice", w, capacity_factor=1.4))
    taken = {(0, 0): 0.9, (2, 0): 0.4, (1, 1): 0.8, (2, 1): 0.6}  # (token, expert)
    assert seen.choices == {(0, 0): (0, 0), (2, 0): (0, 1), (1, 1): (1, 0), (2, 1): (1, 1)}
    assert seen.weights == taken


class PowersOfTen(nn.Module):
    """Expert (i, j) of a 2 x 2 grid multiplies by 10^(2 i + j)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=x.dtype)[..., None, None]


@pytest.mark.parametrize("factor", [None, 2.0])
def test_two_levels_by_hand(resolve_decider, factor):
    """Level one keeps every choice (dropless, or two slots for two tokens); level two has one slot an expert."""
    x, outer = make_toy([[0.75, 0.25], [0.6, 0.4]])
    inner = torch.tensor([[[0.7, 0.3], [0.8, 0.2]], [[0.1, 0.9], [0.5, 0.5]]], dtype=torch.float64).log()
    gate_outer, slow_outer = build_gate("top2", outer, capacity_factor_train=factor, **TOP2)
    one_slot = {"capacity_factor_train": 1.0, "min_expert_capacity": 1}  # int(2 · 1 / 2)
    gate_inner, slow_inner = build_gate("topk", inner, k=1, normalize=True, **one_slot)
    if resolve_decider == "package":
        gates = {"gate_outer": gate_outer, "gate_inner": gate_inner}
        out, aux_loss = HeirarchicalMoE(2, (2, 2), loss_coef=1.0, experts=PowersOfTen(), **gates)(x)
    else:
        experts = lambda pair, row: row * 10.0 ** (2 * pair[0] + pair[1])  # noqa: E731
        result = reference.run_layer(x, (slow_outer, slow_inner), experts, loss_coef=1.0)
        out, aux_loss = result.out, result.aux_loss
    # Outer 0 gets tokens 0, 1 as firsts; both want inner 0, token 0 has the slot. Outer 1 gets both as seconds
    # (importance 0.5): token 0 goes to inner 1, token 1 to inner 0 on a tie.
    expected = torch.tensor([[[0.75 * 1 + 0.25 * 1000, 0.0], [0.0, 0.4 * 100]]], dtype=torch.float64)
    torch.testing.assert_close(out, expected)
    first_loss = 2 * (0.675 * 1.0)
    second_loss = (2 * (0.75 * 1.0) + 0.0) / 2  # outer 1 has no token of importance 1
    assert aux_loss.item() == pytest.approx(first_loss + second_loss)
