"""Routers whose state passes from layer to layer, against their equations written out, layer after layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.record_helpers import assert_records_equal, record_forward
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional

from mixture_of_experts import (
    Choices,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    OutputOnly,
    TokenChoiceGate,
    TopKGating,
    collect_aux,
)
from mixture_of_experts.gating import DepthAveragedGating
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import track_routing

DIM, E, R = 6, 5, 7


def make_layers(number: int = 3, group_size: int | None = None, **settings: Any) -> list[Any]:
    """Layers in float64, with scales and biases that matter."""
    torch.manual_seed(0)
    made: list[Any] = []
    for i in range(number):
        gate = DepthAveragedGating(DIM, E, state_dim=R, first=i == 0, **settings)
        moe = MoE(DIM, gate=gate, experts=GatedExperts(DIM, E, 4), group_size=group_size, z_loss_coef=0.1)
        made.append(moe.double())
        for name, parameter in moe.named_parameters():
            if "scale" in name or "logits" in name:
                parameter.data += 0.5 * torch.randn_like(parameter)
        if gate.expert_bias is not None:
            nn.init.normal_(gate.expert_bias, std=0.1)
    return made


def run_stack(stack: Any, x: Tensor, mask: Tensor | None = None, **side: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The outputs of a residual stack, the sum of its losses, and all states."""
    state, total, states = None, x.new_zeros(()), []
    for moe in stack:
        out, aux_loss, state = moe(x, mask, router_state=state, **side)
        x, total, states = x + out, total + aux_loss, [*states, state]
    return x, total, states


def run_reference(stack: Any, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same by the equations, without this package's gates; one expert a token."""
    state, total, states = None, x.new_zeros(()), []
    for moe in stack:
        gate, experts = moe.gate, moe.experts
        norm, one, _, two, _, last = gate.logits
        r = x @ gate.down.weight.T + gate.down.bias
        state = r if state is None else r + gate.state_scale * state
        normed = state * (state.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
        hidden = functional.gelu(normed @ one.weight.T + one.bias)
        hidden = functional.gelu(hidden @ two.weight.T + two.bias)
        logits = hidden @ last.weight.T
        probs = logits.softmax(-1)
        expert = (probs if gate.expert_bias is None else probs + gate.expert_bias).argmax(-1)
        out = torch.zeros_like(x)
        for e in range(E):
            y = functional.silu(x @ experts.w1[e]) * (x @ experts.w3[e]) @ experts.w2[e]
            out = out + torch.where(expert == e, probs[..., e], 0.0).unsqueeze(-1) * y
        load = functional.one_hot(expert, E).double().mean(-2)
        balance = E * (load * probs.mean(-2)).sum(-1).mean()
        total = total + 1e-2 * balance + 0.1 * logits.logsumexp(-1).square().mean()
        x, states = x + out, [*states, state]
    return x, total, states


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 0), (0, 4)])
@pytest.mark.parametrize("expert_bias", [False, True])
def test_the_equations(expert_bias, shape):
    """Outputs, losses and states; and the gradients of tokens and of all weights, the states' way through included."""
    stack = make_layers(expert_bias=expert_bias)
    x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
    weights = [x, *(p for moe in stack for p in moe.parameters())]
    results = []
    for function in (run_stack, run_reference):
        out, total, states = function(stack, x)
        if not x.numel():
            total = total.new_zeros(())  # of nothing a mean by hand is NaN
        loss = out.square().sum() + total + states[-1].sin().sum()
        grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        results.append([out, total, *states, *grads])
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)
    assert all(grad.any() for grad in results[0][5:]) or x[..., 0].numel() < 2


def test_setting_changes_the_result():
    """A layer chooses otherwise without the state of the one before."""
    stack, x = make_layers(2), torch.randn(4, 50, DIM, dtype=torch.float64)
    state = stack[0](x, router_state=None)[2]
    experts = [stack[1].gate(x, router_state=its).expert for its in (state, torch.zeros_like(state))]
    assert 0.1 < (experts[0] != experts[1]).double().mean() < 0.9


