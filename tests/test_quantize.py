"""Experts in 8 bits: near the experts that they were made of, frozen, and as experts are in every other way."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating, quantize
from mixture_of_experts.dispatch.decision import decision_on
from mixture_of_experts.ops import ClampedSwiGLU
from mixture_of_experts.parallel.style import stacked_names
from mixture_of_experts.quantize import QuantizedExperts, quantize_experts
from mixture_of_experts.summary import summary
from mixture_of_experts.unstack import unstack

DIM = 32
LAYERS: dict[str, Any] = {
    "gated": lambda: MoE(DIM, gate=TopKGating(DIM, 6), experts=GatedExperts(DIM, 6, 48)),
    "bias, odd sizes": lambda: MoE(DIM, gate=TopKGating(DIM, 6), experts=Experts(DIM, 6, 37, bias=True)),
    "two to one": lambda: MoE(
        DIM, gate=TopKGating(DIM, 6), experts=GatedExperts(DIM, 6, 48, activation=ClampedSwiGLU(), bias=True)
    ),
    "capacity": lambda: MoE(DIM, 6, second_policy_train="all", second_policy_eval="all"),
    "two levels": lambda: HeirarchicalMoE(DIM, (2, 3), second_policy_train="all", second_policy_eval="all"),
}


def frozen(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    layer.experts.requires_grad_(False)
    for bias in (b for n, b in layer.experts.named_parameters() if n.startswith("b")):
        bias.normal_()
    return layer


def unpacked(experts: QuantizedExperts, number: str) -> Tensor:
    scale = getattr(experts, f"w{number}_scale")
    return quantize.unpack(getattr(experts, f"w{number}_packed")) * scale.unsqueeze(-2)


def rounded(layer: Any) -> Any:
    """The layer with its weights as 8 bits store them, in experts of the plain class."""
    small, layer = quantize_experts(copy.deepcopy(layer)), copy.deepcopy(layer)
    for number in "132" if small.experts.gated else "12":
        getattr(layer.experts, f"w{number}").copy_(unpacked(small.experts, number))
    return layer


def run(layer: Any, x: Tensor) -> list[Tensor]:
    """Output, loss, and the gradients of tokens and routers."""
    x = x.clone().requires_grad_()
    out, loss = layer(x)
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [out, loss, *torch.autograd.grad(out.square().sum() + loss, [x, *weights])]


@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_with_rounded_weights(name):
    """Each within half a step of its own; outputs and gradients are those of plain experts with the rounded weights."""
    layer, x = frozen(name, torch.float64), torch.randn(2, 9, DIM, dtype=torch.float64)
    small = quantize_experts(copy.deepcopy(layer))
    for number in "132" if small.experts.gated else "12":
        scale = getattr(small.experts, f"w{number}_scale").unsqueeze(-2)
        weight, found = getattr(layer.experts, f"w{number}") / scale, unpacked(small.experts, number) / scale
        steps = (weight.amax(dim=-1, keepdim=True) - weight.amin(dim=-1, keepdim=True)) / 255
        assert ((found - weight).abs() <= 0.501 * steps).all()
        assert scale.equal(scale.to(torch.bfloat16).double())
    assert not list(small.experts.parameters())
    for found, wanted in zip(run(small, x), run(rounded(layer), x), strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(run(small, x), run(layer, x), strict=True):
        assert (found - wanted).norm() <= 0.03 * wanted.norm()
    slots = torch.randn(*small.experts.expert_dims, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(small.experts(slots), rounded(layer).experts(slots))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_token_and_few_rows_are_computed_as_many(name, dtype):
    """Whether the bytes are multiplied directly, row by row or expert by expert, or are unpacked first."""
    layer = frozen(name, dtype).eval()
    small, wanted = quantize_experts(copy.deepcopy(layer)), rounded(layer)
    for tokens in (1, 2, 9, 90):
        x = torch.randn(1, tokens, DIM, dtype=dtype)
        found, expected = small(x)[0], wanted(x)[0]
        assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
        apart = torch.stack([x, x], dim=-1)[..., 0]  # numbers of a token do not lie side by side
        assert small(apart)[0].equal(found)


def test_gradients_of_any_order():
    counts, (packed, scale) = torch.tensor([2, 0, 1]), quantize.pack(torch.randn(3, 2, 3))
    for back, width in ((False, 2), (True, 3)):
        x = torch.randn(4, width, dtype=torch.float64, requires_grad=True)  # the last row is nobody's
        function = lambda x: quantize._ByPacked.apply(x, packed, scale, counts, back).square()  # noqa: B023, E731
        assert not function(x)[3:].any()
        torch.autograd.gradcheck(function, x)
        torch.autograd.gradgradcheck(function, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own, of vmap
def test_transforms():
    """Of torch.func."""
    layer, x = frozen("gated", torch.float64), torch.randn(3, 1, 2, DIM, dtype=torch.float64)
    small, wanted = quantize_experts(copy.deepcopy(layer)).eval(), rounded(layer).eval()
    for transform in (torch.func.jacrev, torch.vmap, lambda of: torch.vmap(torch.func.grad(lambda x: of(x).sum()))):
        one = x if transform is torch.vmap else x[0] if transform is torch.func.jacrev else x
        found, expected = (transform(lambda x, each=each: each(x)[0])(one) for each in (small, wanted))
        torch.testing.assert_close(found, expected)


def test_float16_has_the_range_of_its_weights():
    """Products without the channels' scale would leave it, and gradients times the scale alone vanish."""
    layer = MoE(DIM, gate=TopKGating(DIM, 6), experts=Experts(DIM, 6, 48, activation=nn.ReLU))
    layer.experts.requires_grad_(False).w1.mul_(0.02)
    layer.eval().half()
    small, wanted = quantize_experts(copy.deepcopy(layer)), rounded(layer)
    for tokens in (3, 90):
        x = (torch.randn(1, tokens, DIM) * 15000).half().requires_grad_()
        found, expected = small(x)[0], wanted(x)[0]
        torch.testing.assert_close(found, expected, atol=0.5, rtol=0.02)  # float16's step at outputs of 700
        of = torch.full_like(found, 1e-4)
        found, expected = (torch.autograd.grad(out, x, of)[0].float() for out in (found, expected))
        assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("largest", [65400.0, 1e-6])
