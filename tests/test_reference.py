"""The slow reference is itself held to every recorded case of the original TensorFlow code, gradients included."""

import pytest
import reference
import torch
from golden.cases import Case, check, names


def leaf(values):
    return values.clone().requires_grad_()


def gate_for(case, w_gating, **settings):
    """The reference router of a case."""
    if case.name.startswith(("topn", "switch")):
        return reference.TopK(w_gating, k=case.k, **settings)
    second_place_loss = case.hyper["moe_use_second_place_loss"]
    return reference.Top2(
        w_gating, policy=case.policy, threshold=case.threshold, second_place_loss=second_place_loss, **settings
    )


@pytest.mark.parametrize("name", names("top", "switch"))
def test_gate(name):
    case = Case(name)
    x, w_gating = leaf(case["inputs"]), leaf(case["w_gate"])
    c = case.meta["expert_capacity"]
    factor = case.factor_for(c) / (case.k if name.startswith(("topn", "switch")) else 1)
    gate = gate_for(case, w_gating, capacity_factor=factor, min_expert_capacity=1)
    decision = gate.decide(reference.make_groups(x, case.get("importance"), uniforms=case.get("u0")))
    combine = reference.dense(decision, case["combine"].shape[:-1], c)
    assert torch.equal(combine != 0, case["dispatch"] != 0)
    check(combine, case["combine"], "combine")
    if name.startswith("topn3"):  # its loss counts first choices only
        return
    loss = decision.balance_loss + (case.hyper["moe_z_loss"] or 0) * decision.z_loss
    check(loss, case["loss"], "loss")
    ((combine * case["cotangent"]).sum() + loss).backward()
    check(x.grad, case["grad_inputs"], "gradient", "inputs")
    check(w_gating.grad, case["grad_w_gate"], "gradient", "w_gating")


@pytest.mark.parametrize("name", names("top2"))
def test_capacity_rule(name):
    case = Case(name)
    factor = case.meta["capacity_factor_used_to_derive_it"]
    if factor is not None:  # two cases were given their capacity
        *_, n, e, c = case["combine"].shape
        assert reference.capacity(n, 1, factor, e, case.hyper["moe_min_expert_capacity"]) == c


def layer_settings(case):
    hyper = case.hyper
    return {
        "capacity_factor": hyper[f"moe_capacity_factor_{case.mode}"],
        "min_expert_capacity": hyper["moe_min_expert_capacity"],
    }


@pytest.mark.parametrize("name", names("v1"))
def test_one_level_layer(name):
    case = Case(name)
    keys = ["w_gate", "wi_0", "wi_1", "wo"] if name == "v1_geglu" else ["w_gate", "wi", "wo"]
    weights = {key: leaf(case[key]) for key in keys}
    x = leaf(case["inputs"])
    if name == "v1_geglu":
        gelu = torch.nn.GELU(approximate="tanh")
        experts = reference.gated_feed_forward(weights["wi_0"], weights["wi_1"], weights["wo"], gelu)
    else:
        experts = reference.feed_forward(weights["wi"], weights["wo"], torch.relu)
    result = reference.moe(
        x,
        gate_for(case, weights["w_gate"], **layer_settings(case)),
        experts,
        group_size=case.hyper["moe_group_size"],
        loss_coef=case.hyper["moe_loss_coef"],
    )
    combine = reference.dense(result.decisions[0], case["gate_combine"].shape[1:-1], case.meta["gate_capacity"])
    assert torch.equal(combine != 0, case["gate_dispatch"][0] != 0)
    check(combine, case["gate_combine"][0], "combine")
    check(result.decisions[0].balance_loss, case["gate_loss"], "loss")
    check(result.aux_loss, case["loss"], "loss")
    check(result.out, case["output"], "output")
    ((result.out * case["cotangent"]).sum() + result.aux_loss).backward()
    check(x.grad, case["grad_inputs"], "gradient", "inputs")
    for key, weight in weights.items():
        check(weight.grad, case[f"grad_{key}"], "gradient", key)


