"""Two identical runs give identical bits, whatever was in memory before."""

import contextlib

import pytest
import torch
from support.layer_variants import ALL_VARIANTS, LAYER_VARIANTS, LayerVariant, compute_gradients, run_layer

paths = pytest.mark.parametrize("path", LAYER_VARIANTS, ids=str)
gpu_needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextlib.contextmanager
def use_deterministic_algorithms():
    """Operators without a deterministic form raise, and fresh memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train_layer(layer, x, mask, steps=3):
    """Parameters and losses of a few steps, as one list."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        out, aux_loss = layer(x, mask=mask)
        loss = (out.float() - 1).square().mean() + aux_loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert all(loss.isfinite() for loss in losses)
    return [*losses, *(parameter.detach() for parameter in layer.parameters())]


def check_two_runs(build, x, mask):
    with use_deterministic_algorithms():
        first, second = train_layer(build(), x, mask), train_layer(build(), x, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.feature("two runs, the same bits (`use_deterministic_algorithms`, memory poisoned with NaN)")
@pytest.mark.parametrize("path", ALL_VARIANTS, ids=str)
def test_two_runs(path):
    check_two_runs(path.build, *path.inputs())


@pytest.mark.slow
@pytest.mark.parametrize("layer_name", ["MoE", "HeirarchicalMoE"])
def test_threads(layer_name):
    """Large enough that the work is shared by two threads."""
    path = LayerVariant(layer_name, "Experts", "capacity", "plain")
    x, _ = path.inputs(8, 512)
    torch.set_num_threads(2)
    check_two_runs(path.build, x, None)


@pytest.mark.feature("on CUDA two backwards give the same bits (many tokens, no deterministic mode asked for)")
@gpu_needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@paths
def test_cuda(path, dtype):
    layer = path.build().to("cuda", dtype)
    x, mask = path.inputs(4, 500, dtype=dtype, device="cuda")
    first, second = (compute_gradients(layer, x, run_layer(layer, x, mask)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
