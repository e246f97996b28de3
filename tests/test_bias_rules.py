"""Rules by which an expert bias moves: quantiles against exact ones and the cases that others published."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import HashGating, MoE, ReLUGating, TopKGating, TopPGating, balance_experts
from mixture_of_experts.gating import BiasRule, ForwardChoices, QuantileRule, SignRule
from mixture_of_experts.gating.steps import AlwaysChosen


def make_histogram(score: Tensor, bias: Tensor, k: int, bins: int = 1000, full: Tensor | None = None) -> Tensor:
    """What the rule counts of scores `(..., t, e)`."""
    expert = torch.zeros(*score.shape[:-1], k, dtype=torch.int64)
    return QuantileRule(bins).count(ForwardChoices(expert, None, score, full, bias))


def new_bias(counts: Tensor, bias: Tensor, k: int) -> Tensor:
    return bias + QuantileRule(counts.shape[-1]).step(counts, bias, k, 1.0)


def exact_quantile_bias(score: Tensor, bias: Tensor, k: int) -> Tensor:
    """The definition, by sorting: the least of r below which, or at which, k / e of the tokens are."""
    cutoff = (score + bias).sort(dim=-1, descending=True).values[:, k : k + 1]
    required = (cutoff - score).sort(dim=0).values
    wanted = -(-len(score) * k // score.shape[1])  # rounded up
    quantile = required[wanted - 1]
    return quantile - quantile.mean()


# Cases that others published, with their numbers


def test_torchtitan_interpolates_and_centres():
    """pytorch/torchtitan#4577: a quarter of 8 tokens lies below the right edge of the first bin with any."""
    counts = torch.zeros(4, 10, dtype=torch.int32)
    for expert, first in enumerate((2, 4, 6, 8)):
        counts[expert, first], counts[expert, first + 1] = 2, 6
    torch.testing.assert_close(new_bias(counts, torch.zeros(4), k=1), torch.tensor([-0.6, -0.2, 0.2, 0.6]))


def test_torchtitan_two_ranks():
    """pytorch/torchtitan#4577: each rank alone, and both, whose histograms add up."""
    rows = torch.tensor([[0.92, 0.68, 0.31, 0.07], [0.07, 0.31, 0.92, 0.68]])
    of_ranks = [make_histogram(row.expand(4, 4), torch.zeros(4), k=1, bins=10) for row in rows]
    alone = torch.tensor([[-0.5, -0.1, 0.1, 0.5], [0.5, 0.1, -0.5, -0.1]])
    for counts, wanted in zip(of_ranks, alone, strict=True):
        torch.testing.assert_close(new_bias(counts, torch.zeros(4), k=1), wanted)
    both = new_bias(of_ranks[0] + of_ranks[1], torch.zeros(4), k=1)
    torch.testing.assert_close(both, torch.tensor([-0.2, 0.2, -0.2, 0.2]))


def test_megatron_recovers_a_quantile():
    """NVIDIA/Megatron-LM#6637."""
    counts = torch.tensor([[0, 2, 2, 0], [2, 2, 0, 0]], dtype=torch.int32)
    torch.testing.assert_close(new_bias(counts, torch.zeros(2), k=1), torch.tensor([0.25, -0.25]))


def test_megatron_counts():
    """NVIDIA/Megatron-LM#6637: two tokens, three experts, one choice; the range is that of this bias here."""
    score = torch.tensor([[-1.0, 0.5, 1.5], [2.0, -0.5, 0.25]]).sigmoid()
    bias, bins = torch.tensor([-0.2, 0.1, 0.0]), 8
    wanted = torch.zeros(3, bins, dtype=torch.int32)
    for token in score:
        cutoff = sorted((token + bias).tolist())[-2]
        for expert, own in enumerate(token.tolist()):
            wanted[expert, int((cutoff - own + 1.2) / (2.3 / bins))] += 1
    assert torch.equal(make_histogram(score, bias, k=1, bins=bins), wanted)


# Against the exact quantile


@pytest.mark.parametrize("bins", [10, 1000])
@pytest.mark.parametrize(("t", "e", "k"), [(999, 7, 3), (64, 4, 1), (5, 3, 2), (1, 2, 1)])
def test_it_is_the_quantile_but_for_a_bin(t, e, k, bins):
    generator = torch.Generator().manual_seed(t)
    for spread in (0.3, 3.0):
        score = (spread * torch.randn(t, e, generator=generator) + torch.linspace(-1, 1, e)).sigmoid()
        bias = 0.3 * torch.randn(e, generator=generator)
        found = new_bias(make_histogram(score, bias, k, bins), bias, k)
        width = (bias.max() - bias.min() + 2) / bins
        assert ((found - exact_quantile_bias(score, bias, k)).abs() <= width + 1e-6).all()
        assert found.mean().abs() < 1e-6