@pytest.mark.parametrize("name", ["mask", "counted"])
def test_padding_does_not_change_router_state(name):
    stack, x = make_layers(), torch.randn(2, 9, DIM, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    padded = torch.where(mask.unsqueeze(-1), x, torch.nan if name == "mask" else 1e3)
    out, _, states = run_stack(stack, padded, **{name: mask})
    short, _, alone = run_stack(stack, x[1:, :4])
    torch.testing.assert_close(out[1:, :4], short)
    for state, own in zip(states, alone, strict=True):
        torch.testing.assert_close(state[1:, :4], own)


def test_groups_and_leading_dimensions():
    """A state has the inputs' leading dimensions, and goes with its tokens, however these are grouped."""
    x = torch.randn(2, 3, 4, DIM, dtype=torch.float64)
    wanted, found = (run_stack(make_layers(group_size=size), x) for size in (None, 6))
    assert [tuple(state.shape) for state in found[2]] == [(2, 3, 4, R)] * 3
    torch.testing.assert_close([found[0], *found[2]], [wanted[0], *wanted[2]])
    torch.testing.assert_close(run_stack(make_layers(), x[0, 0])[2][2], wanted[2][2][0, 0])


def test_rejects_bad_arguments():
    first, second = make_layers(2)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    state = first(x, router_state=None)[2]
    with pytest.raises(TypeError, match=r"requires .* 'router_state'; call the layer as moe\(x, router_st"):
        second(x, router_state=None)
    with pytest.raises(ValueError, match=r"must be None in the first layer; .* with first=False"):
        first(x, router_state=state)
    with pytest.raises(ValueError, match=r"router_state must have shape \(2, 9, 7\), got \(2, 9, 1\)"):
        second(x, router_state=state[..., :1])
    with pytest.raises(ValueError, match=r"router_state must have shape \(2, 9, 7\), got \(1, 9, 7\)"):
        second.gate(x, router_state=state[:1])
    with pytest.raises(ValueError, match=r"router_state must have shape \(2, 9, \.\.\.\), with one entry per token"):
        second(x, router_state=state[:1])
    with pytest.raises(TypeError, match=r"router_state must be floating point, got torch\.int64"):
        second(x, router_state=state.long())
    with pytest.raises(TypeError, match="does not support the side input 'router_state'"):
        MoE(DIM, num_experts=2)(x.float(), router_state=None)
    with pytest.raises(ValueError, match="does not support outer_expert_dims or a second level"):
        DepthAveragedGating(DIM, E, outer_expert_dims=(2,))
    with pytest.raises(ValueError, match="first must be True or False, got 1"):
        DepthAveragedGating(DIM, E, first=1)
    with pytest.raises(ValueError, match="first of DepthAveragedGating is True and cannot become False"):
        first.gate.first = False


def test_second_level_receives_router_state():
    first, second = (
        HeirarchicalMoE(
            DIM,
            gate_outer=DepthAveragedGating(DIM, 2, state_dim=R, first=first),
            gate_inner=TopKGating(DIM, 3, outer_expert_dims=(2,)),
        )
        for first in (True, False)
    )
    x = torch.randn(2, 9, DIM)
    out, _, state = first(x, router_state=None)
    x = x + out
    _, _, last = second(x, router_state=state)
    torch.testing.assert_close(last, second.gate_outer.down(x) + second.gate_outer.state_scale * state)


def test_layer_keeps_no_call_state():
    """Copies and pickles of layers that ran are whole, and a layer that ran has what it had."""
    stack, x = make_layers(expert_bias=True), torch.randn(2, 9, DIM, dtype=torch.float64)
    before = [{path: sorted(vars(module)) for path, module in moe.named_modules()} for moe in stack]
    wanted = run_stack(stack, x)
    assert [{path: sorted(vars(module)) for path, module in moe.named_modules()} for moe in stack] == before
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert all(map(torch.equal, run_stack(other, x)[2], wanted[2]))
    for moe, other in zip(stack, make_layers(expert_bias=True), strict=True):
        other.reset_parameters()
        assert other.gate.state_scale is None or other.gate.state_scale.eq(1).all()
        other.load_state_dict(moe.state_dict())
        assert not other.gate.logits[1].weight.equal(make_layers()[0].gate.logits[1].weight) or moe is stack[0]


def test_checkpointing_of_each_layer():
    stack, x = make_layers(expert_bias=True), torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    weights, grads = [x, *stack[1].parameters(), *stack[0].gate.parameters()], []
    for times, called in enumerate((stack, [checkpoint_wrapper(moe) for moe in stack]), start=1):
        grads.append(torch.autograd.grad(run_stack(called, x)[0].square().sum(), weights))
        assert stack[2].gate.expert_counts.sum() == 18 * times
    assert all(map(torch.equal, *grads))


class Stack(nn.Module):
    def __init__(self, number: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_layers(number))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return run_stack(self.layers, x)


def test_records_replays_statistics_and_losses():
    """Replayed choices do not touch states, and losses are collected as ever. Who gives no state gets none."""
    model, x = Stack().train(), torch.randn(2, 9, DIM, dtype=torch.float64)
    with record_routing(model) as records, track_routing(model) as stats, collect_aux(model) as aux:
        _, total, states = model(x)
        torch.testing.assert_close(aux.take(), total)
    assert list(stats.layers) == [f"layers.{i}.gate" for i in range(3)]
    assert all(stats.last(layer).tokens == 18 for layer in stats.layers)
    other = copy.deepcopy(model)
    for layer in other.layers:
        layer.gate.logits[-1].weight.data.normal_()
    with replay_routing(model, records):
        assert all(map(torch.equal, model(x)[2], states))
    with replay_routing(other, records):
        assert_records_equal(record_forward(other, x), records)
    first = model.layers[0]
    out, _ = first(x)
    assert torch.equal(OutputOnly(first)(x), out)


def test_custom_gate_has_state():
    """One that counts, for each token, how often it went to expert 0; of any shape, here `(..., n)`."""

    class Counting(TokenChoiceGate):
        side_inputs = (*TokenChoiceGate.side_inputs, "router_state")

        def __init__(self) -> None:
            super().__init__(DIM, 2, k=1)
            self.w_gating = nn.Parameter(torch.randn(DIM, 2))

        def decide(self, tokens):
            probs = self.product(tokens.x, self.w_gating).softmax(-1)
            weight, expert = probs.max(dim=-1, keepdim=True)
            before = tokens.side.get("router_state", 0)
            return Choices(expert, weight, probs, {}, state=before + (expert == 0).squeeze(-1))

    moe, x, state = MoE(DIM, gate=Counting()), torch.randn(2, 3, 4, DIM), None
    for number in range(3):
        _, _, state = moe(x, router_state=state)
        assert state is not None
        assert state.shape == (2, 3, 4)
        assert set(state.unique().tolist()) == {0, number + 1}


@pytest.mark.slow
def test_one_graph_and_an_exported_program():
    model, x = Stack(2), torch.randn(2, 9, DIM, dtype=torch.float64)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)


def test_bfloat16_and_autocast():
    """A state is float32, also under autocast; the results are those of the same numbers in float64."""
    gate, x = DepthAveragedGating(DIM, E, state_dim=R), torch.randn(2, 9, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    assert routing.state is not None
    torch.testing.assert_close(routing.state, gate(x).state, atol=0, rtol=0)
    second = DepthAveragedGating(DIM, E, state_dim=R, first=False)
    low, x = nn.ModuleList([gate, second]).to(torch.bfloat16), x.to(torch.bfloat16)
    found = low[1](x, router_state=low[0](x).state)
    assert found.state.dtype == found.probs.dtype == torch.float32
    wanted = low.double()[1](x.double(), router_state=low[0](x.double()).state)
    torch.testing.assert_close(found.state.double(), wanted.state, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.probs.double(), wanted.probs, atol=1e-6, rtol=1e-5)
