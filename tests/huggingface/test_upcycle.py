"""Shared experts, ties, frozen models: what upcycling does to each."""

from __future__ import annotations

import pytest
import torch
from support.transformers_models import ARCHITECTURES, DIM, HIDDEN
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ApertusConfig, ApertusForCausalLM

from mixture_of_experts.huggingface import Adapter, from_pretrained, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards

from .test_losses import compute_gradients
from .test_saving import same_weights

pytestmark = pytest.mark.slow

SOME = ["llama", "llama_bias", "gpt2", "bert", "phi3", "t5_gated", "whisper"]


def make_apertus():
    """A model whose activations have parameters, not all equal, and its inputs."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = ApertusForCausalLM(ApertusConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    for i, layer in enumerate(model.model.layers):
        nn.init.constant_(layer.mlp.act_fn.alpha_p, 0.3 + i)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [{}, dict(granularity=2, k=4), dict(shared_expert=16)],
    ids=["plain", "slices", "shared"],
)
def test_an_activation_with_parameters_keeps_them(settings):
    model, tokens = make_apertus(), torch.arange(10).view(2, 5)
    before = model(tokens).logits
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    upcycle(model, 4, **settings)
    torch.testing.assert_close(model(tokens).logits, before, atol=1e-6, rtol=0)
    for i, feed_forward in enumerate(find_feed_forwards(model)):
        torch.testing.assert_close(feed_forward.moe.experts.act.alpha_p, torch.tensor([0.3 + i]))
        assert {n for n, p in feed_forward.moe.named_parameters() if p.requires_grad} == {"gate.w_gating"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("granularity", [1, 2])
def test_a_shared_expert_takes_the_first_units(name, granularity, tmp_path):
    """And the model computes what it did; saved and loaded too."""
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    before = model(**inputs).logits
    upcycle(model, num_experts=4, granularity=granularity, shared_expert=16)
    moe = find_feed_forwards(model)[0].moe
    assert (moe.experts.hidden_dim, moe.shared_expert.hidden_dim) == ((HIDDEN - 16) // granularity, 16)
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    for loaded in (from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        same_weights(loaded, model)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_new_shared_expert():
    """Its own width, drawn as linear layers are; every token passes it."""
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4, hidden_dim=16, shared_expert=64)
    moe = find_feed_forwards(model)[0].moe
    assert moe.shared_expert.gate_proj.weight.shape == (64, DIM)
    assert moe.shared_expert.gate_proj.weight.std().item() == pytest.approx((3 * DIM) ** -0.5, rel=0.1)
    assert moe.shared_expert.down_proj.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    x = torch.randn(2, 5, DIM)
    with_shared = moe(x)[0]
    shared, moe.shared_expert = moe.shared_expert, None
    h = nn.functional.silu(shared.gate_proj(x)) * shared.up_proj(x)
    torch.testing.assert_close(with_shared, moe(x)[0] + shared.down_proj(h))


class Draws(TorchDispatchMode):
    """Notes the shapes that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not out.is_meta:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("name", SOME)
def test_nothing_is_drawn_that_is_overwritten(name):
    """Routers alone are drawn, and no memory stays as it was found."""
    model = ARCHITECTURES[name].build()
    with Draws() as draws:
        upcycle(model, num_experts=4, shared_expert=8)
    parts = [part for module in find_feed_forwards(model) for part in (module.moe.experts, module.moe.shared_expert)]
    assert not set(draws.shapes) & {tuple(weight.shape) for part in parts for weight in part.parameters()}
    assert draws.shapes.count((DIM, 4)) == len(find_feed_forwards(model))
    assert all(value.isfinite().all() for module in find_feed_forwards(model) for value in module.parameters())


@pytest.mark.parametrize("name", SOME)
def test_frozen_model_trains_only_routers(name):
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    model.requires_grad_(False)
    upcycle(model, num_experts=4, shared_expert=8)
    trains = [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trains) == len(find_feed_forwards(model))
    assert all(parameter_name.endswith("moe.gate.w_gating") for parameter_name in trains)
    model(**inputs, labels=ARCHITECTURES[name].labels(inputs)).loss.backward()
    found = compute_gradients(model)
    assert found.keys() == set(trains)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_partly_frozen_weights_stay_frozen():
    model = ARCHITECTURES["llama"].build()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    upcycle(model, num_experts=4)
    first, second = (module.moe.experts for module in find_feed_forwards(model))
    assert [first.w1.requires_grad, first.w3.requires_grad, first.w2.requires_grad] == [True, False, True]
    assert all(parameter.requires_grad for parameter in second.parameters())
    frozen = ARCHITECTURES["llama"].build().requires_grad_(False)
    replace_ffn(frozen, num_experts=4)  # new experts have everything to learn
    assert all(parameter.requires_grad for module in find_feed_forwards(frozen) for parameter in module.parameters())


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.act(self.enter(x)))


MLP = {"Mlp": Adapter(up="enter", down="leave", activation="act")}


@pytest.mark.parametrize("change", [upcycle, replace_ffn])
def test_shared_network_stays_shared(change):
    """All of them, not the first alone."""
    mlp, x = Mlp(), torch.randn(2, 5, 8)
    model = nn.ModuleList([nn.Sequential(mlp), nn.Sequential(mlp), nn.Sequential(Mlp())]).eval()
    before = model[1](x)
    assert change(model, num_experts=4, adapters=MLP) == ["0.0", "2.0"]
    assert model[0][0] is model[1][0]
    assert model[0][0] is not model[2][0]
    if change is upcycle:
        torch.testing.assert_close(model[1](x), before)


@pytest.mark.parametrize("change", [upcycle, replace_ffn])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_rejects_tied_networks(change, part):
    model = nn.Sequential(Mlp(), Mlp(), Mlp())
    setattr(model[2].leave, part, getattr(model[0].leave, part))
    with pytest.raises(ValueError, match=r"0\.leave.* shares its weight.*layers="):
        change(model, num_experts=4, adapters=MLP)
    assert type(model[0]) is type(model[1]) is Mlp
    assert change(model, num_experts=4, layers=[1], adapters=MLP) == ["1"]


def test_rejects_tied_network():
    model = nn.Sequential(Mlp(), nn.Linear(8, 12))
    model[1].weight = model[0].enter.weight
    with pytest.raises(ValueError, match=r"0\.enter shares its weight"):
        upcycle(model, num_experts=4, adapters=MLP)