def test_it_counts_every_full_token_once_for_each_expert():
    score, full = torch.rand(2, 50, 6), torch.rand(2, 50) < 0.5
    counts = make_histogram(score, torch.zeros(2, 6), k=2, full=full)
    assert torch.equal(counts.sum(-1), full.sum(-1, keepdim=True).expand(2, 6))
    for row in range(2):
        assert torch.equal(counts[row], make_histogram(score[row, full[row]], torch.zeros(6), k=2))


def test_scores_beyond_the_range_count_at_its_ends_and_it_follows_them():
    """Logits of experts that are 6 apart: the bias gets there in steps of about 1."""
    score, bias = torch.randn(2000, 4) + torch.tensor([0.0, 2.0, 4.0, 6.0]), torch.zeros(4)
    for _ in range(12):
        before, bias = bias, new_bias(make_histogram(score, bias, k=1), bias, k=1)
        assert (bias - before).abs().max() <= 2
    load = (score + bias).argmax(dim=-1).bincount(minlength=4)
    assert load.max() < 1.1 * load.float().mean()


def test_nothing_counted_moves_nothing():
    """A rank without real tokens, or a step that a scaler skipped."""
    bias = torch.tensor([[0.3, -0.1, 0.4], [0.0, 1.0, 2.0]])
    counts = torch.zeros(2, 3, 1000, dtype=torch.int32)
    counts[1, :, 500] = 3
    step = QuantileRule().step(counts, bias, 1, 1.0)
    assert not step[0].any()
    assert step[1].any()
    assert not SignRule(centred=True).step(torch.zeros(2, 3, dtype=torch.int64), bias, 1, 1e-3).any()


@pytest.mark.parametrize("rule", [SignRule(), SignRule(centred=True), QuantileRule()], ids=repr)
def test_rate_scales_the_update(rule):
    bias = torch.tensor([0.5, -0.1, 0.4])
    counts = torch.tensor([7, 2, 0]) if not rule.bins else make_histogram(torch.rand(20, 3), bias, k=1)
    whole = rule.step(counts, bias, 1, 1.0)
    assert not rule.step(counts, bias, 1, 0.0).any()
    moved = bias + rule.step(counts, bias, 1, 0.25)
    if isinstance(rule, SignRule) and rule.centred:
        assert moved.mean().abs() < 1e-6
        bias = bias - bias.mean()
        whole = SignRule().step(counts, bias, 1, 1.0) - SignRule().step(counts, bias, 1, 1.0).mean()
    torch.testing.assert_close(moved, bias + 0.25 * whole)


# On a gate


def make_gate(**settings) -> TopKGating:
    torch.manual_seed(0)
    return TopKGating(6, **{"num_experts": 4, "score": "sigmoid", "expert_bias": True, **settings})


def required_bias(of: TopKGating, x: Tensor) -> Tensor:
    """The new bias of these tokens `(t, d)`, exactly."""
    logits = x @ of.w_gating.detach()
    score = logits if of.select == "logits" else logits.softmax(-1) if of.score == "softmax" else logits.sigmoid()
    return exact_quantile_bias(score, of.expert_bias, of.k)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"score": "softmax", "k": 1}, {"capacity_factor_train": 0.5}], ids=str)
def test_a_gate_moves_to_the_quantile_of_its_real_tokens(settings, masked):
    """Before capacity; of two micro-batches as of one."""
    of, x = make_gate(**settings), torch.randn(4, 50, 6)
    of.bias_rule = "quantile"
    of.expert_bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.1]))
    mask = torch.rand(4, 50) < 0.6 if masked else None
    wanted = required_bias(of, x.flatten(0, 1) if mask is None else x[mask])
    for part in (slice(0, 1), slice(1, 4)):
        of(x[part], mask=None if mask is None else mask[part]).weight.sum().backward()
    of.eval()(torch.randn(2, 50, 6)).weight.sum().backward()
    assert not of.expert_counts.any()
    of.update_bias(1.0)
    torch.testing.assert_close(of.expert_bias, wanted, atol=2.3e-3, rtol=0)
    assert not of.expert_histogram.any()


