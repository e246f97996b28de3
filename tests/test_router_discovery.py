"""Where a model routes: every gate once, whatever is wrapped around it, and errors that name what cannot be served."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from mixture_of_experts import (
    ExpertChoiceGating,
    HeirarchicalMoE,
    MoE,
    ReLUGating,
    Top2Gating,
    TopKGating,
    balance_experts,
    control_sparsity,
    force_routing,
)
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import track_routing
from mixture_of_experts.support import private_torch
from mixture_of_experts.whole_model.router_discovery import find_routers

DIM = 8


class Block(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return x + self.moe(x)[0]


class Identity(nn.Module):
    def forward(self, weight):
        return weight


def make_model(*gates: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(Block(MoE(DIM, gate=gate)) for gate in gates))


def list_names(module: nn.Module) -> list[tuple[str, ...]]:
    return [router.names for router in find_routers(module, "this")]


class HoldingBlock(nn.Module):
    """A wrapper of one's own, which hands no attribute on."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.held_gate = gate

    def forward(self, *args, **kwargs):
        return self.held_gate(*args, **kwargs)


def test_a_wrapper_is_one_entry(monkeypatch: pytest.MonkeyPatch):
    """With its name in `WRAPPER_ATTRIBUTES` all see through it: losses on request, side inputs, replay, bias and
    statistics."""
    monkeypatch.setattr(private_torch, "WRAPPER_ATTRIBUTES", (*private_torch.WRAPPER_ATTRIBUTES, "held_gate"))
    moe = MoE(DIM, gate=TopKGating(DIM, 4, expert_bias=True), loss_coefs={"balance_batch": 0.1})
    x = torch.randn(2, 9, DIM)
    plain = copy.deepcopy(moe)
    moe.gate = HoldingBlock(moe.gate)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    with record_routing(moe, weights=True) as records, track_routing(moe) as stats, balance_experts(moe, optimizer):
        out, aux_loss = moe(x)
        assert torch.equal(out, plain(x)[0])
        assert torch.equal(aux_loss, plain(x)[1])
        (out.sum() + aux_loss).backward()
        optimizer.step()
    assert moe.gate.held_gate.expert_bias.any()
    assert stats.last("gate").tokens == 18
    given = torch.stack([choices.view(9, 2) for choices in records["gate"]]).to(torch.int64)
    with replay_routing(moe, records):
        assert torch.equal(moe(x)[0], out)
    assert torch.equal(moe(x, given_experts=given)[0], out)


def test_layers_levels_and_gates_alone():
    both = nn.ModuleDict({"two": HeirarchicalMoE(DIM, (2, 3)), "one": MoE(DIM, 4), "alone": Top2Gating(DIM, 4)})
    outer, inner, one, alone = find_routers(both, "this")
    assert list_names(both) == [("two.gate_outer",), ("two.gate_inner",), ("one.gate",), ("alone",)]
    assert (inner.level_one, inner.outer_expert_dims, inner.num_experts, inner.k) == (outer, (2,), 3, 2)
    assert one.locations[0].layer is both["one"]
    assert (alone.locations[0].layer, alone.is_external, alone.expert_bias) == (None, False, None)
    assert list_names(TopKGating(DIM, 4)) == [("gate",)]
    assert find_routers(TopKGating(DIM, 4, expert_bias=True), "this")[0].expert_bias is not None


