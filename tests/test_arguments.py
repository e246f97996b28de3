"""What constructors are given, and what may be set afterwards."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HashGating,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    ReLUGating,
    Top2Gating,
    TopKGating,
)
from mixture_of_experts.gating import RouterLogits, SparseMixerGating
from mixture_of_experts.gating.top2 import TOP2_SETTINGS
from mixture_of_experts.support.checked_module import checked_setting
from mixture_of_experts.support.checks import check_number

GATES = {
    "Top2Gating": partial(Top2Gating, 400, 4),
    "TopKGating": partial(TopKGating, 400, 4, bias=True, expert_bias=True),
    "NoisyTopKGating": partial(NoisyTopKGating, 400, 4, outer_expert_dims=(2,)),
    "ExpertChoiceGating": partial(ExpertChoiceGating, 400, 4),
    "SparseMixerGating": partial(SparseMixerGating, 400, 4),
    "HashGating": partial(HashGating, 400, 4, num_ids=5),
    "ReLUGating": partial(ReLUGating, 400, 4, 2, mean_choices=1),
}
MODULES = {
    **GATES,
    "RouterLogits": partial(RouterLogits, 400, 4, bias=True, norm_eps=1e-6),
    "MoE": partial(MoE, 8, 4),
    "HeirarchicalMoE": partial(HeirarchicalMoE, 8, (2, 2)),
}


@pytest.mark.parametrize("kind", [MoE, HeirarchicalMoE, Top2Gating])
def test_gating_settings_have_the_same_defaults_everywhere(kind):
    parameters = inspect.signature(kind.__init__).parameters
    assert {name: parameters[name].default for name in TOP2_SETTINGS} == TOP2_SETTINGS
    assert TOP2_SETTINGS.keys() == TOP2.keys()


@pytest.mark.parametrize("kind", MODULES)
def test_device_and_dtype(kind):
    """The same module as one that is moved and cast; the bias on the scores stays float32, and the weights of gates are
    so drawn that logits of normal tokens are normal."""
    made, moved = MODULES[kind](device="meta", dtype=torch.float64), MODULES[kind]().to("meta", torch.float64)
    for (name, ours), (other, expected) in zip(made.state_dict().items(), moved.state_dict().items(), strict=True):
        assert (name, ours.shape, ours.dtype, ours.device) == (other, expected.shape, expected.dtype, expected.device)
    assert all(parameter.dtype == torch.float64 for parameter in made.parameters())
    torch.manual_seed(0)
    made = MODULES[kind](dtype=torch.float64).state_dict()
    assert all(value.device.type == "cpu" for value in made.values())
    if kind not in ("NoisyTopKGating", "MoE", "HeirarchicalMoE"):
        std = made["weight" if kind == "RouterLogits" else "w_gating"].std()
        assert std.item() == pytest.approx(400**-0.5, rel=0.1)


TOP2 = dict(second_policy_train="all", second_policy_eval="none", second_threshold_train=0.3, second_place_loss=True)
TOP2 |= dict(second_threshold_eval=0.4, capacity_factor_train=0.7, capacity_factor_eval=None, min_expert_capacity=2)
TOP2 |= dict(priority="token")


@pytest.mark.parametrize("of_level_two", [None, 1.5])
def test_gating_settings_come_to_the_gates(of_level_two):
    """All of them; level two may have a capacity of its own."""
    moe = HeirarchicalMoE(8, (2, 3), capacity_factor_second_level=of_level_two, **TOP2)
    wanted = {name: TOP2[name] for name in TOP2_SETTINGS}
    for gate in (MoE(8, 4, **TOP2).gate, moe.gate_outer, moe.gate_inner):
        if gate is moe.gate_inner and of_level_two is not None:
            wanted |= dict(capacity_factor_train=of_level_two, capacity_factor_eval=of_level_two)
        assert {name: getattr(gate, name) for name in wanted} == wanted


# ---- one gate of two ----


def inner_gate(**settings) -> TopKGating:
    return TopKGating(8, 2, k=1, outer_expert_dims=(2,), **settings)


def test_default_gate_follows_arguments():
    moe = HeirarchicalMoE(8, (2, 2), gate_inner=inner_gate(), capacity_factor_train=3.0, priority="token")
    assert (moe.gate_outer.capacity_factor_train, moe.gate_outer.priority) == (3.0, "token")
    assert (moe.gate_inner.capacity_factor_train, moe.gate_inner.priority) == (None, "choice")  # dropless: no matter


@pytest.mark.parametrize("name", ["gate_outer", "gate_inner"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_rejects_different_priorities(name, mode):
    settings = {f"capacity_factor_{mode}": 0.5}
    gate = TopKGating(8, 2, **settings) if name == "gate_outer" else inner_gate(**settings)
    with pytest.raises(ValueError, match=rf"priority='token', but {name} has priority='choice'"):
        HeirarchicalMoE(8, (2, 2), **{name: gate}, priority="token")
    gate.priority = "token"
    assert HeirarchicalMoE(8, (2, 2), **{name: gate}, priority="token").gate_inner.priority == "token"


# ---- values ----


def test_numpy_scalars_are_numbers():
    gate = TopKGating(np.int64(8), np.int32(4), np.int8(2), scale=np.float32(0.5), bias=np.bool_(True))
    assert (type(gate.num_experts), type(gate.scale), gate.scale) == (int, float, 0.5)
    more = dict(capacity_factor_train=np.float32(1.5), loss_coef=np.float64(0.25), group_size=np.int16(3))
    moe = MoE(np.int64(8), np.int64(4), **more)
    assert (moe.gate.capacity_factor_train, moe.loss_coef, type(moe.loss_coef)) == (1.5, 0.25, float)
    assert moe(torch.randn(1, 6, 8))[0].shape == (1, 6, 8)


def test_one_outer_dimension():
    assert Top2Gating(8, 4, outer_expert_dims=3).w_gating.shape == (3, 8, 4)
    assert TopKGating(8, 4, outer_expert_dims=[3, 2]).w_gating.shape == (3, 2, 8, 4)


@pytest.mark.parametrize("kind", GATES)
def test_a_process_group_is_one(kind):
    with pytest.raises(TypeError, match=r"process_group must be a .*ProcessGroup.*got 'world'.*get_group"):
        GATES[kind](process_group="world")
    gate = GATES[kind]()
    with pytest.raises(TypeError, match="process_group"):
        gate.process_group = 3
    assert gate.process_group is None


def test_the_capacity_factor_of_the_mode():
    gate = TopKGating(8, 4, capacity_factor_train=1.5)
    assert (gate.capacity_factor, gate.eval().capacity_factor) == (1.5, None)


def test_pickled_process_group_is_restored_or_reported(tmp_path):
    """In the same job it is the same one, without process groups None, and in another job a warning says so."""

    @contextmanager
    def job(name: str) -> Iterator[None]:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/{name}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()

    with job("one"):
        group = dist.new_group([0])
        written = pickle.dumps(TopKGating(8, 4, process_group=group))
        assert pickle.loads(written).process_group is group
    assert pickle.loads(written).process_group is None
    with job("another"), pytest.warns(UserWarning, match=r"group of ranks \[0\], which does not exist"):
        assert pickle.loads(written).process_group is None


@pytest.mark.parametrize(
    ("build", "name", "value", "message"),
    [
        (lambda: MoE(8, 4), "loss_coef", -1.0, "loss_coef.*-1.0"),
        (lambda: Top2Gating(8, 4), "priority", "tokne", "'choice', 'token', 'score'.*'tokne'"),
        (lambda: Top2Gating(8, 4), "eps", 0.0, "eps.*0.0"),
        (lambda: TopKGating(8, 4), "score", "tanh", "'softmax', 'sigmoid'.*'tanh'"),
        (lambda: TopKGating(8, 4), "jitter", -0.1, "jitter.*-0.1"),
        (lambda: TopKGating(8, 4), "balance_over", "all", "'group', 'batch'.*'all'"),
    ],
)
def test_assigned_settings_are_checked(build, name, value, message):
    module = build()
    before = getattr(module, name)
    with pytest.raises(ValueError, match=message):
        setattr(module, name, value)
    assert getattr(module, name) == before
    setattr(module, name, before)


# ---- weights and parts replaced by hand ----


@pytest.mark.parametrize("change", [lambda w: w[..., :2], lambda w: torch.cat([w, w], dim=-1)], ids=["prune", "grow"])
@pytest.mark.parametrize("kind", GATES)
def test_a_router_keeps_its_shape(kind, change):
    gate = GATES[kind]()
    before = gate.w_gating
    with pytest.raises(ValueError, match=r"w_gating of \w+ must keep its shape .*construct a new"):
        gate.w_gating = nn.Parameter(change(gate.w_gating.detach()))
    assert gate.w_gating is before
    gate.w_gating = nn.Parameter(torch.ones_like(before))
    assert (gate.w_gating == 1).all()


@pytest.mark.parametrize("kind", [MoE, HeirarchicalMoE])
def test_a_shared_expert_is_checked_whenever_it_is_set(kind):
    for shared in (None, nn.Linear(8, 8)):
        moe = kind(8, shared_expert=shared)
        for wrong in (nn.Linear, nn.ModuleList([nn.Linear(8, 8)]), "linear"):
            with pytest.raises(TypeError, match=r"shared_expert must be a module .*Instantiate the class"):
                moe.shared_expert = wrong
            assert moe.shared_expert is shared
        moe.shared_expert = nn.Identity()
        moe.shared_expert = None
        assert moe(torch.randn(2, 5, 8))[0].shape == (2, 5, 8)


@pytest.mark.parametrize("kind", [MoE, HeirarchicalMoE])
def test_rejects_parts_of_other_size(kind):
    two = kind is HeirarchicalMoE
    moe = kind(8, (2, 4) if two else 4)
    name = "gate_inner" if two else "gate"
    outer = (2,) if two else ()
    before = getattr(moe, name)
    with pytest.raises(ValueError, match=rf"{name} has num_experts=3, but the layer has num_experts=4"):
        setattr(moe, name, TopKGating(8, 3, outer_expert_dims=outer))
    with pytest.raises(ValueError, match=r"experts have num_experts="):
        moe.experts = Experts(8, (2, 3) if two else 3)
    assert getattr(moe, name) is before
    gate, experts = TopKGating(8, 4, outer_expert_dims=outer), Experts(8, (2, 4) if two else 4, hidden_dim=5)
    setattr(moe, name, gate)
    moe.experts = experts
    assert (getattr(moe, name), moe.experts) == (gate, experts)
    assert moe(torch.randn(1, 6, 8))[0].shape == (1, 6, 8)


@pytest.mark.parametrize("kind", [Experts, GatedExperts])
def test_stacked_experts_keep_their_shape(kind):
    experts = kind(8, 4, hidden_dim=5, bias=True)
    for name, parameter in list(experts.named_parameters()):
        with pytest.raises(ValueError, match=rf"{name} of {kind.__name__} must keep its shape .*construct a new"):
            setattr(experts, name, nn.Parameter(parameter.detach()[:2]))
        setattr(experts, name, nn.Parameter(parameter.detach() * 2))
    assert experts(torch.randn(4, 3, 8)).shape == (4, 3, 8)


@pytest.mark.parametrize("value", [nn.GELU(), nn.Parameter(torch.ones(()))], ids=["module", "parameter"])
def test_a_module_or_a_parameter_is_no_setting(value):
    moe = MoE(8, 2)
    for owner, name in ((moe.gate, "priority"), (moe.gate, "capacity_factor_train"), (moe, "loss_coef")):
        before = getattr(owner, name)
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(owner, name, value)
        assert getattr(owner, name) == before
        assert name not in owner._modules.keys() | owner._parameters.keys()


def test_unset_setting_is_no_attribute():
    gate = object.__new__(TopKGating)
    nn.Module.__init__(gate)
    with pytest.raises(AttributeError, match="jitter"):
        _ = gate.jitter


def test_settings_are_inherited_and_may_be_redefined():
    class Hot(TopKGating):
        temperature: float = checked_setting(check_number, above=0.0)

        def __init__(self, *args, temperature=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.temperature = temperature

    gate = Hot(8, 4, temperature=2)
    for name, value in (("temperature", 0.0), ("jitter", -1.0), ("priority", "none")):
        with pytest.raises(ValueError, match=name):
            setattr(gate, name, value)
    assert not hasattr(TopKGating(8, 4), "temperature")


@pytest.mark.parametrize("name", ["dim", "num_experts", "num_experts_outer", "num_experts_inner"])
def test_sizes_do_not_change(name):
    moe, levels = MoE(8, 2), HeirarchicalMoE(8, (2, 4))
    for module in (levels,) if "_experts_" in name else (moe, moe.gate, moe.experts, levels):
        before = getattr(module, name)
        with pytest.raises(ValueError, match=rf"cannot change {name} of .* to 9, because"):
            setattr(module, name, 9)
        assert getattr(module, name) == before
        setattr(module, name, before)


@pytest.mark.parametrize("tokens", ["cpu", "meta"])
@pytest.mark.parametrize("part", ["gate", "experts", "both"])
@pytest.mark.parametrize("kind", ["list", "stack", "hierarchy"])
def test_tokens_and_weights_on_other_devices(kind, part, tokens):
    """Torch lets the meta device mix with others: it raises words of its own, or computes nothing."""
    weights = "cpu" if tokens == "meta" else "meta"
    if kind == "hierarchy":
        moe: Any = HeirarchicalMoE(16)
    else:
        moe = MoE(16, 4, experts=[nn.Linear(16, 16) for _ in range(4)] if kind == "list" else None)
    moe.to_empty(device=tokens).reset_parameters()
    for name, module in moe.named_children():
        if part == "both" or name.startswith(part):
            module.to_empty(device=weights)
    named = "the experts' weights|expert 0 .Linear." if part == "experts" else "the router's weights"
    with pytest.raises(ValueError, match=rf"({named}) must be on .* tokens \({tokens}\), got {weights}; move one"):
        moe(torch.randn(2, 5, 16, device=tokens))
    moe.to_empty(device=tokens).reset_parameters()
    assert moe(torch.randn(2, 5, 16, device=tokens))[0].device.type == tokens