def test_histogram_follows_bias_device_and_is_not_saved():
    of = make_gate(device="meta")
    of.bias_rule = "quantile"
    assert (of.expert_histogram.device.type, of.expert_histogram.shape) == ("meta", (4, 1000))
    of = make_gate()
    names = list(of.state_dict())
    of.bias_rule = QuantileRule(20)
    assert list(of.state_dict()) == names
    assert of.expert_histogram.shape == (4, 20)
    of.to(torch.bfloat16).double()
    assert of.expert_histogram.dtype == torch.int32
    of.bias_rule = "sign"
    assert of.expert_histogram is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_it_counts_the_same_once(checkpointed):
    moe, x = MoE(6, gate=make_gate()), torch.randn(2, 9, 6, requires_grad=True)
    moe.gate.bias_rule = "quantile"
    moe(x)[0].square().sum().backward()
    wanted = moe.gate.expert_histogram.clone()
    moe.gate.expert_histogram.zero_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return checkpoint(lambda x: moe(x)[0], x, use_reentrant=False) if checkpointed else moe(x)[0]

    run(x).square().sum().backward()
    assert torch.equal(moe.gate.expert_histogram, wanted)
    assert wanted.sum() == 18 * 4


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"k": 4}, "every token chooses all 4 experts"),
        ({"num_groups": 2, "top_groups": 1}, "experts are chosen in 2 groups, so"),
        ({"kind": partial(TopPGating, k=3)}, "tokens may make fewer than k choices"),
        ({"kind": partial(ReLUGating, k=3, mean_choices=2)}, "tokens may make fewer than k choices"),
        ({"kind": partial(HashGating, num_ids=9)}, "experts are chosen by token id"),
        ({"select": lambda logits, score, bias: score + bias}, "experts are chosen by a function"),
    ],
    ids=["all", "groups", "top-p", "relu", "hash", "function"],
)
def test_rejects_mismatched_gates(settings, why):
    kind = settings.get("kind")
    of = make_gate(**settings) if kind is None else kind(6, 4, expert_bias=True)
    name = type(of).__name__
    with pytest.raises(ValueError, match=rf"does not support {name}: {why}.*rule='sign'"):
        of.bias_rule = "quantile"
    with pytest.raises(ValueError, match=rf"does not support {name}"):
        balance_experts(of, torch.optim.SGD(of.parameters(), lr=0.1), "quantile")
    assert of.bias_rule.bins == 0
    with pytest.raises(RuntimeError, match="expert_bias=True"):
        TopKGating(6, 4).bias_rule = "sign"
    with pytest.raises(ValueError, match=r"bias_rule must be one of 'sign', .*'mean'"):
        of.bias_rule = "mean"


def test_shares():
    """Two experts that compute, wanted twice as often as two that do not: of 12 choices 4, 4, 2 and 2; and of none."""
    rule, load = SignRule(shares=[2, 2, 1, 1]), torch.tensor([[4, 5, 1, 2], [0, 0, 0, 0]])
    assert rule.step(load, torch.zeros(2, 4), 1, 0.5).tolist() == [[0.0, -0.5, 0.5, 0.0], [0.0] * 4]
    assert repr(rule) == "SignRule(centred=False, shares=(2, 2, 1, 1))"
    with pytest.raises(ValueError, match=r"`shares` must have .* the 3 experts, got 4 entries"):
        rule.step(torch.tensor([1, 2, 3]), torch.zeros(3), 1, 0.5)
    for wrong in ([1, 0], [0.1, 0.9], "19", 9):
        says = "`shares` must be positive integers that form a ratio, such as [1, 9] for 10% and 90%, got "
        with pytest.raises(ValueError, match=re.escape(says + repr(wrong))):
            SignRule(shares=wrong)
    with pytest.raises(ValueError, match=r"the sum of `shares` must be below 2\^20"):
        SignRule(shares=[2**19, 2**19])


@pytest.mark.parametrize(
    "shares",
    [None, [1] * 49, [3, 3, 3, 3, 1, 1], [7, 11, 13], [1000, 3000, 1]],
    ids=str,
)
@pytest.mark.parametrize("times", [1, 6, 97, 10**6 + 3, 2**30])
def test_at_exact_balance_nothing_moves(shares, times):
    """Integer shares of an integer number of choices; and one choice more or less is seen, which float32 would not."""
    rule, load = SignRule(shares=shares), torch.tensor(shares or [1] * 49) * times
    assert not rule.step(load, torch.zeros(len(load)), 1, 1.0).any()
    load[0], load[1] = load[0] + 1, load[1] - 1
    assert rule.step(load, torch.zeros(len(load)), 1, 1.0)[:2].tolist() == [-1.0, 1.0]


