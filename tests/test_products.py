"""The experts' products over rows: the operators of the CPU, and products in blocks, against one product an expert."""

import pytest
import torch
from compat.paths import DIM, NUM_EXPERTS, ROUTERS, run
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_experts import Experts, GatedExperts, MoE
from mixture_of_experts.few import few_rows
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


@pytest.mark.parametrize("pairs", [[1, 1], [2, 0, 2, 1], [1, 0, 0, 1, 0, 1], [3, 3, 1, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_pairs(pairs, dtype):
    """Experts with equally many rows, wherever they stand, are one product."""
    x, weight, counts = operands(pairs, dtype=dtype)
    torch.testing.assert_close(rows_by_weights(x, weight, counts), by_loop(x, weight, counts))
    transposed = weight.mT.contiguous().mT
    torch.testing.assert_close(rows_by_weights(x.mT.contiguous().mT, transposed, counts), by_loop(x, weight, counts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [Experts, GatedExperts])
@pytest.mark.parametrize("name", ROUTERS)
def test_few_rows(experts, name, dtype, monkeypatch):
    """Few rows in inference are computed without a plan: what comes out is that of the plan."""
    torch.manual_seed(0)
    layer = MoE(DIM, gate=ROUTERS[name](), experts=experts(DIM, NUM_EXPERTS, 16)).to(dtype).eval()
    taken = []
    monkeypatch.setattr("mixture_of_experts.experts.few_rows", lambda *args: taken.append(args) or few_rows(*args))
    tolerance = {} if dtype != torch.bfloat16 else dict(rtol=2e-2, atol=1e-2)
    for shape in [(1, 1), (2, 1), (1, 5), (3, 4), (0, 1), (1, 0)]:
        x = torch.randn(*shape, DIM, dtype=dtype)
        mask = torch.arange(x.shape[0] * x.shape[1]).view(shape) % 3 != 1
        for masked in (None, mask):
            expected = run(layer, x, masked)
            with torch.no_grad():
                torch.testing.assert_close(run(layer, x, masked), expected, **tolerance)
    assert len(taken) == (0 if name == "ExpertChoice" else 12)


@pytest.mark.parametrize("experts", [Experts, GatedExperts])
def test_few_rows_of_an_ensemble(experts):
    """Numbers cannot be read under vmap: there the plan serves few rows too."""
    layers = [MoE(DIM, NUM_EXPERTS, experts=experts(DIM, NUM_EXPERTS, 16), second_policy_eval="all") for _ in range(3)]
    stacked, _ = torch.func.stack_module_state([layer.eval() for layer in layers])
    x = torch.randn(1, 2, DIM)
    with torch.no_grad():
        out, _ = torch.vmap(lambda state: torch.func.functional_call(layers[0], state, (x,)))(stacked)
        torch.testing.assert_close(out, torch.stack([layer(x)[0] for layer in layers]))