WRAPPERS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "twice": lambda module: checkpoint_wrapper(torch.compile(module, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through(wrapper):
    """Hooks go to the outermost wrapper, settings to the gate; paths are those of the plain model."""
    plain = make_model(TopKGating(DIM, 4), TopKGating(DIM, 4))
    gate, block = plain[0].moe.gate, plain[1]
    plain[0].moe.gate = WRAPPERS[wrapper](gate)
    plain[1] = WRAPPERS[wrapper](block)
    whole = WRAPPERS[wrapper](plain)
    first, second = find_routers(whole, "this")
    assert (first.gate, first.hook_target, first.name) == (gate, plain[0].moe.gate, "0.moe.gate")
    assert (second.gate, second.name) == (block.moe.gate, "1.moe.gate")
    for chosen in (["0.moe.gate"], "0.moe.gate", [gate], first.hook_target, plain[0].moe):
        assert [router.gate for router in find_routers(whole, "this", chosen)] == [gate]


def test_parametrizations_change_no_class():
    gates = make_model(TopKGating(DIM, 4))
    parametrize.register_parametrization(gates[0].moe.gate, "w_gating", Identity())
    (router,) = find_routers(gates, "this")
    assert (router.name, router.class_name) == ("0.moe.gate", "TopKGating")


def test_attribute_named_like_wrapper_is_no_wrapper():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.module = MoE(DIM, 4), MoE(DIM, 4)

    assert list_names(Own()) == [("base_layer.gate",), ("module.gate",)]


def test_one_gate_in_two_layers_has_two_names():
    gate = TopKGating(DIM, 4)
    both = make_model(gate, TopKGating(DIM, 4), gate)
    assert list_names(both) == [("0.moe.gate", "2.moe.gate"), ("1.moe.gate",)]
    x = torch.randn(2, 3, DIM)
    with record_routing(both) as records:
        out = both(x)
    assert records.layers == ("0.moe.gate", "1.moe.gate", "2.moe.gate")
    other = records.select([1, 0])
    with replay_routing(both, other), record_routing(both) as again:
        replayed = both(x)
    assert all(a.equal(b) for layer in other for a, b in zip(other[layer], again[layer], strict=True))
    assert not torch.allclose(out, replayed)
    with track_routing(both) as stats:
        both(x)
    assert (stats.last("0.moe.gate").forwards, stats.last("1.moe.gate").forwards) == (2, 1)


def test_a_layer_at_two_paths_has_one_record():
    block = Block(MoE(DIM, gate=TopKGating(DIM, 4)))
    two = nn.ModuleList([block, block])
    with record_routing(two) as records:
        pass
    assert records.layers == ("0.moe.gate",)


# What cannot be served


def test_unforceable_gates_raise_and_change_nothing():
    gates = make_model(TopKGating(DIM, 4), ExpertChoiceGating(DIM, 4))
    message = (
        r"force_routing does not support '1\.moe\.gate' \(ExpertChoiceGating\): its tokens make no choices\. "
        r"To select only the other gates, pass gates=\['0\.moe\.gate'\]"
    )
    with pytest.raises(TypeError, match=message), force_routing(gates):
        pass
    assert gates[0].moe.gate.forced is None
    with force_routing(gates, gates=["0.moe.gate"]):
        assert gates[0].moe.gate.forced == "balanced"
    with pytest.raises(ValueError, match=r"contains 'gate', .*its gates are '0\.moe\.gate', "):
        force_routing(gates, gates=["gate"]).__enter__()
    with pytest.raises(ValueError, match=r"contains this Linear, which is not a gate"):
        force_routing(gates, gates=[nn.Linear(1, 1)]).__enter__()
    with pytest.raises(ValueError, match=r"`gates` argument of force_routing is empty"):
        force_routing(gates, gates=[]).__enter__()


def test_tracks_selected_gates():
    gates, x = make_model(TopKGating(DIM, 4), ExpertChoiceGating(DIM, 4)), torch.randn(1, 3, DIM)
    with track_routing(gates, gates=[gates[1].moe]) as stats, record_routing(gates, gates="0.moe.gate") as records:
        out = gates(x)
    assert (stats.layers, records.layers) == (("1.moe.gate",), ("0.moe.gate",))
    with replay_routing(gates, records, gates=[gates[0].moe.gate]):
        torch.testing.assert_close(gates(x), out)
    two = HeirarchicalMoE(DIM, (2, 2))
    with track_routing(two, gates=[two.gate_inner]) as stats:
        two(x)
    assert stats.layers == ("gate_inner",)


def test_balances_selected_gates():
    biased, plain, relu = (
        TopKGating(DIM, 4, expert_bias=True),
        TopKGating(DIM, 4),
        ReLUGating(DIM, 4, 2, mean_choices=1),
    )
    other = TopKGating(DIM, 4, expert_bias=True)
    whole = make_model(biased, plain, relu, other)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
    with balance_experts(whole, optimizer) as balancing:
        assert balancing.gates == ("0.moe.gate", "3.moe.gate")
    with (
        balance_experts(whole, optimizer, gates=[whole[3].moe], rate=1.0),
        control_sparsity(whole, optimizer) as control,
    ):
        assert control.gates == ("2.moe.gate",)
        whole(torch.randn(2, 7, DIM)).sum().backward()
        optimizer.step()
    assert relu.l1_coef != 1e-8
    assert other.expert_bias.any()
    assert not biased.expert_bias.any()
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(TypeError, match=r"'1\.moe\.gate' \(TopKGating\): it has no expert bias"):
        balance_experts(whole, optimizer, gates=["0.moe.gate", "1.moe.gate"])
    with pytest.raises(TypeError, match=r"'0\.moe\.gate' .*: it is not a ReLUGating"):
        control_sparsity(whole, optimizer, gates=[biased])
    assert not optimizer._optimizer_step_post_hooks
