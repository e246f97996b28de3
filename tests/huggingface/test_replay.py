"""Records of models of transformers, their own sparse blocks and layers of ours, and what they replay."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support.record_helpers import assert_records_equal, record_forward
from support.transformers_blocks import BLOCKS, EXCLUDED_BLOCKS, BlockInModel, make_block
from support.transformers_models import ARCHITECTURES, disable_dropout, make_two_lengths
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import DynamicCache, StaticCache

from mixture_of_experts import MoE, Top2Gating, TopKGating
from mixture_of_experts.huggingface import from_transformers, replace_ffn
from mixture_of_experts.replay import RoutingRecords, record_routing, replay_routing, save_choices

from .test_block_conversion import build_model as build_sparse

SPARSE = ["Qwen3Moe", "Mixtral", "DeepseekV3", "GptOss"]


DROPLESS: Any = dict(capacity_factor_train=None, capacity_factor_eval=None)


def build_replaced() -> Any:
    """A Llama whose layers send second choices by a threshold, in training at random."""
    model = disable_dropout(ARCHITECTURES["llama"].build()).eval()
    gate = lambda dim, e: Top2Gating(dim, e, second_policy_eval="threshold", **DROPLESS)  # noqa: E731
    replace_ffn(model, num_experts=4, gate=gate)
    return model


MODELS = {**{name: partial(build_sparse, name) for name in SPARSE}, "replaced": build_replaced}


@torch.no_grad()
def perturb_routers(model: nn.Module) -> Any:
    """A copy that chooses otherwise."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight", "w_gating")):
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_any_padding_value(name):
    """Padded on the left, then on the right, then alone; by the model, and by one whose router is another."""
    model = MODELS[name]()
    alone, left = make_two_lengths("left")
    right = {"input_ids": left["input_ids"].clone(), "attention_mask": left["attention_mask"].flip(-1)}
    right["input_ids"][right["attention_mask"].bool()] = left["input_ids"][left["attention_mask"].bool()]
    of_left, of_right = (batch["attention_mask"].bool() for batch in (left, right))
    with record_routing(model) as records:
        wanted = model(**left).logits[of_left]
    assert records.lengths(records.layers[0]) == [alone[0].shape[1], alone[1].shape[1]]
    for one in (model, perturb_routers(model)):
        with replay_routing(one, records), record_routing(one) as again:
            padded = one(**right).logits[of_right]
        assert_records_equal(again, records)
        with replay_routing(one, records.select([1])):
            single = one(alone[1]).logits[0]
        torch.testing.assert_close(single, padded[-len(single) :], atol=1e-5, rtol=1e-5)
        if one is model:
            torch.testing.assert_close(padded, wanted, atol=1e-5, rtol=1e-5)
        else:
            assert not torch.allclose(padded, wanted, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_generation(name):
    """Of each sequence the prompt and the steps, as one forward of all but its last token would choose."""
    model, (_, batch) = MODELS[name](), make_two_lengths("left")
    settings: Any = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with record_routing(model) as records:
        tokens = model.generate(**batch, **settings)
    assert records.lengths(records.layers[0]) == [9 + 3, 4 + 3]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.int64)], dim=1)
    assert_records_equal(record_forward(model, tokens, attention_mask=mask).select([0, 1], tokens=[12, 7]), records)
    other = perturb_routers(model)
    with replay_routing(other, records), record_routing(other) as again:
        steps = other.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    assert_records_equal(again, records)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], dim=1)
    with replay_routing(other, records), torch.no_grad():
        logits = other(steps.sequences[:, :-1], attention_mask=mask).logits[:, -4:]
    torch.testing.assert_close(torch.stack(steps.logits, dim=1), logits, atol=1e-4, rtol=1e-4)
    message = "sequence 0 has 13 real tokens at .*, but its record has 12; pass beyond="
    with pytest.raises(ValueError, match=message), replay_routing(other, records):
        other(tokens, attention_mask=torch.cat([mask, mask[:, -1:]], dim=1))


