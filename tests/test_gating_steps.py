"""The steps of top-k gating, by numbers that a person can check: what is scored, chosen by, and weighed."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import MoE, TopKGating, TopPGating
from mixture_of_experts.gating import HashGating, NoisyTopKGating, RouterLogits, SparseMixerGating
from mixture_of_experts.gating.steps import AlwaysChosen, LearnedScale, NormalizeBy, OpenGroups, sqrt_softplus

L2, L3, L4 = math.log(2), math.log(3), math.log(4)


def run_gate(
    logits: list[float], k: int = 2, moved: list[float] | None = None, **settings
) -> tuple[list[int], list[float]]:
    """Experts and weights of a token of these logits, beside one of the opposite; `moved` is an expert bias."""
    gate = TopKGating(1, len(logits), k, expert_bias=moved is not None, **settings)
    if gate.expert_bias is not None:
        gate.expert_bias.copy_(torch.tensor(moved))
    assert gate.w_gating is not None
    gate.w_gating.data.copy_(torch.tensor([logits]))
    routing = gate(torch.tensor([[[1.0], [-1.0]]]))
    return routing.expert[0, :k].tolist(), routing.weight[0, :k].tolist()


def approximately(*values: float):
    return pytest.approx(values, abs=1e-6)


# ---- weigh ----


def test_softmax_over_chosen_equals_normalized_softmax():
    """exp: 1, 2, 4, so 4/6 and 2/6. Sigmoids 1/2, 2/3, 4/5 choose, and weigh unless their logits do."""
    for settings in (dict(weigh="softmax"), dict(weigh="score"), dict(score="sigmoid", weigh="softmax")):
        assert run_gate([0.0, L2, L4], **settings) == ([2, 1], approximately(4 / 6, 2 / 6))
    assert run_gate([0.0, L2, L4], score="sigmoid") == ([2, 1], approximately((4 / 5) / (22 / 15), (2 / 3) / (22 / 15)))


def test_custom_weights_are_normalized_on_request():
    def twice(logits: Tensor, score: Tensor, expert: Tensor) -> Tensor:
        return 2 * score.gather(-1, expert)

    assert run_gate([0.0, L2, L4], weigh=twice) == ([2, 1], approximately(8 / 7, 4 / 7))
    assert run_gate([0.0, L2, L4], weigh=twice, normalize=True, scale=3.0) == ([2, 1], approximately(2.0, 1.0))
    of_logits = run_gate([0.0, L2, L4], weigh=lambda logits, score, expert: logits.gather(-1, expert))
    assert of_logits == ([2, 1], approximately(L4, L2))


def test_normalization_by_epsilon_and_norm():
    """Sigmoids 1/2 and 3/4: over 1.25 + 0.75; over the Euclidean norm."""
    settings: dict = dict(score="sigmoid")
    assert run_gate([0.0, L3], eps=0.75, **settings) == ([1, 0], approximately(3 / 8, 1 / 4))
    norm = math.hypot(1 / 2, 3 / 4)
    by_norm = run_gate([0.0, L3], normalize=lambda w: w / w.norm(dim=-1, keepdim=True), **settings)
    assert by_norm == ([1, 0], approximately(3 / 4 / norm, 1 / 2 / norm))

    sums = ((NormalizeBy(), 5 / 4), (NormalizeBy(eps=2.0), 2.0), (NormalizeBy(2.0), norm), (NormalizeBy(0.5), None))
    for normalize, total in sums:
        total = total or (math.sqrt(1 / 2) + math.sqrt(3 / 4)) ** 2
        assert run_gate([0.0, L3], normalize=normalize, **settings) == (
            [1, 0],
            approximately(3 / 4 / total, 1 / 2 / total),
        )


@pytest.mark.parametrize(("scales", "wanted"), [([3.0], (12 / 7, 6 / 7)), ([9.0, 5.0, 7.0], (4, 10 / 7))])
def test_learned_scales(scales, wanted):
    """Weights 4/7 and 2/7 of the scores 1, 2, 4, normalised to 4/6 and 2/6, times one number or the experts' own."""
    weigh = LearnedScale(len(scales), dtype=torch.float64)
    weigh.scale.data.copy_(torch.tensor(scales))
    wanted = [7 / 6 * weight for weight in wanted]
    assert run_gate([0.0, L2, L4], weigh=weigh) == ([2, 1], approximately(*wanted))
    assert TopKGating(2, 3, weigh=weigh)(torch.ones(1, 1, 2)).weight.dtype == torch.float32


