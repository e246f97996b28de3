"""Every floating dtype, autocast, gradient scaling; gradients checked numerically; the router always exact."""

import copy

import pytest
import torch
from support.layer_variants import (
    ALL_VARIANTS,
    LAYER_VARIANTS,
    MASKED,
    ROUTERS,
    assert_all_close,
    compute_gradients,
    make_layer_with_router,
    put_quick_first,
    run_layer,
)

from mixture_of_experts.support.private_torch import has_native_matmul

pytestmark = pytest.mark.slow

paths = pytest.mark.parametrize("path", LAYER_VARIANTS, ids=str)
routers = pytest.mark.parametrize("router", ROUTERS)

LOW = {torch.bfloat16: 4e-2, torch.float16: 5e-3}  # relative error of a few products in that dtype
ERRORS = {torch.float64: 0.0, torch.float32: 1e-5, **LOW}
low_dtypes = pytest.mark.parametrize("dtype", LOW, ids=str)


def relative_error(actual, expected):
    """Of the whole tensor, as a single small entry says nothing in a low precision."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()


def assert_near(actual, expected, error):
    """All named tensors within a relative error."""
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= error, name


def compute_everything(layer, x, mask):
    """Output, auxiliary loss and all gradients by name."""
    out, aux_loss = run_layer(layer, x, mask)
    return {"out": out, "aux_loss": aux_loss, **compute_gradients(layer, x, (out, aux_loss))}


def to_float64(layer, x):
    """The same layer and tokens in float64: the same choices, as the router computes in float32 from the same values."""  # noqa: E501
    return copy.deepcopy(layer).double(), x.detach().double().requires_grad_()


@pytest.mark.feature("float32, float64, bfloat16, float16 modules")
@paths
def test_module_dtypes(path):
    for dtype, error in ERRORS.items():
        layer = path.build(policy="all").to(dtype)
        x, mask = path.inputs(dtype=dtype)
        actual = compute_everything(layer, x, mask)
        double, double_x = to_float64(layer, x)
        assert_near(actual, compute_everything(double, double_x, mask), error)
        loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        assert actual.pop("aux_loss").dtype == loss_dtype
        assert {tensor.dtype for tensor in actual.values()} == {dtype}


@pytest.mark.feature("float32, float64, bfloat16, float16 modules")
@routers
def test_router_is_exact(router):
    for dtype in LOW:
        layer = make_layer_with_router(router).to(dtype).eval()
        x, mask = MASKED.inputs(dtype=dtype)
        routing = layer.gate(x, mask=mask)
        double, double_x = to_float64(layer, x)
        expected = double.gate(double_x, mask=mask)
        assert routing.probs.dtype == routing.weight.dtype == torch.float32
        if router == "Top2, policy random":  # the same draws for both
            torch.testing.assert_close(routing.probs.double(), expected.probs, rtol=1e-5, atol=1e-6)
            continue
        assert torch.equal(routing.expert, expected.expert)
        assert torch.equal(routing.kept, expected.kept)
        torch.testing.assert_close(routing.weight.double(), expected.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(routing.balance_loss.double(), expected.balance_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.feature("inputs of another dtype than the module's")
@low_dtypes
@paths
def test_mixed_dtypes(path, dtype, limit):
    layer = path.build(policy="all")
    x, mask = path.inputs(dtype=dtype)
    if path.experts in ("ExpertList", "custom"):  # modules of the user's see what the user passes
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            run_layer(layer, x, mask)
        limit("custom experts, like any PyTorch module, receive the input's dtype; autocast casts tokens and weights")
        return
    out, aux_loss = run_layer(layer, x, mask)
    expected = compute_everything(layer, x.detach().float().requires_grad_(), mask)
    assert out.dtype == dtype
    assert relative_error(out, expected["out"]) < LOW[dtype]
    assert torch.equal(aux_loss, expected["aux_loss"])
    assert compute_gradients(layer, x, (out, aux_loss))["input"].dtype == dtype


@pytest.mark.feature("autocast to bfloat16 and float16")
@paths
def test_autocast(path):
    layer = path.build(policy="all")
    x, mask = path.inputs()
    expected = compute_everything(layer, x, mask)
    for dtype, error in LOW.items():
        with torch.autocast("cpu", dtype):
            out, aux_loss = run_layer(layer, x, mask)
        actual = {"out": out, **compute_gradients(layer, x, (out, aux_loss))}
        assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
        assert_near(actual, {name: expected[name] for name in actual}, error)
        if has_native_matmul(dtype):  # the experts' products did run in the low precision
            assert relative_error(out, expected["out"]) > 1e-6
        assert torch.equal(aux_loss, expected["aux_loss"])  # and the router did not


@pytest.mark.feature("autocast to bfloat16 and float16")
@routers
def test_router_ignores_autocast(router):
    layer = make_layer_with_router(router)
    x, mask = MASKED.inputs()
    torch.manual_seed(2)
    expected = layer.gate(x, mask=mask)
    for dtype in LOW:
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype):
            routing = layer.gate(x, mask=mask)
        for name in ("probs", "weight", "expert", "kept", "balance_loss", "z_loss"):
            assert torch.equal(getattr(routing, name), getattr(expected, name)), name


@pytest.mark.feature("float16 autocast with a gradient scaler")
@paths
def test_gradient_scaler(path):
    layer = path.build(policy="all")
    x, mask = path.inputs()
    expected = compute_gradients(layer, x, run_layer(layer, x, mask))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(layer.state_dict())
    with torch.autocast("cpu", torch.float16):
        out, aux_loss = run_layer(layer, x, mask)
    weigh = torch.linspace(-1, 1, out.numel()).view(out.shape)
    scaler.scale((out * weigh).sum() + aux_loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no overflow was found
    for name, parameter in layer.named_parameters():
        step = before[name] - parameter
        assert relative_error(step, expected[name]) < 2e-2, name


def make_function(layer, mask):
    """The layer as a function of its input and parameters, and the parameters."""
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        torch.manual_seed(2)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, mask))

    return function, [parameter.detach().clone().requires_grad_() for parameter in parameters]


@pytest.mark.feature("gradcheck in float64")
@pytest.mark.parametrize("path", ALL_VARIANTS, ids=str)
def test_gradcheck(path):
    layer = path.build().double()
    x, mask = path.inputs(dtype=torch.float64)
    function, parameters = make_function(layer, mask)
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.feature("second derivatives (gradgradcheck)")
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS), ids=str)
def test_gradgradcheck(path):
    layer = path.build().double()
    x, mask = path.inputs(1, 6, dtype=torch.float64)
    function, parameters = make_function(layer, mask)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.feature("NaN in one token stays with it; NaN in padding goes nowhere")
@paths
def test_nan(path):
    layer = path.build(policy="all")
    x, mask = path.inputs()
    expected = compute_everything(layer, x, mask)
    broken = x.detach().clone()
    broken[0, 3] = torch.nan
    out, _ = run_layer(layer, broken, mask)
    others = torch.ones(x.shape[:2], dtype=torch.bool)
    others[0, 3] = False
    assert out[others].isfinite().all()
    if path.capacity == "dropless":  # with a capacity it may move others in the queue, and be dropped itself
        torch.testing.assert_close(out[others], expected["out"][others])
        assert out[0, 3].isnan().all()
    if mask is not None:
        padding = x.detach().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
        assert_all_close(compute_everything(layer, padding, mask), expected)
