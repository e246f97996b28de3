"""Layers in models whose gate reads token ids get the model's `input_ids`, without anybody doing anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.transformers_models import ARCHITECTURES, VOCABULARY, disable_dropout, make_two_lengths
from torch import Tensor, nn

from mixture_of_experts import HashGating
from mixture_of_experts.huggingface import from_pretrained, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards


def make_hash_gate(dim: int, num_experts: int) -> HashGating:
    return HashGating(dim, num_experts, 2, num_ids=VOCABULARY)


def build_model(name: str) -> tuple[Any, list[tuple[nn.Module, Tensor, Tensor]]]:
    """An upcycled model, and what its gates read and chose."""
    model, read = disable_dropout(ARCHITECTURES[name].build()).eval(), []
    upcycle(model, num_experts=4, gate=make_hash_gate)

    def note(gate, args, kwargs, routing) -> None:
        read.append((gate, kwargs["token_ids"], routing.expert.view(*kwargs["token_ids"].shape, 2)))

    for layer in find_feed_forwards(model):
        layer.moe.gate.register_forward_hook(note, with_kwargs=True)
    return model, read


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bert"])
def test_upcycled_models_bring_them(name):
    """And compute what they did: OPT flattens its tokens, T5 has an encoder and a decoder."""
    inputs = ARCHITECTURES[name].inputs()
    torch.manual_seed(0)
    dense = disable_dropout(ARCHITECTURES[name].build()).eval()
    torch.manual_seed(0)
    model, read = build_model(name)
    torch.testing.assert_close(model(**inputs)[0], dense(**inputs)[0], atol=1e-5, rtol=1e-5)
    given = [ids for ids in inputs.values() if not ids.is_floating_point()]
    assert len(read) == len(find_feed_forwards(model))
    for gate, ids, expert in read:
        assert any(ids.shape == its.shape and ids.equal(its) for its in given)
        assert expert.equal(gate.experts_of_id[ids])


def test_padding_and_generation():
    """With a cache each step has the ids of its own tokens, those of padding too."""
    model, read = build_model("llama")
    alone, batch = make_two_lengths("left")
    out = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [tuple(ids.shape) for _, ids, _ in read[::2]] == [(2, 9), (2, 1), (2, 1)]
    assert torch.cat([ids for _, ids, _ in read[2::2]], dim=1).equal(out[:, 9:11])
    assert read[0][1].equal(batch["input_ids"])
    single = model.generate(alone[1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out[1, -3:].equal(single[0, -3:])


def test_checkpointing_keeps_token_ids():
    """Two forwards before one backward, each with its own ids."""
    model, read = build_model("llama")
    model.train()
    ids, grads = torch.randint(3, VOCABULARY, (2, 2, 5)), []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        read.clear()
        loss = sum(model(each, labels=each, use_cache=False).loss for each in ids)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert len(read) == 8
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_embeddings_have_no_token_ids():
    model, _ = build_model("llama")
    embeds = model.get_input_embeddings()(torch.randint(3, VOCABULARY, (2, 5)))
    with pytest.raises(ValueError, match=r"token ids of shape \(2, 5\), but the model was called without ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="call the model with input_ids"):
        find_feed_forwards(model)[0](embeds)


def test_enclosing_model_provides_token_ids():
    """As models of pictures and text do, which give the inner one embeddings."""

    class Around(transformers.LlamaPreTrainedModel):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.text = transformers.LlamaModel(config)

        def forward(self, input_ids, attention_mask=None):
            embeds = self.text.get_input_embeddings()(input_ids)
            return self.text(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state

    model = Around(ARCHITECTURES["llama"].build().config).eval()
    ids = torch.randint(3, VOCABULARY, (2, 5))
    before = model(ids)
    upcycle(model, num_experts=4, gate=make_hash_gate)
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-5)


def test_hash_tables_are_saved(tmp_path):
    model, _ = build_model("gpt2")
    model.save_pretrained(tmp_path)
    loaded, ids = from_pretrained(tmp_path).eval(), torch.randint(3, VOCABULARY, (2, 5))
    assert repr(find_feed_forwards(loaded)[0].moe.gate) == repr(find_feed_forwards(model)[0].moe.gate)
    assert loaded(ids).logits.equal(model(ids).logits)