def test_learned_scales_begin_at_one_and_of_no_weight_make_none():
    assert LearnedScale(2, "meta").scale.is_meta
    scale = LearnedScale(2)
    assert scale.scale.tolist() == [1.0, 1.0]
    scale.scale.data.fill_(5.0)
    MoE(2, gate=TopKGating(2, 2, weigh=scale)).reset_parameters()
    assert scale.scale.tolist() == [1.0, 1.0]
    assert run_gate([-1.0, -2.0], score=F.relu, weigh=LearnedScale(1))[1] == [0.0, 0.0]


def test_learned_scales_multiply_weights_of_made_choices():
    """Choices that are not made have no share of the weight, whatever excludes them."""
    x, scales = torch.randn(1, 3, 8), torch.tensor([2.0, 3.0, 5.0, 7.0])

    def build(kind=TopKGating, *args, **settings):
        weigh = LearnedScale(4)
        weigh.scale.data.copy_(scales)
        return kind(8, 4, *args, weigh=weigh, **settings)

    given = torch.tensor([[[3, -1], [-1, 2], [-1, -1]]])
    routing = build(k=2)(x, given_experts=given)
    torch.testing.assert_close(routing.weight, torch.tensor([[7.0, 0.0, 0.0, 5.0, 0.0, 0.0]]))
    only_first = build(k=2, select=lambda _, score, __: score.where(torch.arange(4) < 1, -torch.inf))
    torch.testing.assert_close(only_first(x).weight, torch.tensor([[2.0, 0.0] * 3]))
    top_p = build(TopPGating, 3, p=0.5)(x)
    torch.testing.assert_close((top_p.weight / scales[top_p.expert]).view(3, 3).sum(-1), torch.ones(3))


GROUPS = dict(num_groups=2, top_groups=1)


@pytest.mark.parametrize(
    ("gate", "k", "message"),
    [
        (lambda: TopKGating(2, 3), 4, "k must be at most num_experts=3, but got 4"),
        (lambda: TopKGating(2, 4, **GROUPS), 3, r"top_groups=1 must be at most num_groups=2, .* at least k=3"),
        (lambda: SparseMixerGating(2, 3), 4, "k must be at most num_experts=3, but got 4"),
        (lambda: NoisyTopKGating(2, 3), 3, "k must be less than num_experts=3, but got 3"),
        (lambda: HashGating(2, 3, num_ids=5), 1, "cannot change k of HashGating from 2 to 1"),
        *((lambda: TopKGating(2, 3), k, f"k must be an integer of at least 1, got {k!r}") for k in (0, "x", 1.5, True)),
    ],
)
def test_k_is_checked_when_it_is_set(gate, k, message):
    gate = gate()
    with pytest.raises(ValueError, match=message):
        gate.k = k
    assert gate.k == 2


