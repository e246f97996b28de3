"""Feed-forward networks of known models are found, replaced by mixtures, and copied into their experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.transformers_models import ARCHITECTURES, DIM, HIDDEN, LLAMA, disable_dropout
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaModel

from mixture_of_experts import NoisyTopKGating, Top2Gating, TopKGating
from mixture_of_experts.gating import ExpertChoiceGating, HashGating, ReLUGating, SparseMixerGating, TopPGating
from mixture_of_experts.gating.steps import LearnedScale, NormalizeBy
from mixture_of_experts.huggingface import MoEFeedForward, aux_loss, export, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards

from .test_saving import CustomGate

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def count_calls(model: nn.Module) -> list[int]:
    calls = [0] * len(find_feed_forwards(model))
    for i, module in enumerate(find_feed_forwards(model)):
        module.moe.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    return calls


@each_architecture
@pytest.mark.parametrize("granularity", [1, 2])
def test_upcycled_models_compute_the_same(name, granularity):
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    before = model(**inputs)
    assert upcycle(model, num_experts=4, k=2, granularity=granularity) == architecture.names()
    calls = count_calls(model)
    after = model(**inputs)
    assert type(after) is type(before)
    assert after.keys() == before.keys()
    assert before.logits.std() > 0.1
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)
    assert calls == [1] * len(calls)
    experts = find_feed_forwards(model)[0].moe.experts
    assert experts.w1.shape == (4, DIM, HIDDEN // granularity)


@each_architecture
def test_experts_are_new_and_train(name):
    """Every parameter of every layer gets a gradient, and the loss holds the auxiliary one."""
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    before = model(**inputs).logits
    assert replace_ffn(model, num_experts=4, k=2, hidden_dim=16) == architecture.names()
    assert (model(**inputs).logits - before).abs().max() > 1e-2
    for p in model.parameters():
        p.requires_grad_(False)
    for module in find_feed_forwards(model):
        module.requires_grad_()
    labels = architecture.labels(inputs)
    alone = model(**inputs, labels=labels).loss
    loss = disable_dropout(model).train()(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, alone + aux_loss(model))
    assert aux_loss(model) > 0
    loss.backward()
    for module in find_feed_forwards(model):
        for path, parameter in module.named_parameters():
            assert parameter.grad is not None, path
            assert parameter.grad.abs().sum() > 0, path


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([1], [1]),
        (1, [1]),
        ([0, "model.layers.1.mlp"], [0, 1]),
        ("model.layers.0.mlp", [0]),
        (lambda name: name.endswith("1.mlp"), [1]),
    ],
)
def test_layers(layers, expected):
    model = ARCHITECTURES["llama"].build()
    assert replace_ffn(model, layers=layers) == [f"model.layers.{i}.mlp" for i in expected]
    assert [isinstance(layer.mlp, MoEFeedForward) for layer in model.model.layers] == [i in expected for i in (0, 1)]


@pytest.mark.parametrize("layers", [[2], ["model.layers.7.mlp", 0], [], lambda name: False])
def test_unknown_layers_raise(layers):
    assert_rejected(replace_ffn, dict(layers=layers), r"select from the networks model.layers.0.mlp.*, but it selected")


ONE_GATE = TopKGating(DIM, 4, 2)


@pytest.mark.parametrize("change", [replace_ffn, upcycle])
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(gate=lambda d, e: None), r"expected gate to return a new gate .* lambda d, e: .* but it returned None"),
        (dict(gate=lambda d, e: TopKGating), r"gate to return a new gate .* but it returned <class .*TopKGating"),
        (dict(gate=ONE_GATE), r"expected gate to return a new gate .* but got TopKGating\("),
        (dict(gate="topk"), r"expected gate to return a new gate .* lambda d, e.* got 'topk'"),
        (dict(gate=lambda d, e: ONE_GATE), r"expected gate .* a TopKGating that .*uses"),
        (dict(layers=True), "expected `layers` to contain block numbers .* but got True; omit `layers` to replace all"),
        (dict(layers=1.0), "expected `layers` to contain .* but got 1.0; omit"),
        (dict(layers=nn.GELU), r"expected `layers` to contain .* but got <class .*GELU'>; omit"),
        (dict(layers=torch.tensor(0)), r"expected `layers` to contain .* but got tensor\(0\); omit"),
        (dict(adapters={"LlamaMLP": nn.Linear}), "dict that maps class names to Adapter.* got {'LlamaMLP'"),
        (dict(adapters=[1]), r"expected adapters to be a dict .* got \[1\]"),
    ],
)
def test_rejects_wrong_values(change, settings, problem):
    assert_rejected(change, settings, problem)


@pytest.mark.parametrize("call", [replace_ffn, upcycle, export, aux_loss])
@pytest.mark.parametrize("model", ["folder", LlamaModel, LlamaConfig(), None, []])
def test_rejects_non_models_on_entry(call, model):
    with pytest.raises(TypeError, match=r"model must be a model .*, got .*; construct or load"):
        call(model)


def test_rejects_zero_hidden_dim():
    """0 is no word for the network's own."""
    assert_rejected(replace_ffn, dict(hidden_dim=0), "hidden_dim must be an integer of at least 1, got 0; ")