def test_shares_step_by_the_sign_of_the_exact_difference():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        e = int(torch.randint(2, 60, (), generator=generator))
        shares = torch.randint(1, 100, (e,), generator=generator).tolist()
        load = torch.randint(0, 10**12 if e % 2 else 9, (e,), generator=generator)
        total = int(load.sum())
        exact = [total * share - int(one) * sum(shares) for share, one in zip(shares, load, strict=True)]
        wanted = [float((number > 0) - (number < 0)) for number in exact]
        assert SignRule(shares=shares).step(load, torch.zeros(e), 1, 1.0).tolist() == wanted


# Experts that every token takes, and tokens of NaN


@pytest.mark.parametrize("rule", [SignRule(), SignRule(centred=True), SignRule(shares=[1, 2, 1])], ids=repr)
def test_experts_that_every_token_takes_are_not_balanced(rule):
    """They are no part of the mean: 3 experts share 12 choices of 12 tokens, beside two that all tokens take."""
    of = make_gate(k=3, num_experts=5, select=AlwaysChosen(2))
    of.bias_rule = rule
    of.expert_bias[:3].copy_(torch.tensor([0.3, 0.1, 0.2]))
    of.expert_counts.copy_(torch.tensor([6, 4, 2, 12, 12]))
    alone = rule.step(torch.tensor([6, 4, 2]), of.expert_bias[:3].clone(), 1, 0.01)
    wanted = torch.cat([of.expert_bias[:3] + alone, torch.zeros(2)])
    of.update_bias(0.01)
    assert torch.equal(of.expert_bias, wanted)
    assert alone.any()
    assert not of.expert_counts.any()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", ["sign", "centred_sign", "quantile"])
def test_nan_tokens_are_not_counted(name, score):
    """A gradient scaler skips their step, and the counts of the other tokens go into the next one."""
    of, alone = make_gate(score=score), make_gate(score=score)
    x, bad = torch.randn(2, 50, 6), torch.rand(2, 50) < 0.3
    of.bias_rule = alone.bias_rule = name
    of(torch.where(bad.unsqueeze(-1), torch.nan, x)).weight.sum().backward()
    for part in (x[0][~bad[0]], x[1][~bad[1]]):
        alone(part.unsqueeze(0)).weight.sum().backward()
    assert of.bias_counts.any()
    assert torch.equal(of.bias_counts, alone.bias_counts)
    of.update_bias(0.5)
    assert of.expert_bias.isfinite().all()


@pytest.mark.parametrize("full", [None, torch.tensor([True, False, True])], ids=["all", "some"])
def test_one_score_of_nan_is_a_token_of_nan(full):
    score = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.1, 0.9], [0.1, torch.nan, 0.8]])
    counts = make_histogram(score, torch.zeros(3), k=1, full=full)
    assert torch.equal(counts, make_histogram(score[:1] if full is not None else score[:2], torch.zeros(3), k=1))


class LoadRule(BiasRule):
    """A rule of one's own: in proportion to the load."""

    rate = 0.1

    def count(self, choices):
        return SignRule().count(choices)

    def step(self, counts, bias, k, rate):
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return rate * (1 / counts.shape[-1] - share)


def test_custom_rule():
    of = make_gate()
    of.bias_rule = LoadRule()
    routing = of(torch.randn(2, 8, 6))
    routing.weight.sum().backward()
    load = routing.queue_length.sum(0)
    of.update_bias(0.1)
    torch.testing.assert_close(of.expert_bias, 0.1 * (0.25 - load / load.sum()))


@pytest.mark.parametrize("name", [None, "sign", "centred_sign", "quantile"])
def test_a_rule_is_a_gates_own(name):
    """By default and by its name: a change of one gate's rule is no change of another's."""
    one, other = (TopKGating(4, 4, expert_bias=True) for _ in range(2))
    if name is not None:
        one.bias_rule = other.bias_rule = name
    before = vars(other.bias_rule).copy()
    for setting in vars(one.bias_rule):
        setattr(one.bias_rule, setting, "changed")
    one.bias_rule.more = "changed"  # type: ignore[attr-defined]
    assert vars(other.bias_rule) == before
    fresh = TopKGating(4, 4, expert_bias=True)
    fresh.bias_rule = name or "sign"
    assert vars(fresh.bias_rule) == before


def test_a_rule_by_its_name_is_the_balancings_own():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.0)
    gates = [TopKGating(4, 4, expert_bias=True) for _ in range(2)]
    one, other = (balance_experts(gate, optimizer) for gate in gates)
    assert one.rule is gates[0].bias_rule
    assert one.rule is not other.rule
