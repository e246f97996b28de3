"""What `TopKGating` decides on one token in Python's numbers is what operators decide."""

import pytest
import torch
from torch import nn

from mixture_of_experts import GatedExperts, HashGating, MoE, TopKGating, force_routing, ops
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating import RouterLogits, topk_by_numbers
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import track_routing

DIM, E = 5, 7
GATES = {
    "plain": dict(),
    "one choice": dict(k=1),
    "one choice, normalised": dict(k=1, normalize=True, bias=True),
    "all choices": dict(k=E, normalize=False),
    "sigmoid, biased": dict(k=3, score="sigmoid", expert_bias=True, scale=2.5, eps=0.5),
    "softmax of the chosen": dict(k=3, weigh="softmax", normalize=False),
    "softmax, biased": dict(expert_bias=True),
    "over the batch": dict(k=3, balance_over="batch"),
    "network": dict(logits=RouterLogits(DIM, E, norm_eps=1e-6, softcap=2.0)),
}


def make_gate(dtype: torch.dtype = torch.float32, **settings) -> TopKGating:
    torch.manual_seed(0)
    gate = TopKGating(DIM, E, **settings).to(dtype).eval()
    for name in ("b_gating", "expert_bias"):
        if getattr(gate, name) is not None:
            getattr(gate, name).data.normal_(std=0.3)
    return gate


def unsupported_reason(gate: TopKGating, x: torch.Tensor) -> str | None:
    return topk_by_numbers.unsupported_reason(gate, gate.read(x))


