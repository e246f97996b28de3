"""What docs/recipes.md says of the `transformers` package: its layer of GPT-OSS by hand, and conversions of losses.

`huggingface/test_block_conversion.py` holds the layers of every block to it, outputs and all gradients.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support.doc_recipes import extract_recipe
from torch import Tensor

from mixture_of_experts import MoE, TopKGating

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")


def import_modeling(name: str) -> ModuleType:
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_gpt_oss_by_hand(limit):
    """The page's experts, with biases and clamps: outputs, and the gradients of the input and of every weight."""
    module = pytest.importorskip("transformers.models.gpt_oss.configuration_gpt_oss")
    sizes = dict(hidden_size=12, intermediate_size=16, num_local_experts=5, num_experts_per_tok=2)
    config = module.GptOssConfig(hidden_act="silu", swiglu_limit=limit, **sizes)
    config._experts_implementation = "eager"
    block = import_modeling("gpt_oss").GptOssMLP(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=12**-0.5)
    experts = extract_recipe("GPT-OSS")["GptOssExperts"](12, 5, 16, limit=limit)
    ours = MoE(12, gate=TopKGating(12, 5, k=2, bias=True), experts=experts).double()

    def by_our_names(of: str) -> dict[str, Tensor]:
        found = {name.replace("router", "gate"): getattr(p, of) for name, p in block.named_parameters()}
        return {"gate.w_gating": found.pop("gate.weight").T, "gate.b_gating": found.pop("gate.bias"), **found}

    ours.load_state_dict(by_our_names("data"), strict=True)
    x, cotangent = torch.randn(2, 2, 11, 12, dtype=torch.float64)
    results = []
    for layer in (block, ours):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)[0].reshape(x.shape)
        out.backward(cotangent)
        results.append({"output": out, "input": leaf.grad})
    results[0].update(by_our_names("grad"))
    results[1].update({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert all(result.abs().max() > 1e-3 for result in results[0].values())
    torch.testing.assert_close(results[1], results[0])


# Losses: `load_balancing_loss_func` is the same in every model of the package that has it


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (16, 8), (4, 1)])
def test_balance_loss_of_one_layer(num_experts, k, masked):
    """Their loss is k times ours over the batch, with the same gradient."""
    torch.manual_seed(k)
    gate = TopKGating(6, num_experts, k=k, balance_over="batch")
    x = torch.randn(3, 10, 6, requires_grad=True)
    mask = torch.arange(10) < torch.tensor([[10], [4], [7]]) if masked else None
    logits = x.flatten(0, 1) @ gate.w_gating
    theirs = import_modeling("mixtral").load_balancing_loss_func((logits,), num_experts, k, mask)
    ours = k * gate(x, mask=mask).balance_loss
    torch.testing.assert_close(ours, theirs)
    for found, expected in zip(
        *(torch.autograd.grad(loss, (x, gate.w_gating)) for loss in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_balance_loss_of_several_layers():
    """For L layers our number is theirs times k / L: the same when balanced, theirs is lower where layers cancel."""
    layers, num_experts, k = 3, 4, 2
    theirs = import_modeling("mixtral").load_balancing_loss_func
    gates = [TopKGating(num_experts, num_experts, k=k, balance_over="batch") for _ in range(layers)]

    def both(weights: list[Tensor]) -> tuple[float, float]:
        tokens = torch.eye(num_experts).unsqueeze(0)
        for gate, weight in zip(gates, weights, strict=True):
            gate.w_gating.data.copy_(weight)
        ours = sum(gate(tokens).balance_loss for gate in gates) * k / layers
        return ours.item(), theirs(tuple(tokens[0] @ weight for weight in weights), num_experts, k).item()

    balanced = [0.01 * torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)])] * layers
    assert both(balanced) == pytest.approx((k, k), rel=1e-3)
    skewed = [torch.tensor([8.0, 8.0, 0.0, 0.0]).roll(2 * layer).expand(4, 4) for layer in range(layers)]
    ours, theirs_skewed = both(skewed)
    assert ours == pytest.approx(num_experts, rel=1e-2)
    assert theirs_skewed < 0.6 * ours


def test_losses_of_switch():
    """Theirs is of one choice, taken for each sequence, as ours."""
    x, gate = torch.randn(2, 7, 6), TopKGating(6, 8, k=1)
    routing = gate(x)
    theirs = import_modeling("switch_transformers")
    balance_loss = theirs.load_balancing_loss_func(routing.probs, routing.expert)
    torch.testing.assert_close(routing.balance_loss, balance_loss)
    torch.testing.assert_close(routing.z_loss, theirs.router_z_loss_func(x @ gate.w_gating))