# ---- score ----


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -104.0), (torch.float64, -746.0)])
def test_square_root_of_softplus_has_finite_gradients(dtype, lowest):
    """Where the score is 0; elsewhere values and gradients are those of the two functions, to the bit."""
    logits = torch.tensor([[0.5, lowest, -3.0, -1e6, 40.0, lowest + 20]], dtype=dtype)
    found, plain = (logits.clone().requires_grad_() for _ in range(2))
    score, wanted = sqrt_softplus(found), F.softplus(plain).sqrt()
    assert torch.equal(score, wanted)
    for values in (score, wanted):
        values.sum().backward()
    there = wanted != 0
    assert torch.equal(found.grad[there], plain.grad[there])
    assert plain.grad[~there].isnan().all()
    assert (found.grad[~there] == 0).all()
    assert there.tolist() == [[True, False, True, False, True, True]]
    assert sqrt_softplus(torch.tensor([torch.nan, torch.inf])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("chosen", [False, True])
def test_a_logit_far_below_leaves_the_router_gradients(chosen):
    """DeepSeek-V4's recipe; an expert that is not chosen had a gradient of NaN, too."""
    gate = TopKGating(4, 4, k=3 if chosen else 2, score="sqrt_softplus", scale=1.5)
    gate.w_gating.data = torch.eye(4)
    x = torch.tensor([[[1.0, 0.5, -200.0, -300.0]]], requires_grad=True)
    routing = gate(x)
    (routing.weight.square().sum() + routing.balance_loss + 1e-3 * routing.z_loss).backward()
    assert x.grad.isfinite().all()
    assert gate.w_gating.grad.isfinite().all()
    assert gate.w_gating.grad.any()


def test_square_root_of_softplus():
    """Of logit log(e - 1) it is 1, of log(e^4 - 1) 2."""
    logits = [math.log(math.e - 1), math.log(math.e**4 - 1), -9.0]
    assert run_gate(logits, score="sqrt_softplus", normalize=False) == ([1, 0], approximately(2.0, 1.0))
    assert run_gate(logits, score=lambda logits: F.softplus(logits).sqrt()) == ([1, 0], approximately(2 / 3, 1 / 3))


# ---- select ----


def test_a_bias_on_logits_and_on_scores():
    """Far out sigmoids are nearly equal: 0.1 on the score turns the choice, on the logits it does not."""
    settings: dict = dict(k=1, score="sigmoid", moved=[0.0, 0.1])
    assert run_gate([6.0, 5.0], **settings)[0] == [1]
    assert run_gate([6.0, 5.0], **settings, select="logits")[0] == [0]


def test_chosen_by_a_function():
    """The worst are chosen; they weigh their scores, 1/7 and 2/7."""
    expert, weight = run_gate([0.0, L2, L4], select=lambda logits, score, bias: -score, normalize=False)
    assert (expert, weight) == ([0, 1], approximately(1 / 7, 2 / 7))
    biased = run_gate([0.0, L2, L4], select=lambda logits, score, bias: bias - logits, moved=[-9.0, 0.0, 0.0])
    assert biased == ([1, 2], approximately(2 / 6, 4 / 6))
    gate = TopKGating(1, 2, 1, select=lambda logits, score, bias: -score)
    gate.w_gating.data.copy_(torch.tensor([[0.0, 200.0]]))
    assert gate(torch.ones(1, 1, 1)).z_loss == 200**2  # the one that is chosen, of probability 0, does not tell


def test_expert_groups_by_their_best_and_by_their_two_best():
    """Groups (5, 0) and (4, 3): the first has the best one, the second the best two."""
    logits = torch.tensor([5.0, 0.0, 4.0, 3.0]).log1p().tolist()
    groups: dict = dict(num_groups=2, top_groups=1, score=torch.exp, normalize=False)
    assert run_gate(logits, k=1, **groups, group_score="best")[0] == [0]
    assert run_gate(logits, k=1, **groups, group_score="two_best")[0] == [2]
    assert run_gate(logits, k=1, **groups, group_score=lambda grouped: -grouped.amin(dim=-1))[0] == [0]
    of_three = torch.tensor([5.0, 0.0, 0.0, 2.0, 2.0, 2.0]).log1p().tolist()
    assert run_gate(of_three, k=1, **groups)[0] == [0]  # 5 against 4, though all of them are 5 against 6
    assert run_gate(logits, k=2, **groups | dict(num_groups=4, top_groups=2))[0] == [0, 2]  # of one expert each


def test_the_last_experts_are_always_chosen():
    """Scores 1, 2, 4, 3, 1 of 11: the last two, and the best of the others, or the one that the bias moved."""
    logits, settings = [0.0, L2, L4, L3, 0.0], dict(select=AlwaysChosen(2), k=3)
    assert run_gate(logits, **settings) == ([3, 4, 2], approximately(3 / 8, 1 / 8, 4 / 8))
    assert run_gate(logits, **settings, moved=[1.0, 0.0, 0.0, -9.0, -9.0]) == (
        [3, 4, 0],
        approximately(3 / 5, 1 / 5, 1 / 5),
    )


def test_closed_groups_rank_as_zero():
    """Groups (1, 2), (3, 3), (4, 1), by their two best."""
    logits, exp = [0.0, L2, L3, L3, L4, 0.0], dict(score=torch.exp)
    assert run_gate(logits, select=OpenGroups(3, 1), **exp) == ([2, 3], approximately(1 / 2, 1 / 2))
    assert run_gate(logits, select=OpenGroups(3, 2), **exp) == ([4, 2], approximately(4 / 7, 3 / 7))
    biased = dict(moved=[-9.0, -9.0, -9.0, -9.0, -1.0, -9.0])  # the last group is best, and its second one is below 0
    assert run_gate(logits, select=OpenGroups(3, 1), **exp, **biased) == ([4, 0], approximately(4 / 5, 1 / 5))


def test_priority_of_a_hash_gate_is_the_score_of_its_experts():
    """Four tokens compete for the slot of expert 0; the last has the largest score for it, the second for another."""
    gate = HashGating(4, 4, 1, num_ids=1, priority="score", capacity_factor_train=1.0, min_expert_capacity=1)
    gate.experts_of_id.zero_()
    gate.w_gating.data.copy_(torch.eye(4))
    x = torch.zeros(1, 4, 4)
    x[0, :, 0], x[0, 1, 1] = torch.tensor([1.0, 0.0, 2.0, 3.0]), 5.0
    assert gate(x, token_ids=torch.zeros(1, 4, dtype=torch.long)).kept.tolist() == [[False, False, False, True]]


# ---- logits ----


def test_logits_multiplied_and_capped():
    logits = RouterLogits(1, 2, multiplier=4.0, softcap=2.0, bias=True)
    logits.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    logits.bias.data.copy_(torch.tensor([0.5, 0.0]))
    gate, x = TopKGating(1, 2, 1, logits=logits), torch.ones(1, 1, 1)
    torch.testing.assert_close(logits(x), torch.tensor([[[2 * math.tanh(3.0), 0.0]]]))
    assert gate.w_gating is None
    torch.testing.assert_close(gate(x).z_loss, logits(x).logsumexp(-1).square().mean())


def test_a_norm_before_the_product():
    """(3, 4) has the root mean square sqrt(12.5); its weight is (1, 2)."""
    logits = RouterLogits(2, 2, norm_eps=0.0)
    logits.weight.data.copy_(torch.eye(2))
    logits.norm_weight.data.copy_(torch.tensor([1.0, 2.0]))
    found = logits(torch.tensor([[[3.0, 4.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[3.0, 8.0]]]) / math.sqrt(12.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_network_as_router(dtype):
    """Its logits are float32 at least, also under autocast, and all its weights are trained."""
    network = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))
    moe = MoE(6, 3, gate=TopKGating(6, 3, logits=network)).to(dtype)
    x = torch.randn(2, 5, 6, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        routing = moe.gate(x)
        out, aux_loss = moe(x)
    assert routing.probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (out.square().sum() + aux_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe.parameters())
    with torch.no_grad():
        torch.testing.assert_close(routing.probs, network(x).to(routing.probs.dtype).softmax(-1))


def test_logits_of_a_module_without_weights_and_of_narrow_ones():
    """Tokens go into the product as they are, not rounded to the weights' dtype."""
    x, logits = torch.randn(1, 3, 4), RouterLogits(4, 3).bfloat16()
    bare = TopKGating(4, 4, logits=nn.Identity(), expert_bias=True)  # no parameter tells that an optimizer steps
    torch.testing.assert_close(bare(x).probs, x.softmax(dim=-1))
    found = TopKGating(4, 3, logits=logits)(x).probs
    torch.testing.assert_close(found, (x @ logits.weight.float()).softmax(dim=-1))


# ---- what is refused, and what is shown ----


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TopKGating, dict(score="tanh"), "score must be one of 'softmax', .*, or a function, got 'tanh'"),
        (TopKGating, dict(select="scores"), "select must be one of 'score', 'logits', or a function, got 'scores'"),
        (TopKGating, dict(weigh=nn.Identity), "weigh must be .* got the class Identity; instantiate it"),
        (TopKGating, dict(group_score=2), "group_score must be one of 'best', 'two_best', or a function, got 2"),
        (TopKGating, dict(num_groups=0, top_groups=1), "^num_groups must be"),
        (TopKGating, dict(num_groups=2, top_groups=0), "^top_groups must be"),
        (TopKGating, dict(normalize="yes"), "normalize must be True or False, got 'yes'"),
        (TopKGating, dict(eps=-1.0), "eps must be a finite number of at least 0"),
        (TopKGating, dict(bias=True, logits=nn.Identity()), "bias=True cannot be combined with `logits`"),
        (TopKGating, dict(logits=nn.Linear), "`logits` must be .*the class Linear; instantiate it"),
        (RouterLogits, dict(dim=0), "^dim must be"),
        (RouterLogits, dict(num_experts=0), "^num_experts must be"),
        (RouterLogits, dict(bias="yes"), "^bias must be True or False"),
        (RouterLogits, dict(norm_eps=-1.0), "^norm_eps must be .* at least 0"),
        (RouterLogits, dict(softcap=0.0), "^softcap must be .* above 0"),
        (RouterLogits, dict(multiplier=float("nan")), "^multiplier must be"),
        (NormalizeBy, dict(p=0.0), "^p must .* above 0"),
        (NormalizeBy, dict(eps=-1.0), "^eps must .* least 0"),
        (LearnedScale, dict(num_scales=0), "^num_scales must be"),
        (AlwaysChosen, dict(num=0), "^num must be"),
        (OpenGroups, dict(num_groups=0, top_groups=1), "^num_groups must be"),
        (OpenGroups, dict(num_groups=1, top_groups=0), "^top_groups must be"),
    ],
)
def test_rejected(kind, settings, message):
    sizes = dict(dim=4, num_experts=4) if kind in (TopKGating, RouterLogits) else {}
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**sizes | settings)