def test_scales_lie_in_the_range_of_float16(largest):
    weight = torch.rand(1, 3, 5).index_fill_(1, torch.tensor(0), 1).mul_(largest).half()
    packed, scale = quantize.pack(weight)
    found = quantize.unpack(packed) * scale.unsqueeze(-2)
    assert (found - weight).abs().max() <= 0.01 * largest


def test_sizes_of_one():
    for p, q in ((1, 3), (1, 1), (3, 1)):
        weight = torch.randn(2, p, q)
        packed, scale = quantize.pack(weight)
        for expert in range(2):
            found = quantize.unpack(packed[expert]) * scale[expert]
            torch.testing.assert_close(found, weight[expert], atol=0.05, rtol=0.05)
            assert found.equal(quantize.unpack(packed)[expert] * scale[expert])


@torch.no_grad()
def test_defaults_of_the_caller():
    """Default dtype and device neither hide torch's operators, while this is imported, nor reach a call."""
    small, x = quantize_experts(frozen("gated")).eval(), torch.randn(1, 9, DIM)
    wanted = [small(x[:, :n])[0] for n in (1, 9)]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert quantize.is_direct.__wrapped__()
            assert all(small(x[:, :n])[0].equal(out) for n, out in zip((1, 9), wanted, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_an_activation_with_weights(dtype, autocast):
    """It gets numbers of its own dtype, or computes in autocast, as in other experts."""
    layer = MoE(DIM, gate=TopKGating(DIM, 6), experts=Experts(DIM, 6, 48, activation=nn.PReLU)).eval()
    layer.experts.requires_grad_(False)
    layer.to(dtype)
    small, wanted = quantize_experts(copy.deepcopy(layer)), rounded(layer)
    for tokens in (1, 30):
        x = torch.randn(1, tokens, DIM, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found, expected = small(x)[0], wanted(x)[0]
        assert (found - expected).norm() <= 0.02 * expected.norm()


def test_copies_casts_states_checkpoints_and_autocast():
    small, x = quantize_experts(frozen("gated")), torch.randn(2, 9, DIM)
    wanted = run(small, x)
    again = run(copy.deepcopy(small), x)
    other = quantize_experts(frozen("gated"))
    for buffer in other.experts.buffers():
        buffer.zero_()
    other.load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.w1"'):
        frozen("gated").load_state_dict(small.state_dict())
    for found in (again, run(other, x), run(Checkpointed(small), x)):
        assert all(one.equal(same) for one, same in zip(found, wanted, strict=True))
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(small).to(dtype)
        assert cast.experts.w1_packed.equal(small.experts.w1_packed)
        assert cast.experts.w1_scale.equal(small.experts.w1_scale)
        out = cast(x.to(dtype))[0]
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wanted[0], atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(small(x)[0].float(), wanted[0], atol=2e-2, rtol=2e-2)
    assert small.to("meta")(x.to("meta"))[0].shape == x.shape


class Checkpointed(nn.Module):
    """A layer under activation checkpointing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_dead_channels_and_dropout():
    experts = Experts(DIM, 2, 48, dropout=0.5).requires_grad_(False)
    experts.w1[0, :, 3] = 0
    experts.w2[0, 3] = 0
    layer = quantize_experts(MoE(DIM, 2, experts=experts))
    assert not unpacked(layer.experts, "1")[0, :, 3].any()
    assert not unpacked(layer.experts, "2")[0, 3].any()
    x = torch.randn(1, 20, DIM)
    assert not layer(x)[0].equal(layer(x)[0])
    layer.eval()
    assert layer(x)[0].isfinite().all()


def test_it_is_counted_as_it_was():
    layer = frozen("gated")
    before = summary(layer)
    assert str(summary(quantize_experts(layer))) == str(before)


def test_what_it_cannot_quantise():
    with pytest.raises(ValueError, match=r"experts.w1 is trainable, 8 bits are not: call requires_grad_\(False\)"):
        quantize_experts(MoE(DIM, 4))
    with pytest.raises(ValueError, match=r"experts\.w1 is on the meta device"):
        quantize_experts(frozen("gated").to("meta"))
    small, lists = quantize_experts(frozen("gated")), unstack(frozen("gated"))
    for model, has in (
        (nn.Linear(2, 2), "no experts at all"),
        (small, "QuantizedExperts"),
        (lists, "UnstackedExperts"),
    ):
        with pytest.raises(ValueError, match=rf"has no stacked experts \(Experts, GatedExperts\), but {has}: unstack"):
            quantize_experts(model)
    with pytest.raises(
        ValueError, match=r"has no stacked experts .* but QuantizedExperts: .* from 8 bits nothing goes"
    ):
        unstack(small)
    with pytest.raises(
        ValueError, match=r"QuantizedExperts has no parameter stacked .*8 bits have no parameters to spread"
    ):
        stacked_names(small.experts, (4,), ())
    with pytest.raises(ValueError, match="give the layer or model around"):
        quantize_experts(Experts(DIM, 4).requires_grad_(False))
    with pytest.raises(TypeError, match="model must be a model"):
        quantize_experts("a model")  # type: ignore[type-var]
    two = nn.ModuleList([frozen("gated"), MoE(DIM, 4)])
    with pytest.raises(ValueError, match=r"1.experts.w1 is trainable"):
        quantize_experts(two)
    assert isinstance(two[0].experts, GatedExperts)  # a refused call changes nothing
    broken = frozen("gated")
    for number in (torch.nan, -torch.inf):
        broken.experts.w2[0, 1, 2] = number
        with pytest.raises(ValueError, match=r"experts.w2 has numbers that are not finite"):
            quantize_experts(broken)
    for given in ((), (torch.tensor([1, 0]),)):
        with pytest.raises(
            ValueError, match=r"QuantizedExperts of 6 experts reads slots of shape \(6, s, 32\), got \(2, 32\)"
        ):
            quantize_experts(frozen("gated")).experts(torch.randn(2, DIM), *given)


@torch.no_grad()
def test_torchs_operators_are_checked(monkeypatch):
    """What is absent or computes something else is not called."""
    assert quantize.is_direct()
    x, wrong = torch.randn(1, 9, DIM), lambda *_: torch._no_such_operator  # type: ignore[attr-defined]
    wanted = quantize_experts(frozen("gated")).eval()(x)[0]
    sums, whole = quantize.sum_of_packed_rows, quantize.unpacked_rows
    for name, other in (
        ("sum_of_packed_rows", lambda *given: sums(*given) * 1.02),
        ("unpacked_rows", lambda packed: whole(packed) + 0.01),
        ("sum_of_packed_rows", wrong),
        ("unpacked_rows", wrong),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, name, other)
            assert not quantize.is_direct.__wrapped__()
    monkeypatch.setattr(quantize, "is_direct", lambda: False)
    monkeypatch.setattr(quantize, "sum_of_packed_rows", wrong)
    monkeypatch.setattr(quantize, "unpacked_rows", wrong)
    torch.testing.assert_close(quantize_experts(frozen("gated")).eval()(x)[0], wanted)


def test_a_product_in_parts_for_more_threads(monkeypatch):
    packed, x, expert = quantize.pack(torch.randn(3, 6, 5))[0], torch.randn(2, 6), torch.tensor([2, 0])
    wanted = torch.stack([row @ quantize.unpack(packed[e]) for row, e in zip(x, expert.tolist(), strict=True)])
    for threads in (1, 3, 4, 7, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.testing.assert_close(quantize.few_by_packed(x, packed, quantize.places(expert, 6)), wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_compiled():
    small, x = quantize_experts(frozen("gated")), torch.randn(2, 9, DIM)
    torch._dynamo.reset()
    for found, wanted in zip(
        run(torch.compile(small, fullgraph=True, backend="aot_eager"), x), run(small, x), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    counter, small = torch._dynamo.testing.CompileCounter(), small.eval()
    lengths = torch.compile(small.experts.forward, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in (9, 3, 30):  # few tokens are no case of their own in a graph
            decision = decision_on(torch.arange(2 * tokens).view(tokens, 2) % 6, torch.ones(tokens, 2), 6)
            lengths(torch.randn(tokens, DIM), decision)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_import_computes_nothing():
    """Nor does a call under fake tensors, which have no numbers."""
    code = """
import torch
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    from mixture_of_experts import MoE
    from mixture_of_experts import quantize
    moe = MoE(8, 4)
    moe.requires_grad_(False)
assert quantize.is_direct.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