def run_both(gate, x, **arguments) -> tuple[Routing, Routing]:
    """By numbers, or whatever takes the call, and by operators."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        found = gate(x, **arguments)
        patch.setattr(topk_by_numbers, "unsupported_reason", lambda *call: "operators are asked for")
        return found, gate(x, **arguments)


def check_equal(found: Routing, wanted: Routing) -> None:
    """Choices and probabilities to the bit; weights and losses up to rounding."""
    torch.testing.assert_close(vars(found), vars(wanted), rtol=1e-6, atol=1e-6)
    for name in ("expert", "kept", "sent", "probs"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_numbers_decide_as_operators_do(name, dtype):
    gate = make_gate(dtype, **GATES[name])
    for scale in (0.0, 1.0, 30.0):  # ties; and scores that round to 0 and 1
        x = scale * torch.randn(1, 1, DIM).to(dtype)
        with torch.no_grad():
            assert unsupported_reason(gate, x) is None
        check_equal(*run_both(gate, x))
    x[..., 0] = torch.nan
    torch.testing.assert_close(*(vars(routing) for routing in run_both(gate, x)), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", [dict(score="sigmoid", eps=0.0), dict(expert_bias=True, weigh="softmax")], ids=str)
def test_scores_of_the_chosen_that_round_to_zero(settings, dtype):
    gate = make_gate(dtype, **settings)
    with torch.no_grad():
        gate.w_gating.fill_(0.0)[0] = torch.tensor([0.0, -800.0, -801.0, -803.0, -805.0, -807.0, -809.0])
        if gate.expert_bias is None:
            gate.w_gating[0, 0] = -900.0
        else:
            gate.expert_bias.fill_(0.0)[1:3] = 3.0
    found, wanted = run_both(gate, torch.ones(1, 1, DIM, dtype=dtype))
    torch.testing.assert_close(vars(found), vars(wanted), equal_nan=True)


def test_biases_of_both_infinities():
    """Experts that are always and never chosen; a sum of both would not be finite."""
    gate = make_gate(expert_bias=True)
    gate.expert_bias.fill_(0.0)[2], gate.expert_bias[0] = torch.inf, -torch.inf
    check_equal(*run_both(gate, torch.randn(1, 1, DIM)))


def test_unsupported_gates_fall_back():
    """With a reason, where they cannot serve."""
    gate, x = make_gate(), torch.randn(1, 1, DIM)
    with torch.no_grad():
        assert "eval" in unsupported_reason(make_gate().train(), x)
        assert "one token" in unsupported_reason(gate, torch.randn(1, 2, DIM))
        assert "one token" in unsupported_reason(gate, torch.randn(2, 1, DIM))
        assert "dropless" in unsupported_reason(make_gate(capacity_factor_eval=1.0), x)
        assert "scores" in unsupported_reason(make_gate(select="logits"), x)
        assert "HashGating" in unsupported_reason(HashGating(DIM, E, num_ids=9).eval(), x)
        assert "plain tensor" in unsupported_reason(gate, x.to("meta"))
        reasons = []
        torch.vmap(lambda x: reasons.append(unsupported_reason(gate, x)) or x)(x.unsqueeze(0))
        assert "transforms" in reasons[0]
        with ops.use("plain"):
            assert "requested" in unsupported_reason(gate, x)
        with force_routing(gate, "balanced"):
            assert (
                ops.explain_call(MoE(DIM, gate=gate, experts=GatedExperts(DIM, E, 9)), x).gates[0].implementation
                == "operators"
            )
    assert "without gradients" in unsupported_reason(gate, x)
    assert gate(x).weight.requires_grad


@pytest.mark.parametrize(
    "arguments",
    [
        dict(mask=torch.zeros(1, 1, dtype=torch.bool)),
        dict(counted=torch.zeros(1, 1, dtype=torch.bool)),
        dict(importance=torch.full((1, 1), 0.5)),
        dict(given_experts=torch.tensor([[[3, 1]]])),
        dict(router_input=torch.ones(1, 1, DIM)),
        dict(losses=("balance_batch",)),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_model_with_more_token_metadata_wins(arguments):
    gate, x = make_gate(), torch.randn(1, 1, DIM)
    found, wanted = run_both(gate, x, **arguments)
    check_equal(found, wanted)
    with torch.no_grad():
        assert not torch.equal(found.weight, gate(x).weight) or len(found.losses) == 3


def test_hooks_see_equal_outputs():
    """Hooks, statistics, records and their replay, and gates with steps of their own around the same code."""
    layer = MoE(DIM, gate=make_gate(), experts=GatedExperts(DIM, E, 9)).eval()
    x, seen = torch.randn(3, 1, 1, DIM), []
    layer.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    with torch.no_grad(), track_routing(layer) as stats, record_routing(layer) as records:
        outs = [layer(token) for token in x]
    assert [type(routing) for routing in seen] == 3 * [Routing]
    with torch.no_grad(), replay_routing(layer, records):
        replayed, _ = layer(x.flatten(0, 1))
        torch.testing.assert_close(list(replayed), [out.squeeze(0) for out, _ in outs])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), track_routing(layer) as wanted:
        patch.setattr(topk_by_numbers, "unsupported_reason", lambda *call: "operators are asked for")
        torch.testing.assert_close([layer(token) for token in x], outs)
    assert stats.summary() == wanted.summary()


class ReversedGating(TopKGating):
    """Takes the smallest scores."""

    def decide(self, tokens):
        choices = super().decide(tokens)
        return choices._replace(expert=choices.probs.argsort(dim=-1)[..., : self.k])


def test_custom_gate_decides():
    gate, x = ReversedGating(DIM, E).eval(), torch.randn(1, 1, DIM)
    with torch.no_grad():
        assert gate(x).expert.flatten().tolist() == gate(x).probs.flatten().argsort()[:2].tolist()
    gate = make_gate()
    gate.logits, gate.w_gating = nn.Linear(DIM, E), None
    with torch.no_grad():
        assert "Linear computes the logits" in unsupported_reason(gate, x)


@pytest.mark.slow
def test_a_compiled_layer_decodes():
    layer = MoE(DIM, gate=make_gate(), experts=GatedExperts(DIM, E, 9)).eval()
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(1, 1, DIM)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
