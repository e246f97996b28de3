"""A forward that is run again gives the same bits: activation checkpointing and reversible layers."""

import pytest
import torch
from support.layer_variants import ALL_VARIANTS, LayerVariant, assert_all_equal, compute_gradients, run_layer
from torch.utils.checkpoint import checkpoint

paths_and_routers = pytest.mark.parametrize("path", ALL_VARIANTS, ids=str)


def compute_loss(out, aux_loss):
    """As `gradients` weighs it."""
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + aux_loss


def gradients_by_backward(layer, x, loss):
    """Gradients as reentrant checkpointing needs them: collected in `.grad`."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    loss.backward()
    named = {"input": x, **dict(layer.named_parameters())}
    return {name: torch.zeros_like(t) if t.grad is None else t.grad.clone() for name, t in named.items()}


def check_both_kinds(layer, x, mask):
    """Outputs and gradients equal to the last bit; a draw in between shows that the state of the generator is kept."""
    expected = run_layer(layer, x, mask)
    expected_grads = compute_gradients(layer, x, expected)
    for use_reentrant in (False, True):
        torch.manual_seed(2)
        actual = checkpoint(layer, x, mask, use_reentrant=use_reentrant, preserve_rng_state=True)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        torch.rand(7)
        assert_all_equal(gradients_by_backward(layer, x, compute_loss(*actual)), expected_grads)


@pytest.mark.feature("activation checkpointing of both kinds (random policy, jitter, noise): the same bits")
@paths_and_routers
def test_checkpointing(path):
    check_both_kinds(path.build(), *path.inputs())


@pytest.mark.parametrize("experts", ["Experts", "GatedExperts"])
def test_few_tokens(experts):
    """The way that few rows take in inference is not taken in training, where the graph would take another."""
    path = LayerVariant("MoE", experts, "dropless", "plain")
    check_both_kinds(path.build(), *path.inputs(1, 5))
    check_recomputed(path.build(), *path.inputs(1, 5))


class Recomputed(torch.autograd.Function):
    """Runs a layer without a graph and, in the backward, again with one, as reversible networks do."""

    @staticmethod
    def forward(ctx, layer, mask, x, *parameters):
        ctx.layer, ctx.mask, ctx.state = layer, mask, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x, mask=mask)

    @staticmethod
    def backward(ctx, *grads):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            results = ctx.layer(x, mask=ctx.mask)
        inputs = [x, *ctx.layer.parameters()]
        return None, None, *torch.autograd.grad(results, inputs, grads, allow_unused=True)


def check_recomputed(layer, x, mask):
    expected = run_layer(layer, x, mask)
    torch.manual_seed(2)
    actual = Recomputed.apply(layer, mask, x, *layer.parameters())
    torch.rand(7)
    assert torch.equal(actual[0], expected[0])
    assert_all_equal(gradients_by_backward(layer, x, compute_loss(*actual)), compute_gradients(layer, x, expected))


@pytest.mark.feature("reversible layers (no_grad, then again with the same state of the generator): the same bits")
@paths_and_routers
def test_reversible(path):
    check_recomputed(path.build(), *path.inputs())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("layer_name", ["MoE", "HeirarchicalMoE"])
def test_checkpointing_under_autocast(layer_name, use_reentrant):
    path = LayerVariant(layer_name, "Experts", "capacity", "masked")
    layer, (x, mask) = path.build(), path.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_layer(layer, x, mask)
        torch.manual_seed(2)
        actual = checkpoint(layer, x, mask, use_reentrant=use_reentrant)
    expected_grads = compute_gradients(layer, x, expected)
    assert_all_equal(gradients_by_backward(layer, x, compute_loss(*actual)), expected_grads)
