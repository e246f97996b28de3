"""Layers of torch, alone, in its encoder and in its decoder: upcycled, they compute what they did."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from mixture_of_experts.huggingface import Adapter, aux_loss, replace_ffn, upcycle
from mixture_of_experts.stats import track_routing

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which torch itself makes

DIM, HEADS, H = 16, 2, 24
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "module": nn.GELU(), "silu": nn.functional.silu}


def make_layer(**options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, HEADS, H, **(dict(dropout=0.1, batch_first=True) | options))


def make_encoder(**options) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it does without nested tensors anyway, it says so
        return nn.TransformerEncoder(make_layer(**options), 2)


@pytest.fixture
def make_inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 6, DIM)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("make", [make_layer, make_encoder])
def test_upcycled_it_computes_the_same(make, norm_first, activation, make_inputs):
    """In eval without gradients, where torch fuses the layer, with gradients, and with padding."""
    torch.manual_seed(0)
    model = make(norm_first=norm_first, activation=ACTIVATIONS[activation]).eval()
    dense = copy.deepcopy(model)
    assert upcycle(model, num_experts=4) == (
        ["linear2"] if make is make_layer else ["layers.0.linear2", "layers.1.linear2"]
    )
    for padding in (None, PADDING):
        for with_gradients in (False, True):
            with torch.set_grad_enabled(with_gradients):
                wanted, found = (each(make_inputs, src_key_padding_mask=padding) for each in (dense, model))
            real = slice(None) if padding is None else ~padding  # the fused path gives zeros at padding
            torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


def test_one_of_two_layers(make_inputs):
    """The first layer, which is dense, does not hand nested tensors to the other."""
    model = make_encoder().eval()
    dense = copy.deepcopy(model)
    assert upcycle(model, num_experts=4, layers=[1]) == ["layers.1.linear2"]
    with torch.no_grad():
        wanted, found = (each(make_inputs, src_key_padding_mask=PADDING) for each in (dense, model))
    torch.testing.assert_close(found[~PADDING], wanted[~PADDING], atol=1e-5, rtol=1e-5)


def test_layer_inserted_into_encoder(make_inputs):
    one = make_layer(dropout=0.0).eval()
    dense = nn.TransformerEncoder(copy.deepcopy(one), 2).eval()
    upcycle(one, num_experts=4)
    with pytest.warns(UserWarning, match="activation_relu_or_gelu was not True"):
        model = nn.TransformerEncoder(one, 2).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(make_inputs), dense(make_inputs), atol=1e-5, rtol=1e-5)


def test_a_decoder_and_both(make_inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(DIM, HEADS, 1, 1, H, batch_first=True, norm_first=True).eval()
    dense = copy.deepcopy(model)
    assert upcycle(model, num_experts=4) == ["encoder.layers.0.linear2", "decoder.layers.0.linear2"]
    masks = dict(src_key_padding_mask=PADDING, tgt_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)
    with torch.no_grad(), track_routing(model) as stats:
        wanted, found = (each(make_inputs, make_inputs, **masks) for each in (dense, model))
    torch.testing.assert_close(found[~PADDING], wanted[~PADDING], atol=1e-5, rtol=1e-5)
    assert [record.tokens for record in stats.latest()] == [10, 10]


@pytest.mark.parametrize("alone", [False, True])
def test_it_trains_and_padding_counts_nowhere(alone, make_inputs):
    model = make_layer(dropout=0.0) if alone else make_encoder(dropout=0.0)
    replace_ffn(model, num_experts=4, loss_coef=0.5, z_loss_coef=0.1)
    losses = []
    for inputs in (make_inputs, torch.where(PADDING.unsqueeze(-1), 9.0, make_inputs)):
        out = model(inputs, src_key_padding_mask=PADDING)
        losses.append(aux_loss(model))
    torch.testing.assert_close(*losses)
    (out[~PADDING].square().mean() + losses[-1]).backward()
    assert all(p.grad is not None for p in model.parameters())
    with track_routing(model) as stats:
        model(make_inputs, src_key_padding_mask=PADDING)
    assert all(record.tokens == 10 for record in stats.latest())


def test_sequences_are_first():
    model = nn.TransformerEncoder(make_layer(batch_first=False), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"takes tokens \(n, b, d\).*batch_first=True and load the same weights"):
        upcycle(model, num_experts=4)


class CustomLayer(nn.TransformerEncoderLayer):
    """A layer whose network is code of its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.activation(self.linear1(x)) * 2))


def test_custom_code_is_not_mistaken_for_torch():
    with pytest.raises(ValueError, match="no feed-forward network was found in CustomLayer"):
        upcycle(CustomLayer(DIM, HEADS, H, batch_first=True), num_experts=4)


class Block(nn.Module):
    """A block whose network has a hidden layer of 8 units."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def test_a_network_narrower_than_its_inputs(make_inputs):
    """It may be an adapter, so it is left alone, and replaced where an adapter says so."""
    model = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())}).eval()
    with pytest.raises(ValueError, match=r"no feed-forward network was found .* its modules are Block"):
        upcycle(model, num_experts=4)
    wanted = model["blocks"](make_inputs)
    described = Adapter("up", "down", activation="act", slot=True, bypass=("up", "act"))
    assert upcycle(model, num_experts=4, adapters={"Block": described}) == ["blocks.0.down", "blocks.1.down"]
    torch.testing.assert_close(model["blocks"](make_inputs), wanted, atol=1e-5, rtol=1e-5)
