"""The package against every recorded case of the original TensorFlow code: decisions, values and gradients."""

import pytest
import torch
from support.golden import GoldenCase, assert_matches, list_cases
from torch import nn

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, Top2Gating, TopKGating


@pytest.fixture
def replay_draws(monkeypatch):
    """`draw(first, second)` makes the next calls of torch.rand return these, and checks what was asked for."""

    def pin(*values):
        waiting = [value for value in values if value is not None]

        def rand(*size, dtype=torch.float32, device=None, generator=None):
            assert generator is None
            assert dtype == torch.float32
            value = waiting.pop(0)
            assert tuple(size[0] if len(size) == 1 else size) == tuple(value.shape)
            return value

        monkeypatch.setattr(torch, "rand", rand)
        return waiting

    return pin


def set_weights(module, **weights):
    """Copy recorded weights into parameters named by their path (w_gating; gate__w_gating for gate.w_gating)."""
    for name, value in weights.items():
        module.get_parameter(name.replace("__", ".")).data.copy_(value)


def gate_for(case):
    """The gate of a gate case, with the factor that gives exactly the recorded capacity."""
    *outer, dim, e = case["w_gate"].shape
    c = case.meta["expert_capacity"]
    factor = case.factor_for(c)
    if case.name.startswith(("topn", "switch")):
        factor /= case.k  # TopKGating counts slots for each choice
        gate = TopKGating(
            dim, e, case.k, capacity_factor_train=factor, capacity_factor_eval=factor, min_expert_capacity=1
        )
    else:
        gate = Top2Gating(
            dim,
            e,
            outer_expert_dims=tuple(outer),
            second_place_loss=case.hyper["moe_use_second_place_loss"],
            capacity_factor_train=factor,
            capacity_factor_eval=factor,
            min_expert_capacity=1,
            **list_policies(case),
        )
    set_weights(gate, w_gating=case["w_gate"])
    return gate.train(case.mode == "train")


def list_policies(case):
    hyper = case.hyper
    return {
        f"second_{name}_{mode}": hyper[f"moe_second_{name}_{mode}"]
        for name in ("policy", "threshold")
        for mode in ("train", "eval")
    }


def check_gradients(case, loss, tensors):
    """Gradients of the loss with respect to tensors named as in the recording."""
    found = torch.autograd.grad(loss, list(tensors.values()))
    for (name, _), gradient in zip(tensors.items(), found, strict=True):
        recorded = case[f"grad_{name}"]
        if recorded.ndim == 4 and name in ("wi", "wo"):  # recorded inner expert first
            recorded = recorded.transpose(0, 1)
        assert_matches(gradient, recorded, "gradient", f"gradient of {name}")


@pytest.mark.parametrize("name", list_cases("top", "switch"))
def test_gate(name, replay_draws):
    case = GoldenCase(name)
    gate, x = gate_for(case), case["inputs"].requires_grad_()
    waiting = replay_draws(case.get("u0"))
    routing = gate(x, importance=case.get("importance"))
    assert not waiting
    dispatch, combine, balance_loss = routing
    assert routing.capacity == case.meta["expert_capacity"]
    assert torch.equal(dispatch, case["dispatch"])
    assert_matches(combine, case["combine"], "combine")
    if name.startswith("topn3"):  # its loss counts first choices only, ours all k
        return
    loss = balance_loss + (case.hyper["moe_z_loss"] or 0.0) * routing.z_loss
    assert_matches(loss, case["loss"], "loss")
    check_gradients(case, (combine * case["cotangent"]).sum() + loss, {"inputs": x, "w_gate": gate.w_gating})


@pytest.mark.parametrize("name", list_cases("top2"))
def test_capacity_from_the_recorded_factor(name):
    case = GoldenCase(name)
    factor = case.meta["capacity_factor_used_to_derive_it"]
    if factor is None:  # two cases were given their capacity
        return
    *outer, dim, e = case["w_gate"].shape
    gate = Top2Gating(
        dim, e, outer_expert_dims=tuple(outer), capacity_factor_train=factor, second_policy_train="all"
    ).train()
    assert gate(case["inputs"]).capacity == case.meta["expert_capacity"]