def test_a_module_of_logits_that_does_not_fit():
    with pytest.raises(ValueError, match=r"`logits` must return .* \(1, 2, 4\), .*got \(1, 2, 3"):
        TopKGating(4, 4, logits=nn.Linear(4, 3))(torch.randn(1, 2, 4))


def test_steps_are_checked_when_set_and_may_be_modules():
    gate = TopKGating(4, 4)
    with pytest.raises(ValueError, match="score must be one of"):
        gate.score = "tanh"
    gate.score = nn.Sigmoid()
    assert [name for name, _ in gate.named_children()] == ["score"]
    gate.score = "softmax"
    gate.normalize = nn.Softmax(dim=-1)
    assert [name for name, _ in gate.named_children()] == ["normalize"]
    gate.normalize = True
    assert not list(gate.named_children())


def test_repr_shows_non_defaults():
    own = lambda logits, score, expert: score.gather(-1, expert)  # noqa: E731
    gate = TopKGating(4, 4, weigh=own, select="logits", eps=1e-6, num_groups=2, top_groups=1, group_score="best")
    shown = repr(gate)
    for part in (f"weigh={own.__qualname__}", "normalize=False", "select='logits'", "eps=1e-06", "group_score='best'"):
        assert part in shown
    assert not any(word in repr(TopKGating(4, 4)) for word in ("weigh", "select", "eps", "group_score"))
    given = dict(select=AlwaysChosen(2), weigh=LearnedScale(4), score=nn.Sigmoid(), normalize=partial(F.normalize, p=1))
    shown = repr(TopKGating(4, 4, **given))
    for part in ("select=AlwaysChosen(2)", "(weigh): LearnedScale", "(score): Sigmoid", "normalize=functools.partial"):
        assert part in shown