@pytest.mark.parametrize("settings", [dict(), dict(cache_implementation="static"), dict(do_sample=True)])
@pytest.mark.parametrize("name", ["Mixtral", "replaced"])
def test_rejects_beam_search(name, settings):
    """In records and in replays, where the second forward goes on with exchanged sequences."""
    model, (_, batch) = MODELS[name](), make_two_lengths("left")
    more: Any = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, num_beams=2) | settings
    with pytest.raises(RuntimeError, match=r"as in beam search \(num_beams > 1\)"), record_routing(model):
        model.generate(**batch, **more)
    prompts = {key: value.repeat_interleave(2, dim=0) for key, value in batch.items()}
    replay = replay_routing(model, record_forward(model, **prompts), beyond="choose")
    with pytest.raises(RuntimeError, match=r"as in beam search \(num_beams > 1\)"), replay:
        model.generate(**batch, **more)
    model.generate(**batch, **more)  # nothing is left behind


@torch.no_grad()
def test_cropped_or_copied_cache_is_not_beam_search():
    """Lengths differ, or the cache is another one; without a cache every step is a sequence of its own."""
    model, tokens = MODELS["replaced"](), torch.randint(3, 64, (2, 6))
    with record_routing(model) as records:
        cache = model(tokens).past_key_values
        model(tokens[:, :2], cache=cache)
        cache.crop(-2)
        model(tokens[:, :3], cache=copy.deepcopy(cache))
        model(tokens[:, :1], cache=cache)
    assert records.lengths(records.layers[0]) == [7, 7]
    settings: Any = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False)
    with record_routing(model) as records:
        model.generate(tokens, num_beams=2, **settings)
    assert records.lengths(records.layers[0]) == [6] * 4 + [7] * 4


@pytest.mark.parametrize("name", MODELS)
def test_training_with_checkpointing(name):
    """Gradients of the router's weights too are those without checkpointing."""
    model, (_, batch) = MODELS[name](), make_two_lengths("left")
    records = record_forward(perturb_routers(model), **batch)
    model.train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)  # padding, which records leave out, may choose at random
        with replay_routing(model, records), record_routing(model) as again:
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
            grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        assert_records_equal(again, records)
        results.append([loss, *(grad for grad in grads if grad is not None)])
    torch.testing.assert_close(*results)
    with replay_routing(model, records):
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    with pytest.raises(RuntimeError, match=r"recomputes .* after replay_routing has exited"):
        loss.backward()


def test_two_batches_of_other_padding_before_a_backward():
    """A block knows no mask when it runs again."""
    model, (_, left) = build_sparse("Mixtral").train(), make_two_lengths("left")
    right = {"input_ids": left["input_ids"], "attention_mask": left["attention_mask"].flip(-1)}
    records = record_forward(model, **left)
    model.activation_checkpointing_enable()
    with replay_routing(model, records):
        for batch in (left, right):
            model(**batch, use_cache=False).logits.sum().backward()
        model(**left, use_cache=False)
        with pytest.raises(RuntimeError, match=r"two batches with different padding at .* before the forward"):
            model(**right, use_cache=False)


def replay_in_ours(moe: MoE, records: RoutingRecords, x: Tensor) -> Tensor:
    (layer,) = records.layers
    choices = torch.cat([record.to(torch.int64) for record in records[layer]]).view(*x.shape[:2], -1)
    if choices.shape[-1] < moe.gate.k:  # shared experts, which our gate chooses too
        shared = torch.arange(moe.num_experts - moe.gate.k + choices.shape[-1], moe.num_experts)
        choices = torch.cat([choices, shared.expand(*choices.shape[:2], -1)], dim=-1)
    return moe(x, given_experts=choices)[0]


def assert_replays(name: str) -> None:
    """A block that is given another one's choices computes what a layer of ours with its weights does."""
    torch.manual_seed(0)
    block, x = make_block(name), torch.randn(2, 7, 16)
    moe, model = from_transformers(block).eval(), BlockInModel(block).eval()
    records = record_forward(model, torch.randn(2, 7, 16))
    with replay_routing(model, records), record_routing(model) as again, torch.no_grad():
        out = model(x)
        wanted = replay_in_ours(moe, records, x)
    assert_records_equal(again, records)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, moe(x)[0], atol=1e-3)


@pytest.mark.parametrize(
    "name", ["AXK1MoE", "DeepseekV2Moe", "GptOssMLP", "HunYuanMoEV1Moe", "InklingMoE", "Llama4TextMoe", "JetMoeMoE"]
)
def test_blocks_weigh_by_their_own_rule(name):
    assert_replays(name)


