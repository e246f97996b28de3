"""Gates at their edges: one expert, where tensors are made, two levels, and choices that do not fit."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from support import layer_variants
from support.doc_recipes import extract_recipe
from support.layer_variants import NUM_EXPERTS, ROUTERS
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mixture_of_experts import ExpertChoiceGating, Experts, HeirarchicalMoE, MoE, Top2Gating, TopKGating
from mixture_of_experts.dispatch.assignments import join_groups
from mixture_of_experts.dispatch.permutation import permute_to_slots
from mixture_of_experts.gating import Choices, ReLUGating, SparseMixerGating, TokenChoiceGate, get_optional_losses
from mixture_of_experts.gating.levels import dispatch_to_inner_gate, split_side_inputs_by_level

DIM = 6


# ---- one expert ----


@pytest.mark.parametrize("priority", ["choice", "token", "score"])
@pytest.mark.parametrize("policy", ["all", "threshold", "random"])
def test_single_expert_has_no_second_choice(policy, priority):
    settings = dict(second_policy_train=policy, second_threshold_train=0.0, priority=priority)
    gate, x = Top2Gating(DIM, 1, capacity_factor_train=1.0, **settings), torch.randn(2, 100, DIM)
    x[1, 50] = torch.nan
    routing = gate(x)
    assert routing.capacity == 100
    assert routing.queue_length.tolist() == [[100], [100]]
    assert routing.sent.equal(routing.kept)
    assert routing.kept.view(2, 100, 2).all(dim=1).tolist() == [[True, False]] * 2


@pytest.mark.parametrize("scale", [1.0, torch.nan])
@pytest.mark.parametrize("policy", ["all", "none"])
def test_single_expert_later_choice(policy, scale):
    """A token of importance between 0 and 1 has no first choice; its second one, if any, is the expert there is."""
    gate = Top2Gating(DIM, 1, second_policy_train=policy)
    routing = gate(scale * torch.randn(1, 3, DIM), importance=torch.tensor([[1.0, 0.5, 0.0]]))
    assert routing.kept.tolist() == [[True, False, False, policy == "all", False, False]]


def test_two_weights_are_divided_by_their_sum_and_epsilon():
    gate = Top2Gating(1, 3, eps=0.5, second_policy_train="all")
    gate.w_gating.data.copy_(torch.tensor([[0.5, 0.3, 0.2]]).log())
    torch.testing.assert_close(gate(torch.ones(1, 1, 1)).weight, torch.tensor([[0.5, 0.3]]) / 1.3)


# ---- where tensors are made ----

PLACED = {
    **ROUTERS,
    "SparseMixer": lambda: SparseMixerGating(layer_variants.DIM, NUM_EXPERTS),
    "TopK, balanced": lambda: force_gate(
        TopKGating(layer_variants.DIM, NUM_EXPERTS, num_groups=2, top_groups=2), "balanced"
    ),
    "Top2, balanced": lambda: force_gate(Top2Gating(layer_variants.DIM, NUM_EXPERTS), "balanced"),
    "SparseMixer, random": lambda: force_gate(SparseMixerGating(layer_variants.DIM, NUM_EXPERTS), "random"),
}


def force_gate(gate: TokenChoiceGate, how: Literal["balanced", "random"]) -> TokenChoiceGate:
    gate.forced = how
    return gate


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PLACED)
def test_tensors_stay_on_token_device(name, masked):
    """Another device by default, here one without numbers, changes no bit of what a layer gives, told or counted."""
    layer = MoE(layer_variants.DIM, gate=PLACED[name](), experts=Experts(layer_variants.DIM, NUM_EXPERTS, 4))
    gate, x = layer.gate, torch.randn(2, 5, layer_variants.DIM, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]]) if masked else None
    asked = {"losses": get_optional_losses(gate)} if get_optional_losses(gate) else {}
    before = [buffer.clone() for buffer in gate.buffers()]

    def found(device: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        with torch.device(device):
            routing, (out, aux_loss) = gate(x, mask=mask, **asked), layer(x, mask)
            total = sum([routing.weight.square().sum(), *routing.losses.values(), out.square().sum(), aux_loss])
            gradients = torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True)
            with torch.no_grad():  # as in decoding
                few = layer(x[:1, :1])
        described = [value for value in vars(routing).values() if isinstance(value, Tensor)]
        counts = [buffer.clone() for buffer in gate.buffers()]
        for buffer, was in zip(gate.buffers(), before, strict=True):
            buffer.copy_(was)
        return [out, aux_loss, *few, *described, *routing.losses.values(), *gradients, *counts]

    for gate.training in (True, False):
        for ours, theirs in zip(found("meta"), found("cpu"), strict=True):
            assert ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)


# ---- who chooses ----


def test_a_mask_and_importance_together():
    """Both choices at importance 1, the top one between 0 and 1, none at 0, and none in the padding."""
    importance, mask = torch.tensor([[1.0, 0.5, 0.0, 1.0, 0.5]]), torch.tensor([[True, True, True, False, False]])
    routing = TopKGating(DIM, 4)(torch.randn(1, 5, DIM), importance=importance, mask=mask)
    assert routing.sent.view(5, 2).tolist() == [[True, True], [True, False], *[[False, False]] * 3]


@pytest.mark.parametrize("masked", [False, True])
def test_dropless_a_choice_of_no_weight_is_none(masked):
    gate = TopKGating(DIM, 4, weigh=lambda logits, score, expert: torch.tensor([0.5, 0.0]).expand(expert.shape))
    routing = gate(torch.randn(1, 2, DIM), mask=torch.tensor([[True, False]]) if masked else None)
    assert routing.kept.tolist() == routing.sent.tolist() == [[True, False, not masked, False]]


# ---- two levels; test_matrix.py has layers of both ----


def test_expert_choice_hands_on_nothing():
    outer = ExpertChoiceGating(DIM, 4)(torch.randn(2, 6, DIM))
    with pytest.raises(ValueError, match="token-choice router"):
        dispatch_to_inner_gate(
            torch.randn(2, 6, DIM), outer, permute_to_slots(join_groups(outer, in_slots=True)), None, {}
        )


def test_each_level_has_its_own_given_experts():
    given = ("router_input", "given_experts")
    assert split_side_inputs_by_level(given, given) == ({*given}, {"router_input", "given_experts_inner"})
    assert split_side_inputs_by_level(given, ("router_input", "ids")) == ({*given}, {"router_input", "ids"})
    outer = TopKGating(DIM, 4)(torch.randn(2, 6, DIM))
    for shape in ((2, 6, 3, 2), (2, 6, 2)):
        with pytest.raises(ValueError, match=r"given_experts_inner must have shape \(\.\.\., n, 2, gate_inner\.k\)"):
            dispatch_to_inner_gate(
                torch.randn(2, 6, DIM),
                outer,
                permute_to_slots(join_groups(outer, in_slots=True)),
                None,
                {"given_experts_inner": torch.zeros(shape)},
            )


def test_rejects_custom_gate_that_fills_empty_slots():
    """It ignores importance and mask; the same gate that reads them is taken."""

    class Heedless(Top2Gating):
        heedless = True

        def forward(self, x, importance=None, mask=None, length=None, losses=(), **side):
            return super().forward(x) if self.heedless else super().forward(x, importance, mask, length, losses, **side)

    gate = Heedless(DIM, 2, outer_expert_dims=(4,))
    moe, x = HeirarchicalMoE(DIM, (4, 2), capacity_factor_train=8.0, gate_inner=gate), torch.randn(2, 6, DIM)
    with pytest.raises(ValueError, match=r"\(Heedless\) chose experts for \d+ empty first-level slots"):
        moe(x)
    gate.heedless = False
    assert moe(x)[0].isfinite().all()


# ---- choices that do not fit ----


class GivenGate(TokenChoiceGate):
    """Chooses what it is given."""

    def __init__(self, **made) -> None:
        super().__init__(DIM, 3, 2)
        self.made = made

    def decide(self, tokens) -> Choices:
        b, n = tokens.x.shape[:2]
        expert = torch.tensor([2, 0]).expand(b, n, 2)
        fitting = dict(expert=expert, weight=torch.full((b, n, 2), 0.5), probs=torch.full((b, n, 3), 1 / 3), losses={})
        return Choices(**{**fitting, **self.made})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"expert": torch.zeros(1, 4, 3, dtype=torch.int64)}, r"expert .*\(1, 4, 3\), expected \(1, 4, 2\) .*k=2"),
        ({"expert": torch.zeros(1, 5, 2, dtype=torch.int64)}, r"expert of shape \(1, 5, 2\), expected \(1, 4, 2\)"),
        ({"weight": torch.ones(1, 4, 1)}, r"weight of shape \(1, 4, 1\), expected \(1, 4, 2\)"),
        ({"probs": torch.ones(1, 4, 2)}, r"probs of shape \(1, 4, 2\), expected \(1, 4, 3\) \(groups, tokens, experts"),
        ({"probs": torch.ones(4, 3)}, r"probs of shape \(4, 3\)"),
        ({"chosen": torch.ones(1, 4, dtype=torch.bool)}, r"chosen of shape \(1, 4\), expected \(1, 4, 2\)"),
        (
            {"priority_score": torch.ones(1, 4, 1)},
            r"priority_score of shape \(1, 4, 1\), expected \(1, 4\) \(groups, tokens\)$",
        ),
        ({"primary": torch.ones(4, 2, dtype=torch.bool)}, r"primary of shape"),
        ({"losses": {"mine": torch.ones(1)}}, r"loss 'mine' as a 0-dim tensor, got \(1,\)"),
        ({"losses": {"mine": 0.5}}, r"loss 'mine' as a 0-dim tensor, got a float"),
        ({"losses": {"balance": torch.ones(1, 4)}}, r"loss 'balance' as a 0-dim tensor, got \(1, 4\)"),
        ({"expert": torch.zeros(1, 4, 2)}, r"expert .*float32, expected int64"),
        ({"chosen": torch.ones(1, 4, 2)}, r"chosen .*float32, expected bool"),
        ({"expert": torch.full((1, 4, 2), 1)}, r"expert 1 twice for a token"),
        ({"expert": torch.tensor([0, 3]).expand(1, 4, 2)}, r"expert ids from 0 to 3, but valid ids are 0 to 2"),
        ({"expert": torch.tensor([-1, 2]).expand(1, 4, 2)}, r"returned expert ids from -1 to 2"),
    ],
)
def test_mismatched_choices(made, message):
    with pytest.raises((ValueError, TypeError), match=f"GivenGate .*{message}"):
        GivenGate(**made)(torch.randn(1, 4, DIM))
    with pytest.raises((ValueError, TypeError), match=message):
        MoE(DIM, gate=GivenGate(**made))(torch.randn(1, 4, DIM))


@pytest.mark.parametrize("weight", [torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5])])
def test_missing_second_choice_may_be_any(weight):
    """Weight 0, or not chosen: then it may repeat the first, as the rest of a gate's list may be anything."""
    chosen = torch.tensor([True, False]).expand(1, 4, 2) if weight[1] else None
    gate = GivenGate(expert=torch.full((1, 4, 2), 1), weight=weight.expand(1, 4, 2), chosen=chosen)
    assert gate(torch.randn(1, 4, DIM)).kept.tolist() == [[True, False] * 4]


