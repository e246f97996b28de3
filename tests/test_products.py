"""The experts' products over rows: the operators of the CPU, and products in blocks, against one product an expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_experts import ExpertChoiceGating, Experts, GatedExperts, MoE, TopKGating, batches, chunks, experts
from mixture_of_experts.batches import Batch, batches_of
from mixture_of_experts.chunks import Setting, chunks_of
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
        setting = Setting(64, 8 * 4, 16 * 4, torch.get_num_threads(), steps=True, training=True)
        rows = sum(chunk.num_rows for chunk in chunks_of(counts, setting))
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


@given(
    st.lists(st.integers(0, 30) | st.just(0), max_size=40),
    st.sampled_from([1, 2, 3, 4, 16]),
    st.sampled_from([1 << 10, 1 << 14, 1 << 20]),
    st.booleans(),
)
def test_chunks(counts, threads, row_bytes, steps):
    """Every expert that has rows is in one chunk, with room for them; one that has none is in no chunk."""
    made, inside = chunks_of(counts, Setting(99, row_bytes, row_bytes, threads, steps, training=False)), []
    for chunk in made:
        for batch in chunk.batches:
            experts = list(range(len(counts))[batch.experts])
            assert (batch.number, batch.width) == (len(experts), max(counts[expert] for expert in experts))
            assert steps or batch.experts.step == 1
            inside += experts
        assert chunk.num_rows == sum(batch.number * batch.width for batch in chunk.batches)
    assert sorted(inside) == [expert for expert, count in enumerate(counts) if count]


@pytest.mark.parametrize(
    ("counts", "threads", "steps", "expected"),
    [
        ([50] * 8, 2, True, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([49, 50, 48, 50], 2, True, [[0, 1, 2, 3]]),
        ([50, 200, 50, 200], 2, True, [[0, 2], [1, 3]]),
        ([50, 200, 50, 200], 2, False, [[0], [1], [2], [3]]),
        ([200, 50, 0, 50, 200], 2, True, [[1, 3], [0, 4]]),
        ([200, 50] * 4, 2, True, [[1, 3, 5, 7], [0, 2, 4, 6]]),
        ([200, 50] * 4, 2, False, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        ([50, 49, 200, 51], 2, True, [[0, 1], [2], [3]]),
        ([51, 200, 50], 2, True, [[0, 2], [1]]),
        ([50, 100, 200], 2, True, [[0], [1], [2]]),
        ([50, 50, 300], 2, True, [[0, 1], [2]]),
        ([50] * 3 + [100] * 3, 3, True, [[0, 1, 2], [3, 4, 5]]),
        ([50] * 16, 16, True, [list(range(16))]),
    ],
    ids=str,
)
def test_batches(counts, threads, steps, expected):
    """Experts with equally many rows, or nearly so, are one product, wherever they stand."""
    made = batches_of(counts, 4096, threads, enough=1000, steps=steps)
    assert [list(range(len(counts))[batch.experts]) for batch in made] == expected


def test_a_forward_without_gradients_goes_the_way_of_training(monkeypatch):
    """A checkpoint that is recomputed has the same products, to the last bit; in eval they may be others."""
    asked = []
    monkeypatch.setattr(chunks, "batches_of", lambda *args: asked.append(args) or batches_of(*args))
    layer = MoE(8, 4, gate=TopKGating(8, 4, 2))
    x = torch.randn(2, 33, 8)
    layer(x)[0].sum().backward()
    with torch.no_grad():
        layer(x)
        layer.eval()(x)
    forward, backward, without, in_eval = asked
    assert forward == backward == without
    assert in_eval[:-1] == forward[:-1]
    assert (forward[-1], in_eval[-1]) == (True, False)


def test_batches_that_gradients_are_written_of():
    """Torch writes them one by one where experts stand apart: some padding is then better."""
    counts = [50, 68] * 4
    made = [batches_of(counts, 4096, 2, enough=100, training=training) for training in (False, True)]
    assert [[batch.experts.step for batch in way] for way in made] == [[2] * 4, [1] * 4]


GATES = {
    "dropless": lambda: TopKGating(8, 7, 2),
    "capacity": lambda: TopKGating(8, 7, 2, capacity_factor_train=0.7),
    "expert choice": lambda: ExpertChoiceGating(8, 7, capacity_factor=1.5),
}


def scattered(counts, *_):
    """The fullest expert with the emptiest, and so on: as much out of order as pairs can be."""
    order = sorted((expert for expert, count in enumerate(counts) if count), key=counts.__getitem__)
    made = []
    while order:
        pair = sorted({order.pop(), order.pop(0) if order else -1} - {-1})
        step = pair[-1] - pair[0] if len(pair) == 2 else 1
        made.append(Batch(slice(pair[0], pair[-1] + 1, step), len(pair), max(counts[expert] for expert in pair)))
    return made


@pytest.mark.parametrize("kind", [Experts, GatedExperts])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("balance", [1, 1 << 30])
def test_scattered_batches(kind, gate, balance, monkeypatch):
    """Outputs and all gradients are those of the plain operators, whichever experts are one product or one chunk."""
    monkeypatch.setattr(chunks, "BALANCE", balance)
    torch.manual_seed(0)
    layer = MoE(8, 7, gate=GATES[gate](), experts=kind(8, 7, 16)).double()
    x = torch.randn(2, 33, 8, dtype=torch.float64, requires_grad=True)
    grad, mask = torch.randn_like(x), torch.rand(2, 33) < 0.8
    found = []
    for way in ("scattered", "plain"):
        monkeypatch.setattr(chunks, "batches_of", scattered)
        monkeypatch.setattr(experts, "takes", lambda *_, fused=way == "scattered": fused)
        out, aux = layer(x, mask=mask)
        found.append((out, *torch.autograd.grad((out * grad).sum() + aux, [x, *layer.parameters()])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("batched", ["neighbours", "alone", "scattered"])
def test_an_infinite_gradient_concerns_its_expert_only(batched, monkeypatch):
    """Nor do rows that are padding carry it to others."""
    monkeypatch.setattr(batches, "PRODUCT", 1 << 20 if batched == "neighbours" else 0)
    monkeypatch.setattr(batches, "FREE_ROWS", 0)
    if batched == "scattered":
        monkeypatch.setattr(chunks, "batches_of", scattered)
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
    monkeypatch.setattr(batches, "PRODUCT", 1 << 20)
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
