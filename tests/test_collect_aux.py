"""Auxiliary losses of layers deep in a model are collected, each once, and with their gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support import reentrant_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import HeirarchicalMoE, MoE, TopKGating, collect_aux

DIM = 8


class FeedForward(nn.Module):
    """Returns the output alone."""

    def __init__(self, moe: nn.Module | None = None) -> None:
        super().__init__()
        self.moe = MoE(DIM, 4, hidden_dim=16, gate=TopKGating(DIM, 4)) if moe is None else moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


class Model(nn.Module):
    def __init__(self, reentrant: Any = None) -> None:
        super().__init__()
        two_levels = HeirarchicalMoE(DIM, (2, 2), hidden_dim=16, second_policy_train="all")
        self.blocks = nn.ModuleList([FeedForward(), FeedForward(), FeedForward(two_levels)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        run = self.reentrant if callable(self.reentrant) else partial(checkpoint, use_reentrant=self.reentrant)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else run(block, x))
        return x


def collect_by_hand(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros(())
    for block in model.blocks:
        out, aux_loss = block.moe(x)
        x, total = x + out, total + aux_loss
    return x, total


def compute_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.fixture
def make_inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 6, DIM)


@pytest.mark.parametrize("within", [None, "blocks", "model"])
def test_the_sum_and_its_gradient(make_inputs, within):
    """Also of weighted sums, and with the backward inside the context, where a checkpoint of blocks, or around the
    model, runs layers again: that is no other forward."""
    model = Model(False if within == "blocks" else None)
    with collect_aux(model) as aux:
        out = checkpoint(model, make_inputs, use_reentrant=False) if within == "model" else model(make_inputs)
        loss = aux.take()
        found = compute_gradients(model, 0.3 * out.square().mean() + 0.7 * loss)
        with pytest.raises(RuntimeError, match="no auxiliary loss was collected"):
            aux.take()
    expected_out, expected = collect_by_hand(model, make_inputs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, compute_gradients(model, 0.3 * expected_out.square().mean() + 0.7 * expected))


def test_forwards_add_up(make_inputs):
    model = Model()
    with collect_aux(model) as aux:
        model(make_inputs)
        model(2 * make_inputs)
    torch.testing.assert_close(
        aux.take(), collect_by_hand(model, make_inputs)[1] + collect_by_hand(model, 2 * make_inputs)[1]
    )


def test_rejects_reentrant_checkpointing(make_inputs):
    model = Model(reentrant=True)
    with collect_aux(model), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(make_inputs.requires_grad_())
    with collect_aux(model.eval()) as aux:
        model(make_inputs)
    assert aux.take() > 0


def test_rejects_foreign_checkpointing(make_inputs):
    """In the backward that runs a layer again, as its loss would get no gradient. What ran without gradients and never
    again is fine."""
    model = Model(reentrant_checkpoint.checkpoint)
    make_inputs.requires_grad_()
    with collect_aux(model) as aux:
        loss = model(make_inputs).sum() + aux.take()
        with pytest.raises(RuntimeError, match=r"a .*MoE runs under reentrant .* use_reentrant=False"):
            loss.backward()
        model.reentrant = False
        loss = model(make_inputs).sum() + aux.take()
        model.reentrant = None
        with torch.no_grad():
            model(make_inputs)
        loss.backward()


def test_foreign_checkpointing_counts_once(make_inputs):
    """Its first run, which has no gradients."""
    model = Model()
    with collect_aux(model) as aux:
        reentrant_checkpoint.checkpoint(model, make_inputs.requires_grad_()).sum().backward()
        found = aux.take()
    torch.testing.assert_close(found, collect_by_hand(model, make_inputs)[1].detach())


def test_rejects_calls_outside_the_model(make_inputs):
    model = Model()
    with collect_aux(model), pytest.raises(RuntimeError, match="outside a forward pass of the module"):
        model.blocks[0](make_inputs)


def test_rejects_gates_without_loss(make_inputs):
    class OutputOnly(MoE):
        def forward(self, inputs, mask=None):
            return super().forward(inputs, mask)[0]

    with pytest.raises(ValueError, match=r"Linear has no gate; .* to collect_aux"), collect_aux(nn.Linear(2, 2)):
        pass
    alone = nn.ModuleList([MoE(DIM, 4), TopKGating(DIM, 4)])
    with pytest.raises(TypeError, match=r"'1' \(TopKGating\): it is not part of an MoE layer"), collect_aux(alone):
        pass
    with collect_aux(alone, gates=["0.gate"]):
        pass
    model = nn.Sequential(OutputOnly(DIM, 4))
    with collect_aux(model), pytest.raises(TypeError, match="expected OutputOnly to return"):
        model(make_inputs)


def test_encoder_layer_of_torch(make_inputs):
    """As in the README: in training and on the path that eval would otherwise skip."""
    layer = nn.TransformerEncoderLayer(DIM, 2, batch_first=True, norm_first=True)
    layer.linear1 = layer.activation = layer.dropout = nn.Identity()
    layer.linear2 = FeedForward()
    layer.activation_relu_or_gelu = 0
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for mode in (True, False):
        with collect_aux(model.train(mode)) as aux, torch.set_grad_enabled(mode):
            model(make_inputs)
        assert aux.take() > 0


def test_x_transformers(make_inputs):
    x_transformers = pytest.importorskip("x_transformers")
    model = x_transformers.Encoder(dim=DIM, depth=2, heads=2, attn_dim_head=4)
    replaced = [module for module in model.modules() if type(module).__name__ == "FeedForward"]
    for module in replaced:
        module.ff = FeedForward()
    with collect_aux(model) as aux:
        out = model(make_inputs)
    assert len(replaced) == 2
    reach_routers(model, out.square().mean() + aux.take(), 2)


def test_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=DIM, depth=2, num_heads=2, num_classes=3
    )
    for block in model.blocks:
        block.mlp = FeedForward()
    with collect_aux(model) as aux:
        out = model(torch.randn(2, 3, 32, 32))
    reach_routers(model, out.square().mean() + aux.take(), 2)


def reach_routers(model: nn.Module, loss: Tensor, routers: int) -> None:
    """Every router gets a gradient."""
    loss.backward()
    found = [p.grad for name, p in model.named_parameters() if name.endswith("w_gating")]
    assert len(found) == routers
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found)
