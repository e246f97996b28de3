"""ZAYA1's blocks, whose routers hand a state from layer to layer, and layers of ours compute the same."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from support.transformers_blocks import compute_gradients, get_grad, make_block, randomize_weights
from support.transformers_families import build_model, make_inputs
from support.transformers_models import make_two_lengths
from transformers import AutoModelForCausalLM, ZayaConfig
from transformers.models.zaya.modeling_zaya import ZayaSparseMoeBlock

from mixture_of_experts.gating import DepthAveragedGating
from mixture_of_experts.huggingface import from_transformers, to_transformers
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.replay import record_routing, replay_routing

from .test_model_conversion import convert_both_ways
from .test_saving import same_weights


def make_zaya_block(seed: int, layer: int) -> Any:
    """A block in float64, of sizes that follow from the seed."""
    torch.manual_seed(seed)
    config: Any = ZayaConfig(
        hidden_size=8 + 4 * seed,
        moe_intermediate_size=6 + seed,
        num_experts=3 + seed,
        router_hidden_size=5 + seed,
        num_hidden_layers=2,
    )
    config._experts_implementation = "eager"
    return randomize_weights(ZayaSparseMoeBlock(config, layer)).double()


def make_model(**more: Any) -> Any:
    return build_model("zaya", num_hidden_layers=3, router_hidden_size=10, **more)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_block(seed, layer, training):
    """Outputs, states, and the gradients of tokens, of the state before and of every weight; then back, bit for bit."""
    block = make_zaya_block(seed, layer).train(training)
    moe, results, other = from_transformers(block), [], randomize_weights(make_zaya_block(seed, layer))
    d, r = block.gate.hidden_size, block.gate.router_hidden_size
    for one in (block, moe):
        generator = torch.Generator().manual_seed(seed)
        x, state, *grads = (torch.randn(2, 9, n, dtype=torch.float64, generator=generator) for n in (d, r, d, r))
        given = [x.requires_grad_(), *([state.requires_grad_()] if layer else [])]
        found = block(*given) if one is block else moe(x, router_state=given[1] if layer else None)[::2]
        torch.autograd.backward(found, grads)
        results.append([*found, *map(get_grad, given)])
    theirs = compute_gradients(block)
    for name, parameter in moe.named_parameters():
        results[0].append(theirs[name])
        results[1].append(get_grad(parameter))
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)
    to_transformers(moe, other)
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in other.state_dict().items())


def test_rejects_block_from_another_model():
    """The first one's router has no scale."""
    with pytest.raises(ValueError, match=r"gate.state_scale has shape \(5,\), but the block has None"):
        to_transformers(from_transformers(make_zaya_block(0, 1)), make_zaya_block(0, 0))
    with pytest.raises(ValueError, match="the gate is DepthAveragedGating, but the block has TopKGating"):
        to_transformers(from_transformers(make_zaya_block(0, 1)), make_block("MixtralSparseMoeBlock"))


def test_a_padded_batch_a_generation_and_back():
    convert_both_ways(make_model())
    assert [layer.moe.gate.first for layer in find_feed_forwards(from_transformers(make_model()))] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_model(checkpointing):
    """Of all weights, also where layers run again in the backward."""
    stock, (_, batch) = make_model().train(), make_two_lengths("right")
    model = from_transformers(copy.deepcopy(stock), loss_coef=0.0)
    if checkpointing:
        model.activation_checkpointing_enable()
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    losses = [one(**batch, labels=labels, use_cache=False).loss for one in (stock, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    blocks = [layer.mlp for layer in stock.model.layers]
    for block, layer in zip(blocks, find_feed_forwards(model), strict=True):
        theirs = compute_gradients(block)
        for name, parameter in layer.moe.named_parameters():
            torch.testing.assert_close(get_grad(parameter), theirs[name], atol=1e-6, rtol=1e-4)
        assert layer.moe.gate.down.weight.grad.any()
        assert layer.moe.gate.first or layer.moe.gate.state_scale.grad.any()
        assert layer.moe.gate.expert_counts.sum() == batch["attention_mask"].sum()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, stock.model.embed_tokens.weight.grad)


def test_saved_copied_pickled(tmp_path):
    model = from_transformers(make_model(), loss_coef=0.5, balance_over="group")
    given = make_inputs(model)
    wanted = model(**given).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [repr(one) for one in find_feed_forwards(loaded)] == [repr(one) for one in find_feed_forwards(model)]
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given).logits, wanted)
    same_weights(to_transformers(loaded), to_transformers(model))


def test_records_of_both_are_replayed_in_both():
    """The stock model's choices and ours are the same, and each takes the other's from a router that was changed."""
    stock = make_model()
    model, given = from_transformers(copy.deepcopy(stock)), make_inputs(stock)
    with record_routing(stock) as theirs:
        wanted = stock(**given).logits
    with record_routing(model) as ours:
        model(**given)
    for one, other in zip(theirs, ours, strict=True):
        assert all(a.equal(b) for a, b in zip(theirs[one], ours[other], strict=True))
    for layer in find_feed_forwards(model):
        layer.moe.gate.expert_bias.normal_()
    assert not torch.allclose(model(**given).logits, wanted, atol=1e-3)
    with replay_routing(model, ours):
        torch.testing.assert_close(model(**given).logits, wanted, atol=1e-5, rtol=1e-5)


def test_the_gate_is_the_one_of_the_package():
    """`down`, `state_scale` and a network of the block's; it hands on what the block does, and keeps nothing."""
    model = from_transformers(make_model())
    gates: list[Any] = [layer.moe.gate for layer in find_feed_forwards(model)]
    assert {type(gate) for gate in gates} == {DepthAveragedGating}
    states: list[Any] = []
    for gate in gates:
        gate.register_forward_hook(
            lambda gate, args, given, routing: states.append((given.get("router_state"), routing.state)),
            with_kwargs=True,
        )
    model(**make_inputs(model))
    assert [before is None for before, _ in states] == [True, False, False]
    for (_, after), (before, _) in itertools.pairwise(states):
        assert torch.equal(before, after)
