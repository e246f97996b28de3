"""Padding is invisible to the routers of every architecture, and no forward sees the mask of another.

Routers have a capacity here and count balance over sequences, so that a padding token that takes a place, or a sequence
whose tokens are told by a wrong mask, changes the results of others.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from support import reentrant_checkpoint
from support.transformers_models import (
    ARCHITECTURES,
    CAUSAL,
    LONG,
    SINGLE_NETWORK,
    VOCABULARY,
    disable_dropout,
    make_two_lengths,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import StaticCache

from mixture_of_experts import Top2Gating, TopKGating
from mixture_of_experts.huggingface import aux_loss, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, find_feed_forwards
from mixture_of_experts.stats import track_routing
from mixture_of_experts.whole_model.call_stack import CALL_STACKS

pytestmark = pytest.mark.slow

TOKENS = [name for name in ARCHITECTURES if ARCHITECTURES[name].kind in ("causal", "tokens")]


def build_model(name: str, gate: Any = SINGLE_NETWORK) -> Any:
    model = disable_dropout(ARCHITECTURES[name].build())
    replace_ffn(model, num_experts=4, gate=gate)
    return model


def select_real(values: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[its.bool()] for row, its in zip(values, mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TOKENS)
def test_padded_batch_equals_single_sequences(name, side):
    """In capacity, order and choice; OPT flattens tokens, and its router still sees the two."""
    model = build_model(name).eval()
    alone, batch = make_two_lengths(side)
    if side == "left":
        first = 1 if name == "roberta" else 0  # it numbers from behind its padding token
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0) + first
    with track_routing(model) as stats:
        logits = select_real(model(**batch).logits, batch["attention_mask"])
    assert any(stats.last(layer).dropped for layer in stats.layers), "nothing was dropped: capacity shows nothing"
    for tokens, found in zip(alone, logits, strict=True):
        torch.testing.assert_close(found, model(tokens).logits[0], atol=2e-5, rtol=0)
    # and so are the losses, which count real tokens only
    together = compute_aux_loss(model.train(), batch)
    each = [compute_aux_loss(model, {"input_ids": tokens}) for tokens in alone]
    torch.testing.assert_close(together, sum(each) / 2, atol=1e-6, rtol=1e-5)


def compute_aux_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        model(**inputs)
    return aux_loss(model)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_dropless_layers_compute_padding_as_the_dense_model_does(name, side):
    """A loss that reads outputs at padding is the dense model's, and so are its gradients."""
    model, (_, batch) = disable_dropout(ARCHITECTURES[name].build()).train(), make_two_lengths(side)
    batch["labels"] = batch["input_ids"]
    dense = model(**batch)
    wanted = torch.autograd.grad(dense.loss, model.get_input_embeddings().weight)
    upcycle(model, num_experts=4, loss_coef=0.0)
    out = model(**batch)
    grad = torch.autograd.grad(out.loss, model.get_input_embeddings().weight)
    for found, expected in ((out.logits, dense.logits), (out.loss, dense.loss), (grad, wanted)):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_encoder_and_decoder_have_masks_of_their_own(name):
    model = build_model(name).eval()
    alone, batch = make_two_lengths("right")
    targets, target_batch = make_two_lengths("right")
    batch["decoder_input_ids"] = target_batch["input_ids"]
    batch["decoder_attention_mask"] = target_batch["attention_mask"]
    logits = select_real(model(**batch).logits, batch["decoder_attention_mask"])
    for tokens, target, found in zip(alone, targets, logits, strict=True):
        expected = model(input_ids=tokens, decoder_input_ids=target).logits[0]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_whisper_masks_decoder_only():
    model = build_model("whisper").eval()
    inputs = ARCHITECTURES["whisper"].inputs(n=LONG)
    targets, batch = make_two_lengths("right")
    frames_mask = torch.tensor([[1] * 20, [1] * 8 + [0] * 12])
    logits = model(
        inputs["input_features"],
        attention_mask=frames_mask,
        decoder_input_ids=batch["input_ids"],
        decoder_attention_mask=batch["attention_mask"],
    ).logits
    for row, (target, found) in enumerate(zip(targets, select_real(logits, batch["attention_mask"]), strict=True)):
        expected = model(inputs["input_features"][row : row + 1], decoder_input_ids=target).logits[0]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_generation(name, beams):
    """With a cache the same tokens as without, left-padded the same as alone (dropless, or a step would differ)."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    replace_ffn(model, num_experts=4)
    alone, batch = make_two_lengths("left" if architecture.kind == "causal" else "right")
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams)
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    for tokens, found in zip(alone, cached, strict=True):
        alone_found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        assert torch.equal(found[-5:], alone_found[0, -5:])


def keep_masks(model: nn.Module, seen: list[Any]) -> None:
    for module in find_feed_forwards(model):
        module.moe.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs.get("mask")), with_kwargs=True)


@pytest.mark.parametrize("cache", ["static", None])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_masks_of_four_dimensions(name, cache):
    """Those that `generate` makes for a static cache, and those that are given."""
    model = build_model(name).eval()
    _, batch = make_two_lengths("left")
    mask, seen = batch["attention_mask"].bool(), []
    keep_masks(model, seen)
    if cache:
        model.generate(**batch, max_new_tokens=2, do_sample=False, cache_implementation="static")
        assert all(its is None for its in seen[2:])
    else:
        causal = torch.ones(LONG, LONG, dtype=torch.bool).tril() & mask[:, None, None]
        model(batch["input_ids"], attention_mask=causal)
        low = torch.finfo(torch.float32).min
        model(batch["input_ids"], attention_mask=torch.where(causal, 0.0, low))
        assert torch.equal(seen[2], mask)
    assert torch.equal(seen[0], mask)
    assert torch.equal(seen[1], mask)


def test_a_static_cache_that_is_not_empty():
    model = build_model("llama").eval()
    cache = StaticCache(model.config, max_cache_len=16)
    tokens, seen = torch.randint(3, VOCABULARY, (1, 6)), []
    model(tokens, cache=cache)
    keep_masks(model, seen)
    mask = torch.zeros(1, 1, 3, 16, dtype=torch.bool)
    mask[..., :6] = True
    mask[0, 0, 1, 7] = True  # the second of three tokens is real
    model(tokens[:, :3], cache=cache, attention_mask=mask)
    assert seen[0].tolist() == [[False, True, False]]


def test_rejects_ambiguous_masks():
    model = build_model("llama")
    tokens = torch.randint(3, VOCABULARY, (2, 6))
    for shape in ((2, 5), (1, 6)):
        with pytest.raises(ValueError, match=r"which tokens are padding: .* \(2, 6\) tokens"):
            model(tokens, attention_mask=torch.ones(shape, dtype=torch.long))
    assert not CALL_STACKS.calls
    model(tokens)  # and the refused mask is forgotten


# Training: activation checkpointing runs layers again when their forward is over


def make_two_batches() -> list[dict[str, Tensor]]:
    first, second = make_two_lengths("right")[1], make_two_lengths("right")[1]
    return [first, {**second, "attention_mask": second["attention_mask"].flip(0)}]


def run_two_forwards(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the sum of two forwards, one backward after both; random policies start from one seed."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = torch.zeros(())
    for batch in batches:
        logits = torch.cat(select_real(model(**batch).logits, batch["attention_mask"]))
        loss = loss + logits.logsumexp(-1).mean() + aux_loss(model)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "gate"), [*((name, SINGLE_NETWORK) for name in ("llama", "opt", "bert", "gpt2")), ("llama", Top2Gating)]
)
def test_checkpointing_with_two_forwards_before_one_backward(name, gate):
    """Each has its mask, and second choices that are drawn are drawn again."""
    model = build_model(name, gate).train()
    batches = make_two_batches()
    expected = run_two_forwards(model, batches)
    model.activation_checkpointing_enable()
    found = run_two_forwards(model, batches)
    torch.testing.assert_close(found, expected)
    again = run_two_forwards(copy.deepcopy(model), batches)  # a copy has hooks and masks of its own
    torch.testing.assert_close(again, expected)
    model.activation_checkpointing_disable()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(run_two_forwards(model, batches), expected)


@pytest.mark.parametrize("foreign", [False, True])
def test_reentrant_checkpointing(foreign):
    """Is exact without an auxiliary loss, and refused with one; also another implementation's, as DeepSpeed's."""
    model = ARCHITECTURES["llama"].build().train()
    gate = lambda d, e: TopKGating(d, e, k=1, capacity_factor_train=0.5, min_expert_capacity=1, expert_bias=True)  # noqa: E731
    replace_ffn(model, num_experts=4, gate=gate, loss_coef=0.0)
    model.model.embed_tokens.requires_grad_()
    batches = make_two_batches()
    expected = run_two_forwards(model, batches)
    model.activation_checkpointing_enable({"use_reentrant": True})
    if foreign:
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = reentrant_checkpoint.checkpoint
    for module in find_feed_forwards(model):
        module.moe.gate.expert_counts.zero_()
    with track_routing(model) as stats:
        torch.testing.assert_close(run_two_forwards(model, batches), expected)
    for name, module in zip(stats.layers, find_feed_forwards(model), strict=True):
        assert [record.forwards for record in stats.records(name)] == [1, 1]
        assert module.moe.gate.expert_counts.sum() == stats.total(name).requested.sum()
    for module in find_feed_forwards(model):
        module.moe.loss_coef = 0.01
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**batches[0])


def test_rejects_custom_checkpointing_with_mask():
    """It is not told of the mask, and a stale one would be wrong without a word. An evaluation before has no say."""
    model = build_model("llama").train()
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=False)
    batch = make_two_lengths("right")[1]
    model.eval()(**batch, use_cache=False)
    model.train()
    (model(batch["input_ids"], use_cache=False).logits.sum() + aux_loss(model)).backward()  # without one it is right
    with pytest.raises(RuntimeError, match=r"activation_checkpointing_enable"):
        model(**batch, use_cache=False)
    with torch.no_grad():  # nothing will be run again
        model(**batch, use_cache=False)


def test_copies_and_pickles_bring_masks_to_their_own_routers():
    model = build_model("opt").train()
    alone, batch = make_two_lengths("right")
    loss = model(**batch).logits.sum() + aux_loss(model)  # what belongs to a forward is not copied
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="run a forward pass in this thread first"):
            aux_loss(twin)
        twin.eval()
        found = select_real(twin(**batch).logits, batch["attention_mask"])[1]
        torch.testing.assert_close(found, twin(alone[1]).logits[0], atol=2e-5, rtol=0)
    loss.backward()


def test_hooks_of_another_process_replace_none_of_a_pickled_model(monkeypatch):
    pickled = pickle.dumps(build_model("opt"))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as where no hook was made yet
    model = pickle.loads(pickled)
    before = {module: (*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()}
    assert RemovableHandle.next_id == 0
    assert any(before.values())
    for module, keys in before.items():
        for number in range(3):
            RemovableHandle.next_id = number
            module.register_forward_hook(lambda module, args, output: None)
            module.register_forward_pre_hook(lambda module, args: None)
        assert {*keys} < {*module._forward_hooks, *module._forward_pre_hooks}
        assert len(module._forward_hooks) == 3 + len(keys) // 2


def test_networks_are_found_after_changes():
    """In the order of `modules()`, once each: after layers were replaced, copied, shared and removed."""
    model = build_model("llama")
    layers = model.model.layers

    def check(number: int) -> None:
        found = find_feed_forwards(model)
        assert found == [module for module in model.modules() if isinstance(module, MoEFeedForward)]
        assert len(found) == number
        with torch.no_grad():
            model(input_ids=torch.randint(VOCABULARY, (1, 3)), use_cache=False)
        assert not CALL_STACKS.calls

    check(2)
    layers.append(copy.deepcopy(layers[0]))
    layers[0].mlp = copy.deepcopy(layers[1].mlp)
    model.config.num_hidden_layers = 3
    check(3)
    layers[2] = layers[1]
    check(2)
    layers[0].mlp = nn.Identity()
    model.extra = nn.Sequential(nn.Sequential(layers[2].mlp, build_model("llama").model.layers[0].mlp))
    check(2)