def layer_arguments(case):
    hyper = case.hyper
    return {
        "hidden_dim": hyper["moe_hidden_size"],
        "activation": nn.ReLU,
        "capacity_factor_train": hyper["moe_capacity_factor_train"],
        "capacity_factor_eval": hyper["moe_capacity_factor_eval"],
        "min_expert_capacity": hyper["moe_min_expert_capacity"],
        "second_place_loss": hyper["moe_use_second_place_loss"],
        "loss_coef": hyper["moe_loss_coef"],
        "group_size": hyper["moe_group_size"],
        **list_policies(case),
    }


@pytest.mark.parametrize("name", list_cases("v1"))
def test_one_level_layer(name):
    case = GoldenCase(name)
    dim, e = case["w_gate"].shape
    arguments = layer_arguments(case)
    hidden_dim, activation = arguments.pop("hidden_dim"), arguments.pop("activation")
    if name == "v1_geglu":
        # recorded: wi_0 goes through a tanh-approximated GELU, wi_1 is linear
        experts = GatedExperts(dim, e, hidden_dim, nn.GELU(approximate="tanh"))
        names = {"w1": "wi_0", "w3": "wi_1", "w2": "wo"}
    else:
        experts, names = Experts(dim, e, hidden_dim, activation), {"w1": "wi", "w2": "wo"}
    set_weights(experts, **{ours: case[theirs] for ours, theirs in names.items()})
    moe = MoE(dim, e, experts=experts, **arguments).train(case.mode == "train")
    set_weights(moe, gate__w_gating=case["w_gate"])
    x = case["inputs"].requires_grad_()
    out, aux_loss = moe(x)
    assert_matches(out, case["output"], "output")
    assert_matches(aux_loss, case["loss"], "loss")
    dispatch, combine, balance_loss = moe.gate(case["gate_inputs"][0])
    assert torch.equal(dispatch, case["gate_dispatch"][0])
    assert_matches(combine, case["gate_combine"][0], "combine")
    assert_matches(balance_loss, case["gate_loss"], "loss")
    named = {"inputs": x, "w_gate": moe.gate.w_gating}
    named |= {theirs: experts.get_parameter(ours) for ours, theirs in names.items()}
    check_gradients(case, (out * case["cotangent"]).sum() + aux_loss, named)


@pytest.mark.parametrize("name", list_cases("v2"))
def test_two_level_layer(name, replay_draws):
    case = GoldenCase(name)
    dim, eo = case["w_gate_outer"].shape
    ei = case["w_gate_inner"].shape[-1]
    moe = HeirarchicalMoE(
        dim,
        (eo, ei),
        capacity_factor_second_level=case.hyper["moe_capacity_factor_second_level"],
        **layer_arguments(case),
    ).train(case.mode == "train")
    set_weights(
        moe,
        gate_outer__w_gating=case["w_gate_outer"],
        gate_inner__w_gating=case["w_gate_inner"],
        experts__w1=case.expert_first("wi"),
        experts__w2=case.expert_first("wo"),
    )
    decisions = []
    for gate in (moe.gate_outer, moe.gate_inner):
        gate.register_forward_hook(lambda module, args, routing: decisions.append(routing))
    x = case["inputs"].requires_grad_()
    waiting = replay_draws(case["u0"][0] if "u0" in case else None, case.get("u1"))
    out, aux_loss = moe(x)
    assert not waiting
    for level, routing in zip(("outer", "inner"), decisions, strict=True):
        dispatch, combine, balance_loss = routing
        assert torch.equal(dispatch.view(case[f"{level}_dispatch"].shape), case[f"{level}_dispatch"])
        assert_matches(combine.view(case[f"{level}_combine"].shape), case[f"{level}_combine"], "combine")
        assert_matches(balance_loss, case[f"{level}_loss"], "loss")
    assert_matches(out, case["output"], "output")
    assert_matches(aux_loss, case["loss"], "loss")
    named = {
        "inputs": x,
        "w_gate_outer": moe.gate_outer.w_gating,
        "w_gate_inner": moe.gate_inner.w_gating,
        "wi": moe.experts.w1,
        "wo": moe.experts.w2,
    }
    check_gradients(case, (out * case["cotangent"]).sum() + aux_loss, named)