@pytest.mark.parametrize("name", names("v2"))
def test_two_level_layer(name):
    case = Case(name)
    x = leaf(case["inputs"])
    outer, inner = leaf(case["w_gate_outer"]), leaf(case["w_gate_inner"])
    w1, w2 = leaf(case.expert_first("wi")), leaf(case.expert_first("wo"))
    settings = layer_settings(case)
    second = {**settings, "capacity_factor": case.hyper["moe_capacity_factor_second_level"]}
    result = reference.hierarchical_moe(
        x,
        gate_for(case, outer, **settings),
        gate_for(case, inner, **second),
        reference.feed_forward(w1, w2, torch.relu),
        group_size=case.hyper["moe_group_size"],
        draws={"uniforms": case["u0"][0]} if "u0" in case else None,
        inner_draws={"uniforms": case["u1"]} if "u1" in case else None,
    )
    first, second = result.decisions
    for level, decision, shape in (
        ("outer", first, case["outer_combine"].shape[1:]),
        ("inner", second, case["inner_combine"].shape),
    ):
        combine = reference.dense(decision, shape[:-1], case.meta[f"{level}_capacity"]).reshape(
            case[f"{level}_combine"].shape
        )
        assert torch.equal(combine != 0, case[f"{level}_dispatch"] != 0)
        check(combine, case[f"{level}_combine"], "combine")
        check(decision.balance_loss, case[f"{level}_loss"], "loss")
    check(result.aux_loss, case["loss"], "loss")
    check(result.out, case["output"], "output")
    ((result.out * case["cotangent"]).sum() + result.aux_loss).backward()
    check(x.grad, case["grad_inputs"], "gradient", "inputs")
    check(outer.grad, case["grad_w_gate_outer"], "gradient", "w_gate_outer")
    check(inner.grad, case["grad_w_gate_inner"], "gradient", "w_gate_inner")
    check(w1.grad, case.expert_first("grad_wi"), "gradient", "wi")
    check(w2.grad, case.expert_first("grad_wo"), "gradient", "wo")


# What was not recorded is held to cases that a person can work out. Token t has the probabilities of row t.


def toy(rows):
    """Inputs (1, n, n) and w_gating (n, e) with which a softmax router gives token t the probabilities rows[t]."""
    probs = torch.tensor(rows, dtype=torch.float64)
    return torch.eye(len(rows), dtype=torch.float64).unsqueeze(0), probs.log()


def places(decision):
    """{(token, order): (expert, slot)} of the kept choices."""
    return {(c.token.position, c.order): (c.expert, c.slot) for c in decision.choices if c.kept}


CROWD = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.3, 0.5, 0.2]]  # first choices 0, 0, 1; second choices 1, 1, 0


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
def test_priority_by_hand(router, priority, expected):
    x, w = toy(CROWD)
    settings = {"min_expert_capacity": 1, "priority": priority}
    gates = {
        "top2": reference.Top2(w, capacity_factor=2.0, **settings),  # 3 tokens · 2 / 3 experts = 2 slots
        "topk": reference.TopK(w, capacity_factor=1.0, **settings),  # 2 choices · 3 tokens / 3 experts
    }
    assert places(gates[router].decide(reference.make_groups(x))) == expected


def test_mask_by_hand():
    """The middle token is padding: two real tokens, one slot an expert, means over two."""
    x, w = toy([[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.6, 0.3, 0.1]])
    gate = reference.Top2(w, capacity_factor=1.5, min_expert_capacity=1)  # int(2 · 1.5 / 3) = 1
    decision = gate.decide(reference.make_groups(x, mask=torch.tensor([[True, False, True]])))
    assert places(decision) == {(0, 0): (0, 0), (0, 1): (1, 0)}
    # proxy (1.3, 0.5, 0.2) / 2 times load (2, 0, 0) / 2, mean over 3 experts, times 9
    assert decision.balance_loss.item() == pytest.approx(3 * 0.65)
    assert decision.z_loss.item() == pytest.approx(0.0, abs=1e-12)  # the logits are log-probabilities


