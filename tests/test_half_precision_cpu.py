"""Experts of 16 bits on CPUs without products of 16 bits, which cast to float32 and round: the numbers, on any CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import Experts, GatedExperts, MoE, TopKGating, ops
from mixture_of_experts.ops import matmul
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.support import private_torch

DIM, E, HIDDEN = 24, 6, 40
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture
def narrow_products(monkeypatch):
    """The CPU multiplies in float32 and float64 alone; parts are so small that an expert takes several."""
    monkeypatch.setattr(private_torch, "has_native_matmul", lambda dtype: dtype not in NARROW)
    monkeypatch.setattr(matmul, "MAX_CAST_NUMEL", 100)


@pytest.fixture
def forbid_half_products(monkeypatch):
    """No product of 16 bits is asked of torch."""

    def refuse(name):
        before = getattr(torch, name)

        def product(*operands, **settings):
            assert not any(t.dtype in NARROW for t in operands if isinstance(t, torch.Tensor)), name
            return before(*operands, **settings)

        return product

    for name in ("bmm", "mm", "baddbmm", "matmul"):
        monkeypatch.setattr(torch, name, refuse(name))


def make_layer(dtype, **settings):
    torch.manual_seed(0)
    moe = MoE(DIM, gate=TopKGating(DIM, E, **settings), experts=GatedExperts(DIM, E, HIDDEN, bias=True))
    return moe.to(dtype)


def compute_results(moe, x, call=None):
    x = x.detach().requires_grad_()
    out, aux_loss = (call or moe)(x)
    grads = torch.autograd.grad(out.double().square().sum() + aux_loss.double(), [x, *moe.parameters()])
    return out, *grads


def assert_near(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().clamp(min=1.0)
        assert ((one.double() - other).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("implementation", ["cpu", "grouped"])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("length", [1, 5, 64])
def test_outputs_and_gradients_are_those_of_the_definition(
    implementation, dtype, length, narrow_products, forbid_half_products
):
    moe = make_layer(dtype)
    x = torch.randn(2, length, DIM).to(dtype)
    with ops.use("plain"):
        exact = copy.deepcopy(moe).double()
        expected = compute_results(exact, x.double())
    with ops.use(implementation):
        found = compute_results(moe, x)
        again = compute_results(moe, x, lambda x: checkpoint(moe, x, use_reentrant=False))
    assert [value.dtype for value in found] == [dtype] * len(found)
    assert_near(found, expected, 0.03 if dtype == torch.bfloat16 else 0.005)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("n", "m", "p", "q"), [(3, 5, 7, 9), (1, 200, 3, 2), (4, 1, 1, 300), (2, 0, 3, 4), (2, 3, 0, 4)]
)
def test_parts_make_the_whole(n, m, p, q, dtype, add, narrow_products):
    """Whatever is cut where; a transposed operand and a result with strides too."""
    x, y, before = torch.randn(n, m, p), torch.randn(n, q, p).mT, torch.randn(n, m, 2 * q)[..., ::2]
    x, y, out = x.to(dtype), y.to(dtype), before.to(dtype)
    expected = x.double() @ y.double() + (out.double() if add else 0)
    matmul.matmul_into(x, y, out, accumulate=add)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", NARROW)
def test_decoding_and_8_bits(dtype, narrow_products, forbid_half_products):
    in_8_bits = quantize_experts(make_layer(torch.float32).requires_grad_(False))
    for moe in (make_layer(dtype).eval(), in_8_bits.to(dtype)):
        x = torch.randn(1, 40, DIM).to(dtype)
        with torch.no_grad():
            exact = copy.deepcopy(moe).double()(x.double())[0]
            for length in (1, 2, 7, 40):
                assert_near([moe(x[:, :length])[0]], [exact[:, :length]], 0.03)


def test_autocast_leaves_weights_in_float32(narrow_products, forbid_half_products):
    """It would only be slower: the experts' outputs are those without autocast, to the last bit."""
    moe, x = make_layer(torch.float32), torch.randn(2, 20, DIM)
    expected = compute_results(moe, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = moe(x)
        narrow_input, _ = moe(x.bfloat16())
    assert torch.equal(out, expected[0])
    assert narrow_input.dtype == torch.bfloat16
    bits = quantize_experts(make_layer(torch.float32).requires_grad_(False))
    with torch.autocast("cpu", torch.bfloat16):
        under = bits(x)[0]
    assert torch.equal(under, bits(x)[0])


@pytest.mark.slow
def test_a_compiled_graph(narrow_products):
    moe, x = make_layer(torch.bfloat16), torch.randn(2, 20, DIM).bfloat16()
    compiled = torch.compile(moe, fullgraph=True, backend="eager")
    with ops.use("grouped"):
        expected = moe(x)[0]
    assert torch.equal(compiled(x)[0], expected)


def test_native_matmul_dtypes_are_constant():
    assert private_torch.has_native_matmul(torch.float32)
    assert private_torch.has_native_matmul(torch.float64)
    assert {private_torch.has_native_matmul(dtype) for dtype in NARROW} <= {True, False}


def test_both_matmul_implementations_agree(monkeypatch):
    """On a CPU that has products of 16 bits, and on one that has not: sums are in float32 either way."""
    x, found = torch.randn(2, 20, DIM).bfloat16(), []
    for has_products in (True, False):
        monkeypatch.setattr(private_torch, "has_native_matmul", lambda dtype, has=has_products: has)
        found.append(make_layer(torch.bfloat16)(x)[0])
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [Experts, GatedExperts])
def test_an_activation_with_parameters_has_the_dtype_of_the_weights(kind):
    experts = kind(8, 4, activation=nn.PReLU, dtype=torch.bfloat16)
    out, _ = MoE(8, 4, experts=experts, gate=TopKGating(8, 4))(torch.randn(2, 5, 8, dtype=torch.bfloat16))
    out.sum().backward()
    assert experts.act.weight.grad.dtype == torch.bfloat16
    own = nn.PReLU()
    assert kind(8, 4, activation=own, dtype=torch.bfloat16).act is own  # an instance is the caller's
    assert own.weight.dtype == torch.float32
