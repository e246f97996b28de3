"""The experts' products over rows: the operators of the CPU, and products in blocks, against one product an expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_experts import Experts, MoE, TopKGating, chunks
from mixture_of_experts.chunks import chunks_of
from mixture_of_experts.grouped import _in_blocks, expert_matmul, product_by_expert, rows_by_rows, rows_by_weights

COUNTS = [[3, 0, 2, 1], [0, 0, 0, 0], [7], [0, 5, 0]]


def operands(counts, past=2, dtype=torch.float64):
    """Rows, some of them past the last expert's, weights and counts; sizes that no kernel likes."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts) + past, 5, generator=generator, dtype=dtype)
    weight = torch.randn(len(counts), 5, 3, generator=generator, dtype=dtype)
    return x, weight, torch.tensor(counts)


def by_loop(x, weight, counts):
    """What both must give."""
    parts = x.split([*counts.tolist(), x.shape[0] - int(counts.sum())])
    products = [part @ matrix for part, matrix in zip(parts[:-1], weight, strict=True)]
    return torch.cat([*products, x.new_zeros(len(parts[-1]), weight.shape[-1])])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operators(counts, dtype):
    """Schema, fake kernels and tracing of the operators, as torch checks them."""
    x, weight, counts = operands(counts, dtype=dtype)
    torch.library.opcheck(rows_by_weights, (x, weight, counts))
    torch.library.opcheck(rows_by_rows, (x, torch.randn(len(x), 4).to(dtype), counts))


@pytest.mark.parametrize("bias", [False, True])
def test_flops_are_counted(bias):
    """Six products of a dropless layer's rows (and of the padding of its chunks), and the router's three."""
    layer = MoE(8, 4, gate=TopKGating(8, 4, 2), experts=Experts(8, 4, 16, bias=bias))
    x = torch.randn(2, 32, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    rows = 2 * 64
    if not bias:  # these take the way in chunks
        counts = layer.gate(x).queued.sum(dim=0).tolist()
        rows = sum(chunk.num_rows for chunk in chunks_of(counts, 16 * 4, torch.get_num_threads()))
    assert counter.get_total_flops() == 6 * 2 * rows * 8 * 16 + 3 * 2 * 64 * 8 * 4


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), past=st.integers(0, 3), weigh=st.booleans())
def test_products(counts, past, weigh):
    """Values and gradients of both ways are those of a loop."""
    x, weight, counts = operands(counts, past)
    expected = torch.func.vjp(lambda x, weight: by_loop(x, weight, counts), x, weight)
    grad = (
        torch.randn(expected[0].shape, dtype=x.dtype) if weigh else torch.ones(1, dtype=x.dtype).expand_as(expected[0])
    )
    for product in (expert_matmul, _in_blocks):
        value, gradients = torch.func.vjp(lambda x, weight, way=product: way(x, weight, counts), x, weight)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(gradients(grad), expected[1](grad))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_second_derivatives(counts):
    x, weight, counts = operands(counts)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, weight: expert_matmul(x, weight, counts), inputs)


@pytest.mark.parametrize("counts", [[1, 1], [2, 0, 2, 1], [1, 0, 0, 1, 0, 1], [3, 3, 1, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_pairs(counts, dtype, transposed, monkeypatch):
    """Experts with equally many rows, wherever they stand, are one product, unless torch would copy their weights."""
    bmm, batched = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *args, **kwargs: batched.append(args) or bmm(*args, **kwargs))
    x, weight, counts = operands(counts, dtype=dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    used = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
    torch.testing.assert_close(product_by_expert(x, weight, used), by_loop(x, weight, counts))
    equal = sum(first == second for (_, first), (_, second) in zip(used[::2], used[1::2], strict=False))
    assert len(batched) == (0 if transposed and dtype == torch.bfloat16 else equal)


@given(st.lists(st.integers(0, 30) | st.just(0), max_size=40), st.integers(1, 4), st.sampled_from([1 << 10, 1 << 20]))
def test_chunks(counts, threads, row_bytes):
    """Every expert that has rows is in one chunk, with room for them; one that has none is in no chunk."""
    made = chunks_of(counts, row_bytes, threads)
    inside = [expert for chunk in made for expert in range(chunk.start, chunk.stop)]
    assert inside == [expert for expert, count in enumerate(counts) if count]
    row = 0
    for chunk in made:
        assert chunk.row == row
        assert chunk.width == max(counts[chunk.experts])
        row = chunk.rows.stop


@pytest.mark.parametrize("padded", [False, True])
def test_an_infinite_gradient_concerns_its_expert_only(padded, monkeypatch):
    """Nor do rows that are padding carry it to others."""
    monkeypatch.setattr(chunks, "MOST_PADDING", 1 << 20 if padded else 0)
    monkeypatch.setattr(chunks, "FREE_ROWS", 0)
    torch.manual_seed(0)
    layer = MoE(8, 4, gate=TopKGating(8, 4, 1), experts=Experts(8, 4, 16))
    x = torch.randn(1, 23, 8)
    expert = layer.gate(x).expert[0]
    assert expert.bincount(minlength=4).unique().numel() > 1
    for token in range(23):
        layer.zero_grad()
        grad = torch.ones(1, 23, 8)
        grad[0, token] = torch.inf
        layer(x)[0].backward(grad)
        for weight in layer.experts.parameters():
            assert weight.grad.flatten(1).isfinite().all(dim=1).tolist() == [i != expert[token] for i in range(4)]


def test_threads_may_change_between_forward_and_backward(monkeypatch):
    """The backward reads what the forward kept, in the layout of the forward."""
    monkeypatch.setattr(chunks, "BALANCE", 1)
    monkeypatch.setattr(chunks, "MOST_PADDING", 1 << 20)
    torch.manual_seed(0)
    layer = MoE(16, 4, gate=TopKGating(16, 4, 2))
    x, grad = torch.randn(2, 50, 16, requires_grad=True), torch.randn(2, 50, 16)
    leaves = [x, *layer.parameters()]
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(1)
            out = layer(x)[0]
            torch.set_num_threads(number)
            found.append(torch.autograd.grad(out, leaves, grad))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
