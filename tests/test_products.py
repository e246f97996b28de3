"""The experts' products over rows: the operators of the CPU, and products in blocks, against one product an expert."""

import pytest
import torch
from compat.paths import DIM, NUM_EXPERTS, ROUTERS, assert_all_close, gradients, run
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_experts import Experts, GatedExperts, MoE, fused
from mixture_of_experts.grouped import _in_blocks, expert_matmul, rows_by_rows, rows_by_weights

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


@pytest.mark.parametrize("experts", [Experts, GatedExperts])
@pytest.mark.parametrize("name", ["Top2, policy random", "TopK, expert bias", "ExpertChoice"])
def test_few_rows(experts, name, monkeypatch):
    """Few rows, as in decoding, are computed expert by expert: values and gradients are those of chunks."""
    torch.manual_seed(0)
    layer = MoE(DIM, gate=ROUTERS[name](), experts=experts(DIM, NUM_EXPERTS, 16)).double().eval()
    for shape in [(1, 1), (2, 1), (1, 5), (3, 4), (0, 1), (1, 0)]:
        x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
        found = []
        for few in (fused.FEW_ROWS, -1):
            monkeypatch.setattr(fused, "FEW_ROWS", few)
            results = run(layer, x)
            found.append({"out": results[0], "loss": results[1], **gradients(layer, x, results)})
        monkeypatch.undo()
        assert_all_close(*found)
        with torch.no_grad():  # as a recomputation needs it
            assert torch.equal(run(layer, x)[0], found[0]["out"])
