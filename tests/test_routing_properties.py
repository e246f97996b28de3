"""Every router against the slow reference, and what routers guarantee, over many random configurations (float64)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support import strategies as make

from mixture_of_experts import NoisyTopKGating, Top2Gating, TopKGating


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
@settings(max_examples=100)
def test_router_equals_reference(kind, data):
    compare(*data.draw(cases(kind)))


# Guarantees


@st.composite
def quiet_gates(draw, kind, **limits):
    """A router that draws nothing, and its gate in eval."""
    num_experts = draw(make.counts_for(kind))
    router = draw(make.routers(kind, num_experts, policies=make.QUIET, **limits))
    return router, router.build(draw(make.dims), num_experts, draw(make.seeds)).eval()


@EVERY_KIND
@given(data=st.data())
def test_padding_changes_nothing(kind, data):
    """Decisions, slots, losses and gradients of a padded batch are those of the batch; the padding gets no gradient."""
    _, gate = data.draw(quiet_gates(kind))
    batch = data.draw(make.padded_batches(gate.dim))
    padded, plain = gate(batch.x, mask=batch.mask), gate(batch.plain)
    combine, expected = padded.combine_tensor(), plain.combine_tensor()
    c = plain.slots
    real = batch.tokens(combine)
    make.assert_same(real[..., :c], expected, "combine")
    assert torch.equal(real[..., :c] != 0, expected != 0)
    assert real[..., c:].count_nonzero() == 0
    assert combine[~batch.mask].count_nonzero() == 0
    for name in ("balance_loss", "z_loss"):
        make.assert_same(getattr(padded, name), getattr(plain, name), name)
    for name in plain.losses:
        make.assert_same(padded.losses[name], plain.losses[name], name)
    cotangent = make.normal(make.generator(1), *expected.shape)
    loss = (real[..., :c] * cotangent).sum() + padded.balance_loss + padded.z_loss
    expected_loss = (expected * cotangent).sum() + plain.balance_loss + plain.z_loss
    (of_padding,) = make.gradients(loss, [batch.x])
    assert of_padding[~batch.mask].count_nonzero() == 0
    make.assert_same_gradients(loss, expected_loss, {"x": batch.plain, **dict(gate.named_parameters())})


@EVERY_KIND
@given(data=st.data())
@settings(max_examples=25)
def test_a_batch_of_mixed_lengths_is_its_sequences(kind, data):
    """Every sequence is routed as if it were alone; balance is the mean over sequences, z-loss the mean over tokens."""
    router, gate = data.draw(quiet_gates(kind))
    gen = make.generator(data.draw(make.seeds))
    lengths = data.draw(st.lists(make.lengths, min_size=2, max_size=4))
    sequences = [make.normal(gen, 1, n, gate.dim) for n in lengths]
    longest = max(x.shape[1] for x in sequences)
    parts = [make.pad(x, longest + 1 - x.shape[1], gen) for x in sequences]
    together = gate(torch.cat([p.x for p in parts]), mask=torch.cat([p.mask for p in parts]))
    alone = [gate(x) for x in sequences]
    for i, (part, routing) in enumerate(zip(parts, alone, strict=True)):
        combine = part.tokens(together.combine_tensor()[i : i + 1])
        expected = routing.combine_tensor()
        make.assert_same(combine[..., : routing.slots], expected, f"combine of sequence {i}")
        assert combine.count_nonzero() == expected.count_nonzero()
    tokens = sum(x.shape[1] for x in sequences)
    z = sum(r.z_loss * r.num_tokens for r in alone) / max(tokens, 1)
    make.assert_same(together.z_loss, z, "z-loss")
    if router.kind == "top2" or (router.kind == "topk" and router.arguments["balance_over"] == "group"):
        counted = [r.balance_loss for r in alone if r.num_tokens > 0]
        balance = sum(counted, torch.zeros_like(z)) / max(len(counted), 1)
        make.assert_same(together.balance_loss, balance, "balance loss")


@TOKEN_CHOICE
@given(data=st.data())
@settings(max_examples=30)
def test_token_priority_is_causal(kind, data):
    """Tokens after t never change what happens to tokens up to t."""
    _, gate = data.draw(quiet_gates(kind, priority="token"))
    n = data.draw(st.sampled_from([8, 5, 11, 3, 2]))
    t = data.draw(st.sampled_from([n // 2, 0, n - 2]))
    gen = make.generator(data.draw(make.seeds))
    x = make.normal(gen, 2, n, gate.dim)
    changed = torch.cat([x[:, : t + 1], 3 * make.normal(gen, 2, n - t - 1, gate.dim)], dim=1)
    mask = data.draw(make.masks(2, n))
    before, after = (gate(v, mask=mask).combine_tensor()[:, : t + 1] for v in (x, changed))
    assert torch.equal(before != 0, after != 0)
    make.assert_same(after, before, "combine")


def test_choice_priority_is_not_causal():
    """The test above can fail: with priority 'choice' a later first choice displaces an earlier second one."""
    rows = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64).log()
    gate = Top2Gating(2, 2, second_policy_eval="all", capacity_factor_eval=1.0, min_expert_capacity=1).double().eval()
    gate.w_gating.data.copy_(rows)
    x = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    swapped = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)  # token 1 now prefers expert 1
    kept = [gate(v).dispatch_tensor()[0, 0, 1].sum().item() for v in (x, swapped)]
    assert kept == [1.0, 0.0]


@TOKEN_CHOICE
@given(data=st.data())
@settings(max_examples=25)
def test_dropless_routing_does_not_depend_on_length(kind, data):
    _, gate = data.draw(quiet_gates(kind, dropless=True))
    n = data.draw(make.lengths)
    m = data.draw(st.sampled_from([n // 2, n, 0]))
    x = make.normal(make.generator(data.draw(make.seeds)), 2, n, gate.dim)
    whole, prefix = gate(x), gate(x[:, :m])
    experts, expected = whole.combine_tensor().sum(-1)[:, :m], prefix.combine_tensor().sum(-1)
    assert torch.equal(experts != 0, expected != 0)
    make.assert_same(experts, expected, "weights")
    assert whole.capacity is None


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


def rolled(row, n=None):
    """One-hot inputs and a weight with which token t has the logits `row` rolled by t: uniform loads, uniform P."""
    e = len(row)
    n = e if n is None else n
    logits = torch.tensor(row, dtype=torch.float64)
    weight = torch.stack([logits.roll(t) for t in range(n)])
    return torch.eye(n, dtype=torch.float64).unsqueeze(0), weight


ROW = [2.0, 1.0, 0.5, 0.0, -0.5, -3.0]
BALANCED = {
    "top2": (Top2Gating(6, 6), 1.0),
    "top2 second place": (Top2Gating(6, 6, second_place_loss=True), 1.5),
    **{
        f"{score} k={k} {over}": (TopKGating(6, 6, k, score=score, balance_over=over), 1.0)
        for score in ("softmax", "sigmoid")
        for k in (1, 2, 3, 6)
        for over in ("group", "batch")
    },
    "noisy": (NoisyTopKGating(6, 6, 2), 0.0),
}


@pytest.mark.parametrize("name", BALANCED)
def test_balance_loss_at_uniform_load(name):
    gate, expected = BALANCED[name]
    x, weight = rolled(ROW)
    gate = gate.double().eval()
    gate.w_gating.data.copy_(weight)
    x.requires_grad_()
    routing = gate(x)
    make.assert_same(routing.balance_loss, torch.tensor(expected, dtype=torch.float64), "balance loss")
    for gradient in make.gradients(routing.balance_loss + routing.z_loss, [x, *gate.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in BALANCED if "k=6" not in name])
def test_balance_loss_of_one_preference(name):
    """All tokens have the same logits: the loss is e/k times the probability of the k experts they crowd into."""
    gate, at_uniform = BALANCED[name]
    gate = gate.double().eval()
    row = torch.tensor(ROW, dtype=torch.float64)
    gate.w_gating.data.copy_(row.expand(6, 6))
    loss = gate(torch.eye(6, dtype=torch.float64).unsqueeze(0)).balance_loss.item()
    assert loss > at_uniform + 0.1
    if name.startswith(("softmax", "sigmoid")):
        scores = row.softmax(0) if name.startswith("softmax") else row.sigmoid() / row.sigmoid().sum()
        assert loss == pytest.approx((6 / gate.k * scores[: gate.k].sum()).item())
    if name == "top2":
        assert loss == pytest.approx(6 * row.softmax(0)[0].item())
    if name == "noisy":
        weights = torch.zeros(6, dtype=torch.float64)
        weights[:2] = row[:2].softmax(0)
        parts = gate(torch.eye(6, dtype=torch.float64).unsqueeze(0)).losses
        expected = weights.var(unbiased=False) / weights.mean() ** 2
        make.assert_same(parts["importance"], expected, "importance loss")
        assert parts["load"] > 0


ANY_ROUTER = {
    "top2": make.Router("top2", {"second_place_loss": True, "second_policy_train": "all"}),
    "top2 dropless": make.Router("top2", {"capacity_factor_train": None, "capacity_factor_eval": None}),
    "softmax k=1": make.Router("topk", {"k": 1}),
    "softmax": make.Router("topk", {"k": 2, "capacity_factor_train": 1.0, "balance_over": "batch"}),
    "sigmoid": make.Router("topk", {"k": 2, "score": "sigmoid", "num_groups": 2, "top_groups": 1, "expert_bias": True}),
    "noisy": make.Router("noisy", {"k": 2}),
    "expert choice": make.Router("expert_choice", {}),
}
EXTREMES = {
    "saturated": lambda x: x * 1e4,
    "saturated down": lambda x: -x.abs() * 1e4,
    "equal tokens": torch.zeros_like,
    "no tokens": lambda x: x[:, :0],
    "no groups": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("extreme", [*EXTREMES, "all masked"])
@pytest.mark.parametrize("name", ANY_ROUTER)
def test_no_nan(name, extreme, training, dtype):
    gate = ANY_ROUTER[name].build(3, 4, seed=5).to(dtype).train(training)
    x = make.normal(make.generator(2), 2, 5, 3).to(dtype)
    x = EXTREMES.get(extreme, lambda x: x * torch.nan)(x).requires_grad_()
    mask = torch.zeros(x.shape[:-1], dtype=torch.bool) if extreme == "all masked" else None
    routing = gate(x, mask=mask)
    combine = routing.combine_tensor()
    cotangent = make.normal(make.generator(1), *combine.shape).to(dtype)
    loss = (combine * cotangent).sum() + routing.balance_loss + routing.z_loss
    assert loss.isfinite()
    for gradient in make.gradients(loss, [x, *gate.parameters()]):
        assert gradient.isfinite().all()
    if extreme in ("no tokens", "no groups", "all masked"):
        assert routing.balance_loss == routing.z_loss == 0
        assert combine.count_nonzero() == 0