def assert_rejected(change, settings, problem):
    """The model stays as it was."""
    model, inputs = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].inputs()
    before, config = model(**inputs).logits, model.config.to_dict()
    with pytest.raises((TypeError, ValueError), match=problem):
        change(model, **{"num_experts": 4, **settings})
    assert not find_feed_forwards(model)
    assert model.config.to_dict() == config
    assert torch.equal(model(**inputs).logits, before)


def test_rejects_reused_gate():
    model = ARCHITECTURES["llama"].build()
    gate = TopKGating(DIM, 4, 2)
    replace_ffn(model, num_experts=4, layers=[0], gate=lambda d, e: gate)
    with pytest.raises(ValueError, match=r"expected gate to return .* another layer already uses"):
        replace_ffn(model, num_experts=4, layers=[1], gate=lambda d, e: gate)
    assert len(find_feed_forwards(model)) == 1


def test_print_shows_what_was_replaced():
    """The layer, the linear layer that it stands for, and whether it has a mask: Whisper's encoder hears all frames."""
    shown = {name: ARCHITECTURES[name].build() for name in ("llama", "whisper")}
    for model in shown.values():
        replace_ffn(model, num_experts=4)
    assert repr(shown["llama"].model.layers[1].mlp).startswith("MoEFeedForward(\n  (moe): MoE(")
    assert repr(shown["llama"].model.layers[1].mlp.gate_proj) == "Replaced(by experts)"
    assert ["masked=False" in repr(part) for part in shown["whisper"].model.children()] == [True, False]


def test_no_network_found_lists_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"no feed-forward .* modules are Linear, ReLU, Sequential"):
        replace_ffn(model)
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model)
    with pytest.raises(ValueError, match="its blocks already have routers and experts"):
        replace_ffn(model)


def assert_unchanged(name: str = "llama", **settings) -> nn.Module:
    """The upcycled model, which computes what it did."""
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    before = model(**inputs).logits
    upcycle(model, **settings)
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=0)
    return model