def test_value_checks_are_skipped_without_data():
    """Under `vmap`, of fake tensors and on the meta device numbers cannot be read."""
    gate = GivenGate()
    with FakeTensorMode():
        assert gate(torch.randn(1, 4, DIM)).expert.shape == (1, 8)
    assert gate.to("meta")(torch.randn(1, 4, DIM, device="meta")).expert.shape == (1, 8)
    x = torch.randn(5, 1, 4, DIM)
    assert torch.func.vmap(lambda x: gate(x).weight)(x).shape == (5, 1, 8)


# ---- what the pages say ----


def test_uniform_noise_chooses_and_the_softmax_weighs():
    gate = extract_recipe("Chen 2022")["UniformNoiseGate"](DIM, 4)
    assert not gate.w_gating.any()
    x = torch.randn(1, 200, DIM)
    torch.manual_seed(0)
    routing = gate(x)
    torch.manual_seed(0)
    assert routing.expert.equal(torch.rand(1, 200, 4).argmax(dim=-1))
    assert routing.weight.eq(0.25).all()
    torch.nn.init.normal_(gate.w_gating)
    probs = (x @ gate.w_gating).softmax(dim=-1)
    routing = gate.eval()(x)
    assert routing.expert.equal(probs.argmax(dim=-1))
    torch.testing.assert_close(routing.weight, probs.amax(dim=-1))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch's forward mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: TopKGating(DIM, 4, k=2, expert_bias=True, **kw),
        lambda **kw: TopKGating(DIM, 4, k=2, expert_bias=True, **kw).requires_grad_(False),
        lambda **kw: ReLUGating(DIM, 4, k=4, mean_choices=2, **kw),
        lambda **kw: Top2Gating(DIM, 4, second_policy_train="all", **kw),
    ],
    ids=["expert_bias", "frozen", "relu", "top2"],
)
def test_forward_mode_of_gates(make, dtype):
    """In training, where gates count in the backward; it agrees with reverse mode."""
    torch.manual_seed(0)
    gate = make(dtype=dtype)
    x, tangent = torch.randn(2, 1, 6, DIM, dtype=dtype).unbind()

    def weights(x):
        return gate(x).weight

    found = torch.func.jvp(weights, (x,), (tangent,))[1]
    expected = (torch.func.jacrev(weights)(x).float() * tangent.float()).flatten(start_dim=2).sum(dim=-1)
    torch.testing.assert_close(found.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-4)
    assert found.any()
    with torch.autograd.forward_ad.dual_level():
        dual = weights(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent.equal(found)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch's forward mode
def test_forward_mode_ad_raises():
    """As docs/correctness.md says, with what to take instead."""
    moe = MoE(DIM, 3, hidden_dim=4, second_policy_train="all").double()
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    assert torch.func.jvp(lambda x: moe.gate(x).weight, (x,), (x,))[1].shape == (1, 6)
    with pytest.raises(NotImplementedError, match="must implement the jvp function"):
        torch.func.jvp(lambda x: moe(x)[0], (x,), (x,))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: moe(x)[0].sum()))(x).view(3 * DIM, 3 * DIM)
    torch.testing.assert_close(hessian, hessian.T)
