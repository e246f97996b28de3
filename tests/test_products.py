"""The experts' products over rows against one product an expert, and which of them the CPU computes together."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_experts import Experts, MoE, TopKGating
from mixture_of_experts.ops.cpu import batches
from mixture_of_experts.ops.cpu.batches import make_batches, make_chunks
from mixture_of_experts.ops.grouped import grouped_matmul, multiply_by_expert, rows_by_rows, rows_by_weights
from mixture_of_experts.ops.plain import expert_product

COUNTS = [[3, 0, 2, 1], [0, 0, 0, 0], [7], [0, 5, 0]]


def make_operands(counts, past=2, dtype=torch.float64):
    """Rows, some of them past the last expert's, weights and counts; sizes that no kernel likes."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts) + past, 5, generator=generator, dtype=dtype)
    weight = torch.randn(len(counts), 5, 3, generator=generator, dtype=dtype)
    return x, weight, torch.tensor(counts)


def multiply_by_loop(x, weight, counts):
    """What both must give."""
    parts = x.split([*counts.tolist(), x.shape[0] - int(counts.sum())])
    products = [part @ matrix for part, matrix in zip(parts[:-1], weight, strict=True)]
    return torch.cat([*products, x.new_zeros(len(parts[-1]), weight.shape[-1])])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operators(counts, dtype):
    """Schema, fake kernels and tracing of the operators, as torch checks them."""
    x, weight, counts = make_operands(counts, dtype=dtype)
    torch.library.opcheck(rows_by_weights, (x, weight, counts))
    torch.library.opcheck(rows_by_rows, (x, torch.randn(len(x), 4).to(dtype), counts))


@pytest.mark.parametrize("padding", [0, 1 << 30])
def test_flops_are_counted(padding, monkeypatch):
    """Six products of a dropless layer's rows (and of the padding of its batches), and the router's three."""
    monkeypatch.setattr(batches, "PADDING_WORK", padding)
    monkeypatch.setattr(batches, "FREE_PADDING_ROWS", 0)
    layer = MoE(8, 4, gate=TopKGating(8, 4, 2), experts=Experts(8, 4, 16))
    x = torch.randn(2, 32, 8, requires_grad=True)
    counts = layer.gate(x).queue_length.sum(dim=0).tolist()
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    rows = 4 * max(counts) if padding else 2 * 64
    assert len(set(counts)) > 1
    assert counter.get_total_flops() == 6 * 2 * rows * 8 * 16 + 3 * 2 * 64 * 8 * 4


COUNTER, OURS = "from torch.utils.flop_counter import FlopCounterMode", "import torch; from mixture_of_experts import *"
COUNTED = """
from mixture_of_experts import ops
gate, x = TopKGating(8, 4, 2), torch.randn(2, 32, 8, requires_grad=True)
layer = MoE(8, 4, gate=gate, experts=Experts(8, 4, 16))
with ops.use("grouped"), FlopCounterMode(display=False) as counter:
    layer(x)[0].sum().backward()
print({str(name): count for name, count in counter.get_flop_counts()["Global"].items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(COUNTER, OURS), (OURS, COUNTER)], ids=["counter", "ours"])
def test_flops_are_counted_whichever_is_imported_first(first, second):
    """The counter knows nothing of this package, whose import does not load the counter's module."""
    code = "\n".join([first, second, COUNTED])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    product = 2 * (2 * 64) * 8 * 16  # rows of two choices a token
    own = {f"mixture_of_experts.rows_by_{name}": n * product for name, n in (("weights", 4), ("rows", 2))}
    assert eval(found) == {"aten.mm": 3 * 2 * 64 * 8 * 4} | own


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), past=st.integers(0, 3), weigh=st.booleans())
def test_products(counts, past, weigh):
    """Values and gradients of both ways are those of a loop."""
    x, weight, counts = make_operands(counts, past)
    expected = multiply_by_loop(*(inputs := (x.requires_grad_(), weight.requires_grad_())), counts)
    grad = torch.randn_like(expected) if weigh else torch.ones(1, dtype=x.dtype).expand_as(expected)
    for product in (grouped_matmul, expert_product):
        value = product(x, weight, counts)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, inputs, grad), torch.autograd.grad(expected, inputs, grad, retain_graph=True)
        )


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_second_derivatives(counts):
    x, weight, counts = make_operands(counts)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, weight: grouped_matmul(x, weight, counts), inputs)