@pytest.mark.parametrize("granularity", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_that_add_up_to_another_number(granularity, scale):
    """As those of DeepSeek-V3."""
    gate = lambda d, e: TopKGating(d, e, 3, score="sigmoid", scale=scale)  # noqa: E731
    assert_unchanged("llama_bias", num_experts=6, gate=gate, granularity=granularity)


@pytest.mark.parametrize(
    "gate",
    [
        lambda d, e: Top2Gating(d, e, second_policy_eval="all", capacity_factor_eval=None),
        lambda d, e: Top2Gating(d, e, second_policy_eval="all", capacity_factor_eval=4.0),
        lambda d, e: TopKGating(d, e, capacity_factor_eval=2.0),  # as many slots as tokens
        lambda d, e: TopKGating(d, e, 4, normalize=False),
        lambda d, e: TopKGating(d, e, weigh="softmax", normalize=False, scale=0.5),
        lambda d, e: TopKGating(d, e, weigh=LearnedScale(e)),
        lambda d, e: TopKGating(d, e, normalize=NormalizeBy(eps=1e-12)),
        lambda d, e: TopPGating(d, e, 3, normalize=True),
        lambda d, e: CustomGate(d, e, normalize=True),  # its weights are computed once to see
        NoisyTopKGating,
    ],
)
def test_gates_whose_weights_add_up(gate):
    assert_unchanged(num_experts=4, gate=gate)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(k=1), "do not have a constant sum"),
        (dict(gate=lambda d, e: TopKGating(d, e, 2, normalize=False)), "do not have a constant sum"),
        (dict(gate=lambda d, e: Top2Gating(d, e, capacity_factor_eval=None)), "do not have a constant sum"),
        (dict(gate=lambda d, e: Top2Gating(d, e, second_policy_eval="all")), "Top2Gating with capacity_factor_eval=2"),
        (dict(gate=lambda d, e: TopKGating(d, e, capacity_factor_eval=1.5)), "capacity_factor_eval=1.5 drops choices"),
        (dict(gate=lambda d, e: TopPGating(d, e, 3)), "TopPGating assigns .* do not have a constant sum .sums range"),
        (
            dict(gate=lambda d, e: TopPGating(d, e, 1, p=0.01)),
            "TopPGating assigns .* do not have a constant sum .sums range",
        ),
        (
            dict(gate=lambda d, e: ReLUGating(d, e, 2, mean_choices=1)),
            "ReLUGating assigns .* do not have a constant sum",
        ),
        (dict(gate=lambda d, e: HashGating(d, e, 1, num_ids=64)), "HashGating assigns .* do not have a constant sum"),
        (dict(gate=SparseMixerGating), "SparseMixerGating assigns .* do not have a constant sum"),
        (dict(gate=lambda d, e: TopKGating(d, e, eps=1.0)), "do not have a constant sum .sums range"),
        (
            dict(gate=lambda d, e: CustomGate(d, e, normalize=False)),
            "CustomGate assigns .* do not have a constant sum .sums range",
        ),
        (dict(gate=ExpertChoiceGating), "uses expert choice"),
        (dict(k=3, granularity=2), "do not have a constant sum"),
        (dict(num_experts=5, granularity=2), "num_experts=5 must be a multiple of granularity=2"),
        (dict(num_experts=10, k=5, granularity=5), "must divide the 48 hidden units"),
        (dict(granularity=0), "granularity must be an integer"),
        (dict(noise=-1.0), "noise must be a finite number of at least 0"),
        (dict(redraw=1.5), "expected `redraw` to be a fraction from 0 to 1, but got 1.5"),
        (dict(shared_expert=HIDDEN), "1 must divide the 0 hidden units not used by shared_expert=48"),
        (dict(shared_expert=9, granularity=2), "must divide the 39 hidden units not used by shared_expert=9"),
        (dict(shared_expert=0), "shared_expert"),
        (dict(shared_expert=True), "shared_expert"),
    ],
)
def test_upcycle_rejects_settings(settings, problem):
    assert_rejected(upcycle, settings, problem)


def test_rejected_call_restores_modes():
    """Also that of T5's dropout between the layers, which experts would share with the network."""
    model = ARCHITECTURES["t5"].build(dropout_rate=0.5).train()
    with pytest.raises(ValueError, match="do not have a constant sum"):
        upcycle(model, num_experts=4, k=1)
    assert [name for name, module in model.named_modules() if not module.training] == []


