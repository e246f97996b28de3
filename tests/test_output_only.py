"""A layer that returns its output alone, in places that take one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mixture_of_experts import HashGating, HeirarchicalMoE, MoE, OutputOnly, collect_aux

D = 8


@pytest.mark.parametrize("build", [lambda: MoE(D, 4), lambda: HeirarchicalMoE(D, (2, 2))], ids=["one", "two"])
def test_it_returns_the_output_and_leaves_the_loss_to_collect_aux(build):
    layers = [build().train(False) for _ in range(2)]
    for layer in layers:
        layer.apply(
            lambda module: hasattr(module, "second_policy_eval") and setattr(module, "second_policy_eval", "all")
        )
    model, x = nn.Sequential(*map(OutputOnly, layers)), torch.randn(2, 9, D)
    first, loss = layers[0](x)
    expected, other = layers[1](first)
    with collect_aux(model) as aux:
        out = model(x)
        torch.testing.assert_close(aux.take(), loss + other)
    assert torch.equal(out, expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert set(OutputOnly(layers[0]).state_dict()) == {f"moe.{key}" for key in layers[0].state_dict()}


def test_masks_and_side_inputs_are_handed_on():
    moe = MoE(D, gate=HashGating(D, 4, num_ids=20))
    x, ids, mask = torch.randn(2, 9, D), torch.randint(20, (2, 9)), torch.arange(9) < torch.tensor([[9], [4]])
    only = OutputOnly(moe)
    assert torch.equal(only(x, mask, token_ids=ids), moe(x, mask, token_ids=ids)[0])
    assert torch.equal(only(x, mask=mask, token_ids=ids), moe(x, mask, token_ids=ids)[0])


def test_as_an_expert_and_as_the_shared_expert():
    x = torch.randn(2, 9, D)
    for settings in (
        dict(experts=[OutputOnly(MoE(D, 2)) for _ in range(3)]),
        dict(num_experts=3, shared_expert=OutputOnly(MoE(D, 2))),
    ):
        out, aux_loss = MoE(D, **settings)(x)  # type: ignore[arg-type]
        assert (out.shape, aux_loss.shape) == (x.shape, ())
    with pytest.raises(TypeError, match=r"moe must be a layer such as MoE\(\.\.\.\), got <class"):
        OutputOnly(MoE)  # type: ignore[arg-type]