@pytest.mark.parametrize("counts", [[1, 1], [2, 0, 2, 1], [1, 0, 0, 1, 0, 1], [3, 3, 1, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_pairs(counts, dtype, transposed, monkeypatch):
    """Experts with equally many rows, wherever they stand, are one product, unless torch would copy their weights."""
    bmm, batched = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *args, **kwargs: batched.append(args) or bmm(*args, **kwargs))
    x, weight, counts = make_operands(counts, dtype=dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    used = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
    torch.testing.assert_close(multiply_by_expert(x, weight, used), multiply_by_loop(x, weight, counts))
    equal = sum(first == second for (_, first), (_, second) in zip(used[::2], used[1::2], strict=False))
    assert len(batched) == (0 if transposed and dtype == torch.bfloat16 else equal)


@given(
    st.lists(st.integers(0, 30) | st.just(0), max_size=40),
    st.sampled_from([1, 2, 3, 4, 16]),
    st.sampled_from([1 << 6, 1 << 16, 1 << 20]),
    st.sampled_from([1, 20, 1000]),
)
def test_chunks(counts, threads, row_work, most_rows):
    """Every expert that has rows is in one batch, with room for them; batches and chunks follow each other."""
    batches = make_batches(counts, row_work, threads, most_rows)
    inside = [expert for batch in batches for expert in range(len(counts))[batch.experts]]
    assert inside == [expert for expert, count in enumerate(counts) if count]
    for batch in batches:
        assert batch.padded_rows == max(counts[batch.experts])
        assert batch.num_experts == 1 or batch.num_experts * batch.padded_rows <= most_rows
    chunks = make_chunks(batches, most_rows)
    assert [batch for chunk in chunks for batch in chunk] == batches
    stops = [0, *(batch.stop for batch in batches)]
    assert [batch.start for batch in batches] == stops[:-1]
    for chunk in chunks:
        assert len(chunk) == 1 or chunk[-1].stop - chunk[0].start <= most_rows


@pytest.mark.parametrize(
    ("counts", "threads", "expected"),
    [
        ([50] * 8, 2, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([49, 50, 48, 50], 2, [[0, 1, 2, 3]]),
        ([50, 200, 50, 200], 2, [[0], [1], [2], [3]]),
        ([200, 50, 0, 50, 50], 2, [[0], [1], [3, 4]]),
        ([50, 49, 200, 51], 2, [[0, 1], [2], [3]]),
        ([50] * 3 + [100] * 3, 3, [[0, 1, 2], [3, 4, 5]]),
        ([50] * 5, 2, [[0, 1, 2, 3], [4]]),  # whole experts for each thread
        ([50] * 3, 4, [[0, 1, 2]]),
        ([50, 60] * 2, 2, [[0, 1], [2, 3]]),  # a product of one expert is shared badly
        ([50, 60, 52, 50], 1, [[0], [1], [2, 3]]),
        ([50] * 50, 1, [list(range(20)), list(range(20, 40)), list(range(40, 50))]),
    ],
    ids=str,
)
def test_batches(counts, threads, expected):
    """Neighbours with equally many rows, or nearly so, are one product."""
    made = make_batches(counts, 1 << 19, threads, max_rows=1000)
    assert [list(range(len(counts))[batch.experts]) for batch in made] == expected


@pytest.mark.parametrize(("threads", "numbers"), [(1, [1, 1, 3]), (2, [1, 1, 2, 1])])
def test_small_networks_get_little_padding(threads, numbers):
    """However little its multiplications cost: a row of padding is moved and activated too."""
    made = make_batches([100, 60, 100, 90, 95], 8, threads, max_rows=1000)
    assert [batch.num_experts for batch in made] == numbers


@pytest.mark.parametrize("padding", [0, 1 << 20], ids=["alone", "batched"])
def test_infinite_gradient_affects_one_expert(padding, monkeypatch):
    """Nor do rows that are padding carry it to others."""
    monkeypatch.setattr(batches, "PADDING_WORK", padding)
    monkeypatch.setattr(batches, "FREE_PADDING_ROWS", 0)
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
    monkeypatch.setattr(batches, "MAX_CHUNK_BYTES", 1)
    monkeypatch.setattr(batches, "PADDING_WORK", 1 << 20)
    layer = MoE(16, 5, gate=TopKGating(16, 5, 2))
    x, grad = torch.randn(2, 50, 16, requires_grad=True), torch.randn(2, 50, 16)
    leaves = [x, *layer.parameters()]
    found = []
    for number in (1, 3):
        torch.set_num_threads(1)
        out = layer(x)[0]
        torch.set_num_threads(number)
        found.append(torch.autograd.grad(out, leaves, grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("rows", "weight", "counts", "message"),
    [
        ((5, 8), (3, 8, 4), [9, 1, 1], r"at most 5 \(the rows of x\), got \[9, 1, 1\]"),
        ((5, 8), (3, 8, 4), [7, -1, -1], r"nonnegative .* got \[7, -1, -1\]"),
        ((5, 8), (3, 8, 4), [5, 0], r"int64 tensor of shape \(3,\) with the number .* got torch.int64 of shape \(2,\)"),
        ((5, 8), (3, 8, 4), [1.0, 1.0, 1.0], "must be an int64 tensor"),
        ((5, 7), (3, 8, 4), [1, 1, 1], r"x and weight must have shapes \(r, 8\) and \(e, p, q\), got \(5, 7\)"),
        ((5, 8), (8, 4), [1, 1, 1], r" and \(e, p, q\), got \(5, 8\) and \(8, 4\)"),
        ((2, 5, 8), (3, 8, 4), None, r"x and weight must have shapes \(e, s, 8\) with e=3"),
    ],
)
def test_operands_of_a_grouped_product_that_do_not_fit(rows, weight, counts, message):
    counts = None if counts is None else torch.tensor(counts)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(torch.randn(rows), torch.randn(weight), counts)


def test_weights_without_data_are_rejected():
    """Torch would return uninitialized memory."""
    rows, counts = torch.randn(5, 8), torch.tensor([2, 0, 3])
    with pytest.raises(ValueError, match=r"weights must be on the same device as the tokens \(cpu\), got meta"):
        grouped_matmul(rows, torch.empty(3, 8, 4, device="meta"), counts)