def test_noise_and_redrawn_units():
    for settings in (dict(noise=0.1), dict(redraw=0.25)):
        dense = ARCHITECTURES["llama"].build()
        mlp = dense.model.layers[0].mlp
        old = {"w1": mlp.gate_proj.weight.T.clone(), "w2": mlp.down_proj.weight.T.clone()}
        upcycle(dense, num_experts=4, layers=[0], **settings)
        if "noise" in settings:
            difference = find_feed_forwards(dense)[0].moe.experts.w1 - old["w1"]
            assert difference.std().item() == pytest.approx(0.1 * old["w1"].std().item(), rel=0.05)
    experts = find_feed_forwards(dense)[0].moe.experts
    new_units = (experts.w1 != old["w1"]).all(dim=1)  # (e, h)
    assert torch.equal(new_units, (experts.w2 != old["w2"]).all(dim=2))
    assert torch.equal(new_units, (experts.w1 != old["w1"]).any(dim=1))
    assert new_units.sum(dim=1).tolist() == [12] * 4
    assert not torch.equal(new_units[0], new_units[1])
    drawn = experts.w1.transpose(1, 2)[new_units]
    assert drawn.std().item() == pytest.approx(old["w1"].std().item(), rel=0.1)


def test_dtype_device_and_mode_stay():
    model = ARCHITECTURES["llama"].build().to(torch.bfloat16).train()
    model.model.layers[1].eval()
    replace_ffn(model, gate=lambda d, e: TopKGating(d, e, expert_bias=True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert find_feed_forwards(model)[0].moe.gate.expert_bias.dtype == torch.float32
    assert [module.moe.training for module in find_feed_forwards(model)] == [True, False]
    with torch.device("meta"):
        shapes = LlamaModel(LlamaConfig(**LLAMA, vocab_size=9))
    upcycle(shapes, num_experts=4)
    assert find_feed_forwards(shapes)[0].moe.experts.w1.is_meta


class Rounded(nn.Linear):
    """As quantised layers are: one of the linear layers by its class, and something else by what it computes."""

    def forward(self, x):
        return super().forward(x).mul(4).round().div(4)


class Packed(nn.Module):
    """As quantised layers of other packages are: no class of torch's, weights in integers."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.ones(out_features, in_features, dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.T.to(x.dtype)


def test_rejects_unreadable_networks():
    for name, kind, error, says in (
        ("llama", Rounded, ValueError, "model.layers.1.mlp does not match Adapter.* depends only on tokens"),
        ("llama", Packed, TypeError, "expected up_proj of LlamaMLP to be an nn.Linear, but it is a Packed"),
        ("opt", Rounded, TypeError, "expected fc1 of OPTDecoderLayer to be an nn.Linear, but it is a Rounded"),
    ):
        model = ARCHITECTURES[name].build()
        part = model.model.layers[1].mlp if name == "llama" else model.model.decoder.layers[1]
        setattr(part, "up_proj" if name == "llama" else "fc1", kind(DIM, HIDDEN))
        with pytest.raises(error, match=says):
            replace_ffn(model)
        assert not find_feed_forwards(model)
    model = ARCHITECTURES["bert"].build(chunk_size_feed_forward=2)
    with pytest.raises(ValueError, match="chunk_size_feed_forward = 0"):
        replace_ffn(model)


class Doubled(nn.Linear):
    """A subclass with an attribute and nothing else: it computes the same."""

    doubled = True


def test_linear_subclasses_are_linear():
    """Also within another module."""
    model, inputs = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].inputs()
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(DIM, HIDDEN))
    model.model.layers[1].mlp.down_proj = Doubled(HIDDEN, DIM, bias=False)
    before = model(**inputs).logits
    upcycle(model, num_experts=4)
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=0)
    assert [module.moe.experts.b3 is not None for module in find_feed_forwards(model)] == [True, False]
    assert all(module.moe.experts.b1 is None for module in find_feed_forwards(model))


@torch.no_grad()
def test_hooks_on_a_network_stay():
    model, tokens = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval(), torch.arange(10)
    called: list[Any] = []
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: called.append(out.shape))
    model(tokens[None])
    wanted = called.copy()
    replace_ffn(model, num_experts=4)
    called.clear()
    model(tokens[None])
    assert called == wanted == [(1, 10, 32)]
    handle.remove()
    model(tokens[None])
    assert called == wanted
