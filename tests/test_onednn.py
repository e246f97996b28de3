"""Products by oneDNN, at any size, against products in float64: their operators, and whole layers of them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_experts import Experts, GatedExperts, MoE, TopKGating, products
from mixture_of_experts.products import multiply, multiply_transposed

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")

OPERATORS = (torch.ops.mixture_of_experts.multiply_, torch.ops.mixture_of_experts.multiply_transposed_)


@pytest.fixture
def any_size(monkeypatch):
    """Whatever the processor and however small a product is, it is oneDNN's."""
    monkeypatch.setattr(products, "_onednn_leads", lambda: True)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    monkeypatch.setattr(products, "LEAST_ROWS", 1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("r", "p", "q"), [(1, 1, 1), (7, 5, 3), (33, 64, 17), (160, 48, 80)])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators(any_size, r, p, q, transposed):
    x, y = random(r, p), random(r, q, seed=1)
    weight = random(q, p, seed=2).mT if transposed else random(p, q, seed=2)
    out, outer = torch.full((r, q), torch.nan), torch.full((p, q), torch.nan)
    with FlopCounterMode(display=False) as counter:
        multiply(x, weight, out)
        multiply_transposed(x, y, outer)
    assert counter.get_flop_counts()["Global"] == dict.fromkeys(OPERATORS, 2 * r * p * q)
    torch.testing.assert_close(out, (x.double() @ weight.double()).float())
    torch.testing.assert_close(outer, (x.double().mT @ y.double()).float())
    for operator, arguments in zip(OPERATORS, ((x, weight, out), (x, y, outer)), strict=True):
        torch.library.opcheck(operator.default, arguments, test_utils="test_schema")


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of `flags` itself
@pytest.mark.parametrize("change", ["dtype", "small", "off", "other processor"])
def test_left_to_mkl(any_size, change, monkeypatch):
    """What oneDNN would not do better, or shall not do."""
    x, weight = random(8, 8), random(8, 8, seed=1)
    if change == "dtype":
        x, weight = x.double(), weight.double()
    if change == "small":
        monkeypatch.setattr(products, "LEAST_WORK", 2 * 8**3 + 1)
    if change == "other processor":
        monkeypatch.setattr(products, "_onednn_leads", lambda: False)
    with torch.backends.mkldnn.flags(enabled=change != "off"), FlopCounterMode(display=False) as counter:
        multiply(x, weight, out := torch.empty_like(x))
        multiply_transposed(x, weight, outer := torch.empty_like(x))
    assert counter.get_flop_counts()["Global"] == {torch.ops.aten.mm: 4 * 8**3}
    torch.testing.assert_close(out, x @ weight)
    torch.testing.assert_close(outer, x.mT @ weight)


def run(layer, x, grad, mask):
    """Output, auxiliary loss and all gradients."""
    x = x.clone().requires_grad_()
    out, loss = layer(x, mask=mask)
    torch.autograd.backward((out, loss), (grad, torch.ones_like(loss)))
    return [out, loss, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("kind", [Experts, GatedExperts])
@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("padded", [False, True])
def test_layers(any_size, kind, factor, skew, padded, monkeypatch):
    """Balanced, or so skewed that experts have no rows; products all one by one, or those of weights as batches."""
    if padded:
        monkeypatch.setattr(products, "LEAST_ROWS", 1000)
    torch.manual_seed(0)
    factors = {"capacity_factor_train": factor, "capacity_factor_eval": factor}
    gate = TopKGating(24, 6, 2, **factors)
    layer = MoE(24, 6, 40, gate=gate, experts=kind(24, 6, 40))
    x, grad = random(3, 37, 24), random(3, 37, 24, seed=1)
    x[..., 0] = skew
    with torch.no_grad():
        gate.w_gating[0] = torch.tensor([3.0, 2.0, 0.0, 0.0, -1.0, -5.0])
    mask = torch.arange(37) < torch.tensor([37, 20, 0]).unsqueeze(-1)
    with FlopCounterMode(display=False) as counter:
        found = run(layer, x, grad, mask)
    used = {operator for operator in counter.get_flop_counts()["Global"] if operator in OPERATORS}
    assert used == set(OPERATORS[:1] if padded else OPERATORS)
    layer.zero_grad()
    layer.double()
    for one, other in zip(found, run(layer, x.double(), grad.double(), mask), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_inference_and_graphs(any_size):
    """Inference mode, and a compiled layer, whose operators use the same products."""
    torch.manual_seed(0)
    layer = MoE(16, 4, activation=nn.GELU, second_policy_eval="all").eval()
    x = random(2, 50, 16)
    with torch.no_grad():
        expected = layer(x)[0]
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[0], expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], expected)


def test_same_bits(any_size):
    torch.manual_seed(0)
    layer = MoE(16, 4, second_policy_train="all")
    x, grad = random(2, 50, 16), random(2, 50, 16, seed=1)
    first = run(layer, x, grad, None)
    layer.zero_grad()
    for one, other in zip(first, run(layer, x, grad, None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("first", [False, True])
def test_settings_may_change_between_forward_and_backward(any_size, first):
    """The backward reads what the forward kept, in the layout of the forward."""
    torch.manual_seed(0)
    layer = MoE(16, 4, gate=TopKGating(16, 4, 2))
    x, grad = random(2, 50, 16), random(2, 50, 16, seed=1)
    expected = run(layer, x, grad, None)[2:]
    layer.zero_grad()
    threads = torch.get_num_threads()
    x.requires_grad_()
    try:
        with torch.backends.mkldnn.flags(enabled=first):
            torch.set_num_threads(1)
            out, loss = layer(x)
        with torch.backends.mkldnn.flags(enabled=not first):
            torch.set_num_threads(3)
            torch.autograd.backward((out, loss), (grad, torch.ones_like(loss)))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip([x.grad, *(parameter.grad for parameter in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(one, other)
