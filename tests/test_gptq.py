"""GPTQ of `examples/gptq.py`: calibrated 4-bit weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts import Experts, GatedExperts, MoE, OutputOnly, TopKGating
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from gptq import gptq, moments

D, H, E = 64, 96, 4


def make_model() -> Any:
    torch.manual_seed(0)
    experts = (GatedExperts(D, E, H), Experts(D, E, H, bias=True))
    layers = [OutputOnly(MoE(D, gate=TopKGating(D, E), experts=each)) for each in experts]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def make_texts(*shape: int) -> Tensor:
    """Neighbouring inputs have much in common."""
    return torch.randn(*shape, D).cumsum(dim=-1) / 8


def round_with_lowest_error(weight: Tensor, moment: Tensor, step: Tensor, zero: Tensor, damping: float) -> Tensor:
    """The levels, by the definition: after each input those that are left move to where the outputs err least."""
    n, group, q = weight.shape
    left = moment.diagonal().argsort(descending=True).tolist()
    numbers, moment = weight.flatten(0, 1).double(), moment.double()
    moment = moment + damping * moment.diagonal().mean() * torch.eye(n * group)
    levels = torch.empty_like(numbers)
    while left:
        i, (by, start) = left[0], (of[left[0] // group, 0].double() for of in (step, zero))
        levels[i] = ((numbers[i] - start) / by).round().clamp(-8, 7)
        inverse = moment[left][:, left].inverse()
        numbers[left] -= inverse[:, :1] / inverse[0, 0] * (numbers[i] - levels[i] * by - start)
        left = left[1:]
    return (levels + 8).view(n, group, q)


@pytest.mark.parametrize("tokens", [20, 1000])  # fewer than inputs, so that only damping makes XᵀX regular
@pytest.mark.parametrize("group", [32, 64, 128])
def test_choices_equal_the_definition(group, tokens):
    torch.manual_seed(group)
    weight = torch.randn(2, group, 9)
    weight[1, :, 3] = 0.37  # all numbers of a group are one
    x = torch.randn(tokens, 2 * group).cumsum(dim=-1)
    x[:, 5] = 0  # an input that is never there
    moment = x.mT @ x
    levels, step, zero = gptq({("layer.experts", "w1", 2): moment})("layer.experts.w3", 2, weight.clone())
    assert step.equal(step.bfloat16().float())
    assert zero.equal(zero.bfloat16().float())
    assert levels.equal(round_with_lowest_error(weight, moment, step, zero, 0.01).float())
    assert not levels.equal(((weight - zero) / step + 8).round().clamp(0, 15))

    def error(levels: Tensor) -> Tensor:
        return (x @ ((levels - 8) * step + zero - weight).flatten(0, 1)).norm()

    assert error(levels) < 0.6 * error(((weight - zero) / step + 8).round().clamp(0, 15))


@torch.no_grad()
def test_moments_are_those_of_an_experts_own_tokens():
    whole, batches = make_model(), [make_texts(2, 7), make_texts(3, 5)]
    before = copy.deepcopy(whole.state_dict())
    found = moments(whole, batches)
    x = torch.cat([batch.flatten(0, 1) for batch in batches])
    for layer, module in enumerate(whole):
        routing = module.moe.gate(x.unsqueeze(0))
        experts: Any = module.moe.experts
        for i in range(E):
            own = x[routing.token[0, routing.expert[0] == i]]
            hidden = own @ experts.w1[i] + (experts.b1[i] if experts.b1 is not None else 0)
            hidden = experts.act(hidden) * (own @ experts.w3[i] if experts.gated else 1)
            for key, read in (("w1", own), ("w2", hidden)):
                torch.testing.assert_close(found.pop((f"{layer}.moe.experts", key, i)), read.mT @ read)
        x = module(x.unsqueeze(0))[0]
    assert not found
    with pytest.raises(ValueError, match="inputs must have shape"):
        moments(whole, [torch.randn(2, 7, D + 1)])
    state = whole.state_dict()
    assert state.keys() == before.keys()
    assert all(value.equal(before[key]) for key, value in state.items())


@torch.no_grad()
def test_experts_without_tokens_get_the_nearest_numbers():
    whole, nearest = make_model(), quantize_experts(make_model(), 4, group=32)
    found = moments(whole, [make_texts(4, 50)])
    for layer, key in ((0, "w1"), (0, "w2"), (1, "w1")):
        found.pop((f"{layer}.moe.experts", key, 2))
    found["1.moe.experts", "w2", 2].zero_()
    with pytest.raises(ValueError, match=r"moe\.experts has no moments: give quantize_experts the model, or the part"):
        quantize_experts(whole[0], 4, group=32, rounding=gptq(found))
    quantize_experts(whole, 4, group=32, rounding=gptq(found))
    for layer, other in zip(whole, nearest, strict=True):
        buffers, plain = (dict(each.moe.experts.named_buffers()) for each in (layer, other))
        for name in (name for name in buffers if name.endswith("packed")):
            assert [one.equal(same) for one, same in zip(buffers[name], plain[name], strict=True)] == [
                expert == 2 for expert in range(E)
            ]


@torch.no_grad()
def test_a_layer_after_another():
    """Each reads what the rounded ones before it compute; outputs of other text err less than with the nearest."""
    batches, other = [make_texts(8, 50) for _ in range(4)], make_texts(4, 50)
    whole, wanted = make_model(), make_model()(other)
    for i, layer in enumerate(whole):
        found = moments(whole, batches, layer)
        assert {stack for stack, *_ in found} == {"moe.experts"}
        read = whole[:i](torch.cat(batches)).flatten(0, 1)
        total = torch.stack([moment for (_, key, _), moment in found.items() if key == "w1"]).sum(dim=0)
        torch.testing.assert_close(total, 2 * read.mT @ read, rtol=1e-4, atol=1e-3)  # of two experts each
        quantize_experts(layer, 4, group=32, rounding=gptq(found))
    assert all(isinstance(layer.moe.experts, QuantizedExperts) for layer in whole)
    nearest = quantize_experts(make_model(), 4, group=32)
    assert (whole(other) - wanted).norm() < 0.6 * (nearest(other) - wanted).norm()