#: layers whose block is a part of their forward, and blocks that do not choose by `torch.topk`
DIFFERENT = {"Gemma4TextDecoderLayer", "DiffusionGemmaEncoderTextLayer", "DiffusionGemmaDecoderTextLayer"}
OTHERS = {"PhimoeSparseMoeBlock", "SwitchTransformersSparseMLP"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - EXCLUDED_BLOCKS.keys() - DIFFERENT - OTHERS))
def test_all_blocks_weigh_by_their_own_rule(name):
    assert_replays(name)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_rejects_blocks_without_topk(name):
    model = BlockInModel(make_block(name))
    with pytest.raises(TypeError, match=r"does not choose . of 8 experts with torch\.topk"), record_routing(model):
        model(torch.randn(2, 7, 16))


def test_choices_that_are_not_made_are_no_blocks():
    model = build_sparse("Mixtral")
    records = record_forward(model, torch.randint(3, 64, (1, 5)))
    dropped = {layer: [record.clone().fill_(-1) for record in records[layer]] for layer in records}
    with pytest.raises(TypeError, match="its own code computes the weights"):
        record_routing(model, weights=True).__enter__()
    with pytest.raises(ValueError, match="makes 2 choices for every token, but the records lack some of them"):
        replay_routing(model, RoutingRecords(dropped)).__enter__()


@pytest.mark.parametrize("saved", [True, False])
def test_choices_are_saved_for_a_recomputation(saved):
    """Routers of transformers whose product differs from run to run."""
    model, (_, batch), generator = build_sparse("DeepseekV3").train(), make_two_lengths("right"), torch.Generator()
    chosen = []
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3TopkRouter":
            module.register_forward_pre_hook(lambda _, args: args[0] + torch.randn(args[0].shape, generator=generator))
            module.register_forward_hook(lambda module, args, output: chosen.append((module, output[2])))
    assert not chosen
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, save_choices)} if saved else {}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False, **contexts})
    model(**batch, use_cache=False).logits.sum().backward()
    routers = list(dict.fromkeys(router for router, _ in chosen))
    pairs = [[expert for router, expert in chosen if router is one] for one in routers]
    assert [len(pair) for pair in pairs] == [2, 2]
    assert all(first.equal(again) for first, again in pairs) is saved


def test_our_gate_in_foreign_layer():
    """Names tell gates apart where a model has both kinds, or their order where names differ."""
    model = build_replaced()
    records = record_forward(model.model, torch.randint(3, 64, (1, 5)))
    assert records.layers != tuple(f"model.{layer}" for layer in records)
    with replay_routing(model, records), record_routing(model) as again:
        model(torch.randint(3, 64, (1, 5)))
    assert all(again[f"model.{layer}"][0].equal(records[layer][0]) for layer in records)
    with pytest.raises(ValueError, match=r"the model has 2 gates .*, but the records have 1 \(gate\)"):
        replay_routing(model, RoutingRecords({"gate": [torch.zeros(5, 2, dtype=torch.int64)]})).__enter__()
    assert isinstance(model.model.layers[0].mlp.moe.gate, Top2Gating | TopKGating)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_generation_with_sliding_windows_and_a_static_cache(chunk):
    """The masks of this cache have columns only for the last tokens."""
    model = build_sparse("Mixtral", sliding_window=6)
    prompt, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 0] = 0
    settings: Any = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, prefill_chunk_size=chunk)
    with record_routing(model) as records:
        tokens = model.generate(prompt, attention_mask=mask, **settings, cache_implementation="static")
    assert records.lengths(records.layers[0]) == [8 + 4, 9 + 4]
    mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.int64)], dim=1)
    assert_records_equal(record_forward(model, tokens[:, :-1], attention_mask=mask[:, :-1]), records)
    cache = StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        model(tokens, cache=cache)
    message = "the number of earlier tokens is unknown; run all forward passes"
    with pytest.raises(RuntimeError, match=message), record_routing(model):
        model(tokens[:, :1], cache=cache, attention_mask=torch.ones(2, 1, 1, 6, dtype=torch.bool))


@torch.no_grad()
def test_a_cropped_cache_of_sliding_windows_is_rejected():
    """The masks do not show which of its tokens are padding, and the remembered count is that of the whole cache."""
    model, tokens = build_sparse("Mixtral", sliding_window=6), torch.randint(3, 64, (1, 15))
    with record_routing(model):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(tokens[:, :10], cache=cache)
        cache.crop(-2)
        mask = torch.ones(1, 1, 2, 7, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="without cropping the cache or using another one in between"):
            model(tokens[:, 8:10], cache=cache, attention_mask=mask)
