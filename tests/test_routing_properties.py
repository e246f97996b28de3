"""Every router against the slow reference, and what routers guarantee, over many random configurations (float64)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support import strategies as make

from mixture_of_experts import TopKGating


def decide_both(router, gate, x, importance=None, mask=None):
    """The package's Routing and the reference's Decision on the same draws."""
    arguments = {} if importance is None else {"importance": importance}
    with make.RecordDraws() as draws:
        routing = gate(x, mask=mask, **arguments)
    groups = reference.make_groups(x, importance, mask, **(draws.take(router, gate.training) or {}))
    return routing, router.reference(gate).decide(groups)


def compare(router, gate, x, importance, mask):
    """Decisions exactly; weights, losses and all gradients within float64 rounding."""
    x = make.poisoned(x, mask).requires_grad_()
    routing, decision = decide_both(router, gate, x, importance, mask)
    combine = routing.combine_tensor()
    expected = reference.dense(decision, routing.probs.shape, routing.slots)
    assert torch.equal(routing.dispatch_tensor(), (expected != 0).double())
    make.assert_same(combine, expected, "combine")
    make.assert_same(routing.balance_loss, decision.balance_loss, "balance loss")
    make.assert_same(routing.z_loss, decision.z_loss, "z-loss")
    for name, value in decision.losses.items():
        make.assert_same(routing.losses[name], value, name)
    cotangent = make.normal(make.generator(1), *combine.shape)
    loss, expected_loss = (
        (c * cotangent).sum() + 0.7 * d.balance_loss + 0.3 * d.z_loss
        for c, d in ((combine, routing), (expected, decision))
    )
    make.assert_same_gradients(loss, expected_loss, {"x": x, **dict(gate.named_parameters())})


@st.composite
def cases(draw, kind):
    """A gate of one kind with inputs: odd sizes, empty groups, fewer tokens than experts, outer experts."""
    num_experts = draw(make.counts_for(kind))
    router = draw(make.routers(kind, num_experts))
    outer = () if kind == "expert_choice" else draw(st.sampled_from([(), (), (3,)]))
    tokens = (*outer, draw(st.sampled_from([2, 1, 3, 2, 1, 0])), draw(make.lengths))
    dim = draw(make.dims)
    gate = router.build(dim, num_experts, draw(make.seeds), outer).train(draw(st.booleans()))
    x = make.normal(make.generator(draw(make.seeds)), *tokens, dim)
    importance = None if kind == "expert_choice" else draw(make.importances(*tokens))
    return router, gate, x, importance, draw(make.masks(*tokens))


EVERY_KIND = pytest.mark.parametrize("kind", [*make.TOKEN_CHOICE, "expert_choice"])
TOKEN_CHOICE = pytest.mark.parametrize("kind", make.TOKEN_CHOICE)


@EVERY_KIND
@given(data=st.data())
@settings(max_examples=50)
def test_router_equals_reference(kind, data):
    compare(*data.draw(cases(kind)))


# Guarantees


@st.composite
def quiet_gates(draw, kind, **limits):
    """A router that draws nothing, and its gate in eval."""
    num_experts = draw(make.counts_for(kind))
    router = draw(make.routers(kind, num_experts, policies=make.QUIET, **limits))
    return router, router.build(draw(make.dims), num_experts, draw(make.seeds)).eval()


def top_scores(router, gate, x) -> list[float]:
    """What priority 'score' sorts the tokens (n, d) by: the top probability, or the top sigmoid, of an expert that may
    be chosen."""
    logits = (x @ gate.w_gating).detach()
    if getattr(gate, "b_gating", None) is not None:
        logits = logits + gate.b_gating.detach()
    if router.kind == "noisy" and gate.k > 1:  # a probability among the k best
        logits = logits.topk(gate.k).values
    scores = logits.sigmoid() if router.arguments.get("score") == "sigmoid" else logits.softmax(-1)
    if getattr(gate, "num_groups", None) is not None:
        bias = 0 if gate.expert_bias is None else gate.expert_bias
        parts = (scores + bias).unflatten(-1, (gate.num_groups, -1))
        sums = parts.topk(min(2, parts.shape[-1])).values.sum(-1)
        best = sums.sort(descending=True, stable=True).indices[:, : gate.top_groups]
        is_open = torch.zeros_like(sums).scatter(-1, best, 1.0)
        scores = (scores.unflatten(-1, (gate.num_groups, -1)) * is_open.unsqueeze(-1)).flatten(-2)
    return scores.amax(-1).tolist()


@TOKEN_CHOICE
@given(data=st.data())
def test_who_gets_the_slots(kind, data):
    """What each priority promises, stated without a queue; an expert is never idle while a choice of it is dropped."""
    router, gate = data.draw(quiet_gates(kind, dropless=False))
    n = data.draw(st.sampled_from([8, 5, 11, 3, 2]))
    x = make.normal(make.generator(data.draw(make.seeds)), 1, n, gate.dim)
    routing = gate(x, importance=data.draw(make.importances(1, n)))
    top = top_scores(router, gate, x[0])
    comes_first = {
        "token": lambda token, order: (token, order),
        "choice": lambda token, order: (order, token),
        "score": lambda token, order: (order, -top[token], token),
    }[router.arguments["priority"]]
    for expert in range(routing.num_experts):
        asking = [i for i in range(n * routing.k) if routing.chosen[0, i] and routing.expert[0, i] == expert]
        place = {i: comes_first(*divmod(i, routing.k)) for i in asking}
        slots = {i: routing.slot[0, i].item() for i in asking}
        served = [i for i in asking if slots[i] < routing.capacity]
        assert sorted(slots[i] for i in served) == list(range(min(len(asking), routing.capacity)))
        refused = [place[i] for i in asking if i not in served]
        assert all(place[i] < other for i in served for other in refused)


def test_score_priority_goes_by_the_sigmoid_itself():
    """Normalised over the experts, both scores would be 1."""
    gate = TopKGating(1, 1, k=1, score="sigmoid", priority="score", capacity_factor_eval=1.0).double().eval()
    gate.w_gating.data.fill_(1.0)
    assert gate(torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)).slot.tolist() == [[1, 0]]