def test_top2_importance_by_hand():
    """Importance 0.5 makes a token's top expert its second choice; 0 makes it no choice at all."""
    x, w = toy([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    decision = reference.Top2(w).decide(reference.make_groups(x, torch.tensor([[1.0, 0.5, 0.0]])))
    weights = {(c.token.position, c.order): (c.expert, c.weight.item()) for c in decision.choices}
    expected = {(0, 0): (0, 0.7 / 0.9), (0, 1): (1, 0.2 / 0.9), (1, 1): (1, 1.0)}
    assert weights.keys() == expected.keys()
    for key, (expert, weight) in expected.items():
        assert weights[key] == (expert, pytest.approx(weight))
    assert decision.balance_loss.item() == pytest.approx(9 / 3 * (0.7 / 3) * (1 / 3))


def test_biased_groups_by_hand():
    """Sigmoid scores in two groups of two: the bias moves the choice, the weights stay unbiased."""
    scores = torch.tensor([0.6, 0.5, 0.9, 0.1], dtype=torch.float64)
    x, w = torch.ones(1, 1, 1, dtype=torch.float64), scores.logit().unsqueeze(0)
    grouped = {"k": 2, "score": "sigmoid", "num_groups": 2, "top_groups": 1, "scale": 2.0}

    def weights(**settings):
        decision = reference.TopK(w, **settings).decide(reference.make_groups(x))
        return {c.expert: pytest.approx(c.weight.item()) for c in decision.choices}

    assert weights(k=2, score="sigmoid") == {2: 0.6, 0: 0.4}
    assert weights(**grouped) == {0: 2 * 0.6 / 1.1, 1: 2 * 0.5 / 1.1}  # 0.6 + 0.5 beats 0.9 + 0.1
    bias = torch.tensor([0.0, 0.0, 0.0, 0.3], dtype=torch.float64)
    assert weights(**grouped, expert_bias=bias) == {2: 2 * 0.9, 3: 2 * 0.1}  # 0.9 + 0.4 beats 1.1


def test_top_k_balance_by_hand():
    """f counts all k choices: 1.0 at uniform f and P for any k; 4/2 · Σ f·P when two experts take everything."""
    uniform = [[0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.1, 0.2], [0.2, 0.1, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4]]
    for k, rows, expected in ((1, uniform, 1.0), (2, uniform, 1.0), (2, uniform[:2], 4 / 2 * (0.35 + 0.35))):
        for over in ("group", "batch"):
            x, w = toy(rows)
            decision = reference.TopK(w, k=k, balance_over=over).decide(reference.make_groups(x))
            assert decision.balance_loss.item() == pytest.approx(expected)
    x, w = toy(uniform)
    halves = x.reshape(2, 2, 4)  # each group alone is skewed, both together are balanced
    by_group, by_batch = (
        reference.TopK(w, balance_over=o).decide(reference.make_groups(halves)) for o in ("group", "batch")
    )
    assert by_group.balance_loss.item() == pytest.approx(1.4)
    assert by_batch.balance_loss.item() == pytest.approx(1.0)


def test_noisy_by_hand():
    """Two experts, k = 1, logits 1 and 0, unit noise scale: P(x, 0) = Φ(1), P(x, 1) = Φ(-1)."""
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    w_gating = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w_noise = torch.full((1, 2), torch.e - 1.0, dtype=torch.float64).log()  # softplus gives 1
    decision = reference.NoisyTopK(w_gating, w_noise=w_noise, k=1).decide(reference.make_groups(x))
    assert [(c.expert, c.weight.item()) for c in decision.choices] == [(0, 1.0)]
    likely = 0.8413447460685429
    assert decision.losses["importance"].item() == pytest.approx(1.0)  # (1, 0): variance 1/4 over mean² 1/4
    assert decision.losses["load"].item() == pytest.approx((likely - 0.5) ** 2 / 0.25)


def test_expert_choice_by_hand():
    """Three tokens, two experts, factor 1.4: two tokens an expert; token 2 is taken by both, none by nobody."""
    x, w = toy([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    decision = reference.ExpertChoice(w, capacity_factor=1.4).decide(reference.make_groups(x))
    taken = {(c.token.position, c.expert, c.slot): c.weight.item() for c in decision.choices}
    expected = {(0, 0, 0): 0.9, (2, 0, 1): 0.4, (1, 1, 0): 0.8, (2, 1, 1): 0.6}
    assert taken == {key: pytest.approx(weight) for key, weight in expected.items()}


@pytest.mark.parametrize("factor", [None, 2.0])
def test_two_levels_by_hand(factor):
    """Level one keeps every choice (dropless, or two slots for two tokens); level two has one slot an expert."""
    x, outer = toy([[0.75, 0.25], [0.6, 0.4]])
    inner = torch.tensor([[[0.7, 0.3], [0.8, 0.2]], [[0.1, 0.9], [0.5, 0.5]]], dtype=torch.float64).log()
    first = reference.Top2(outer, capacity_factor=factor, min_expert_capacity=1)
    second = reference.TopK(inner, k=1, capacity_factor=1.0, min_expert_capacity=1, normalize=True)  # int(2 · 1 / 2)
    result = reference.hierarchical_moe(
        x, first, second, lambda pair, row: row * 10.0 ** (2 * pair[0] + pair[1]), loss_coef=1.0
    )
    # Outer 0 gets tokens 0, 1 as firsts; both want inner 0, token 0 has the slot. Outer 1 gets both as seconds
    # (importance 0.5): token 0 goes to inner 1, token 1 to inner 0 on a tie.
    expected = torch.tensor([[[0.75 * 1 + 0.25 * 1000, 0.0], [0.0, 0.4 * 100]]], dtype=torch.float64)
    torch.testing.assert_close(result.out, expected)
    first_loss = 2 * (0.675 * 1.0)
    second_loss = (2 * (0.75 * 1.0) + 0.0) / 2  # outer 1 has no token of importance 1
    assert result.aux_loss.item() == pytest.approx(first_loss + second_loss)
