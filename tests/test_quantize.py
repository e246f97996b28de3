"""Experts in 8 and 4 bits: near the experts they were made of, frozen, and as experts are in every other way."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating, ops, quantize
from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.ops import ClampedSwiGLU, int4, int8
from mixture_of_experts.ops.cpu import decode
from mixture_of_experts.parallel.style import find_sharded_names
from mixture_of_experts.quantize import QuantizedExperts, iter_unpacked, quantize_experts
from mixture_of_experts.summary import summary
from mixture_of_experts.unstack import unstack

DIM, GROUP = 32, 32
BITS = (8, 4)
LAYERS: dict[str, Any] = {
    "gated": lambda bits: MoE(DIM, gate=TopKGating(DIM, 6), experts=GatedExperts(DIM, 6, 64)),
    "bias, odd sizes": lambda bits: MoE(
        DIM, gate=TopKGating(DIM, 6), experts=Experts(DIM, 6, {8: 37, 4: 96}[bits], bias=True)
    ),
    "two to one": lambda bits: MoE(
        DIM, gate=TopKGating(DIM, 6), experts=GatedExperts(DIM, 6, 64, activation=ClampedSwiGLU(), bias=True)
    ),
    "capacity": lambda bits: MoE(DIM, 6, second_policy_train="all", second_policy_eval="all"),
    "two levels": lambda bits: HeirarchicalMoE(DIM, (2, 3), second_policy_train="all", second_policy_eval="all"),
}


def make_frozen_layer(name: str, dtype: torch.dtype = torch.float32, bits: int = 8) -> Any:
    torch.manual_seed(0)
    layer = LAYERS[name](bits).to(dtype)
    layer.experts.requires_grad_(False)
    for bias in (b for n, b in layer.experts.named_parameters() if n.startswith("b")):
        bias.normal_()
    return layer


def quantize_layer(layer: Any, bits: Any) -> Any:
    return quantize_experts(layer, bits, group=GROUP)


def unpack_experts(experts: QuantizedExperts, number: str) -> Tensor:
    """The weights that are stored, by the definition: every number is looked up in the bytes."""
    p, q = experts.placeholder_weight(f"w{number}").shape[-2:]
    packed, scale = (getattr(experts, f"w{number}_{part}") for part in ("packed", "scale"))
    i, o = torch.arange(p).unsqueeze(1), torch.arange(q)
    if experts.bits == 8:
        step, low = packed[..., q:].contiguous().view(torch.float32).double().split(1, dim=-1)
        return (packed[..., :q].double() * step + low) * scale.double().unsqueeze(-2)
    groups, half = getattr(experts, f"w{number}_groups"), packed.shape[-1]
    byte = packed[..., o // (2 * half), i, o % half]
    levels = torch.where(o // half % 2 == 1, byte // 16, byte % 16).double()
    step, zero = groups.view(torch.bfloat16).double()[..., i // (p // groups.shape[-3]), o, :].unbind(-1)
    return ((levels - 8) * step + zero) * scale.double().unsqueeze(-2)


def round_layer(layer: Any, bits: int) -> Any:
    """The layer with its weights as few bits store them, in experts of the plain class."""
    small, layer = quantize_layer(copy.deepcopy(layer), bits), copy.deepcopy(layer)
    for number in "132" if small.experts.gated else "12":
        getattr(layer.experts, f"w{number}").copy_(unpack_experts(small.experts, number))
    return layer


def run_layer(layer: Any, x: Tensor) -> list[Tensor]:
    """Output, loss, and the gradients of tokens and routers."""
    x = x.clone().requires_grad_()
    out, loss = layer(x)
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [out, loss, *torch.autograd.grad(out.square().sum() + loss, [x, *weights])]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_with_rounded_weights(name, bits):
    """Outputs and gradients are those of plain experts with the rounded weights, and near those of the own ones."""
    layer, x = make_frozen_layer(name, torch.float64, bits), torch.randn(2, 9, DIM, dtype=torch.float64)
    small, wanted = quantize_layer(copy.deepcopy(layer), bits), round_layer(layer, bits)
    for number in "132" if small.experts.gated else "12":
        scale = getattr(small.experts, f"w{number}_scale")
        assert scale.equal(scale.to(torch.bfloat16).double())
    assert not list(small.experts.parameters())
    for found, expected in zip(run_layer(small, x), run_layer(wanted, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # numbers are unpacked in float32
    for found, expected in zip(run_layer(small, x), run_layer(layer, x), strict=True):
        assert (found - expected).norm() <= {8: 0.03, 4: 0.3}[bits] * expected.norm()
    slots = torch.randn(*small.experts.expert_dims, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(small.experts(slots), wanted.experts(slots), rtol=1e-5, atol=1e-6)


def test_8_bits_round_to_the_nearest_step():
    layer = make_frozen_layer("bias, odd sizes", torch.float64)
    small = quantize_layer(copy.deepcopy(layer), 8)
    for number in "12":
        scale = getattr(small.experts, f"w{number}_scale").unsqueeze(-2)
        weight, found = getattr(layer.experts, f"w{number}") / scale, unpack_experts(small.experts, number) / scale
        steps = (weight.amax(dim=-1, keepdim=True) - weight.amin(dim=-1, keepdim=True)) / 255
        assert ((found - weight).abs() <= 0.501 * steps).all()


@pytest.mark.parametrize(("group", "error"), [(32, 0.080), (64, 0.091), (128, 0.101), (256, 0.111)])
def test_4_bits_round_to_smaller_error(group, error):
    """Of levels from the smallest number to the largest of a group, and levels around 0; of normal numbers, and of
    numbers of one sign, and with one that is far from the others, in which both ways occur."""
    weight = torch.randn(2, 512, 70)
    weight[:, :, 10:20].abs_()
    weight[:, ::group, 20:40] *= 3
    stored = quantize.pack_stack(weight, 4, group)
    small = QuantizedExperts.__new__(QuantizedExperts)
    nn.Module.__init__(small)
    small.expert_dims = (2,)
    for name, value in stored.items():
        small.register_buffer(f"w1_{name}", value)
    found, scale = unpack_experts(small, "1"), stored["scale"].double().unsqueeze(-2)
    normal = slice(40, None)
    assert (found - weight)[..., normal].norm() <= error * weight[..., normal].norm()

    parts = (weight / scale).unflatten(1, (-1, group))
    low, high = parts.amin(dim=2, keepdim=True), parts.amax(dim=2, keepdim=True)
    farthest = torch.where(high > -low, high, low)
    errors = []
    for step, zero in (((high - low) / 15, low + 8 * (high - low) / 15), (farthest / -8, torch.zeros_like(low))):
        step, zero = step.bfloat16().double(), zero.bfloat16().double()
        levels = ((parts - zero) / step).round().clamp(-8, 7)
        errors.append((levels * step + zero - parts).square().sum(dim=2))
    errs = (found / scale - weight / scale).unflatten(1, (-1, group)).square().sum(dim=2)
    torch.testing.assert_close(errs, torch.minimum(*errors), rtol=1e-3, atol=1e-6)
    assert 0.02 < (errors[1] < errors[0]).float().mean() < 0.98


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_token_and_few_rows_are_computed_as_many(name, dtype, bits):
    """Whether the bytes are multiplied directly, row by row or expert by expert, or are unpacked first."""
    layer = make_frozen_layer(name, dtype, bits).eval()
    small, wanted = quantize_layer(copy.deepcopy(layer), bits), round_layer(layer, bits)
    for tokens in (1, 2, 9, 240):
        x = torch.randn(1, tokens, DIM, dtype=dtype)
        found, expected = small(x)[0], wanted(x)[0]
        exact = dtype == torch.float32 and (bits == 8 or tokens == 240)
        assert (found - expected).norm() <= (1e-5 if exact else 1e-2) * expected.norm()
        apart = torch.stack([x, x], dim=-1)[..., 0]  # numbers of a token do not lie side by side
        assert small(apart)[0].equal(found)


@pytest.mark.parametrize("bits", BITS)
def test_explain_call_names_the_implementation(bits, monkeypatch):
    """And why rows are not multiplied one by one; `ops.use` changes nothing."""
    layer = quantize_layer(make_frozen_layer("bias, odd sizes", bits=bits), bits).eval()

    def explain(tokens: int, dtype: torch.dtype = torch.float32) -> ops.Explanation:
        return ops.explain_call(layer, torch.randn(1, tokens, DIM, dtype=dtype))

    for tokens in (1, decode.MAX_ROW_SUM_TOKENS):
        assert (explain(tokens).implementation, explain(tokens).reasons) == ("row_by_row", {})
    with ops.use("plain"):
        assert explain(1).implementation == "row_by_row"
    assert [gate.implementation for gate in explain(1).gates] == ["numbers"]

    def check_reason(found: ops.Explanation, words: str) -> None:
        assert found.implementation == "expert_by_expert"
        assert words in found.reasons["row_by_row"]

    check_reason(explain(decode.MAX_ROW_SUM_TOKENS + 1), "1 to 4 tokens")
    check_reason(explain(0), "1 to 4 tokens")
    dropped = assign_experts(torch.tensor([[0, -1]]), torch.ones(1, 2), 6)
    check_reason(ops.explain_call(layer.experts, torch.randn(1, DIM), dropped), "all of them kept")
    layer.gate.k = 6
    with monkeypatch.context() as patch:
        patch.setattr(decode, "MAX_DECODE_ROWS", 11)
        check_reason(explain(2), "at most 11 choices")
    layer.experts.train()
    check_reason(explain(1), "eval mode")
    layer.eval().double()
    check_reason(explain(1, torch.float64), "torch.float64")
    monkeypatch.setattr(int8, "has_packed_row_operators", lambda: False)
    monkeypatch.setattr(int4, "find_cpu_block", lambda: int4.PORTABLE_BLOCK)
    check_reason(explain(1, torch.float64), "no operator on this machine")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("counts", [(1, 0, 3), (0, 0, 0), (70, 0, 1), (9, 40, 0)])
def test_products_by_expert(counts, bits, monkeypatch):
    """Of experts with few rows, many and none, also in parts; rows past the last expert's give 0."""
    weight, counts = torch.randn(3, 512, 70), torch.tensor(counts)
    stored = quantize.pack_stack(weight, bits, 128)
    packed, groups, scale = (stored.get(name) for name in ("packed", "groups", "scale"))
    parts = [
        list(quantize.iter_unpacked(packed[i], groups if groups is None else groups[i], scale[i])) for i in range(3)
    ]
    whole = torch.stack([torch.cat([part for _, part in of]) for of in parts]).double() * scale.unsqueeze(1).double()
    expert = torch.arange(3).repeat_interleave(counts)
    for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 5e-3 if bits == 4 else 1e-5), (torch.bfloat16, 1e-2)):
        for back in (False, True):
            x = torch.randn(int(counts.sum()) + 2, 70 if back else 512, dtype=torch.float64).to(dtype)
            of = whole.mT if back else whole
            wanted = torch.cat(
                [torch.bmm(x[:-2].double().unsqueeze(1), of[expert]).squeeze(1), of.new_zeros(2, of.shape[2])]
            )
            for most in (quantize.MAX_UNPACKED_NUMEL, 256 * 70):
                monkeypatch.setattr(quantize, "MAX_UNPACKED_NUMEL", most)
                found = quantize.rows_by_packed(x, packed, groups, scale, counts, back)
                assert found.dtype == dtype
                assert (found - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("bits", BITS)
def test_on_the_meta_device_shapes_are_those_of_numbers(bits):
    weight = torch.randn(2, 128, 70)
    whole, empty = (quantize.pack_stack(each, bits, 128) for each in (weight, weight.to("meta")))
    assert {name: part.shape for name, part in empty.items()} == {name: part.shape for name, part in whole.items()}


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_any_order(bits):
    counts, stored = torch.tensor([2, 0, 1]), quantize.pack_stack(torch.randn(3, 32, 3), bits, 32)
    stored = [stored.get(name) for name in ("packed", "groups", "scale")]
    for back, width in ((False, 32), (True, 3)):
        x = torch.randn(4, width, dtype=torch.float64, requires_grad=True)  # the last row is nobody's
        function = lambda x: quantize._PackedMatmul.apply(x, *stored, counts, back).square()  # noqa: B023, E731
        assert not function(x)[3:].any()
        torch.autograd.gradcheck(function, x)
        torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own, of vmap
def test_transforms(bits):
    """Of torch.func."""
    layer, x = make_frozen_layer("gated", torch.float64), torch.randn(3, 1, 2, DIM, dtype=torch.float64)
    small, wanted = quantize_layer(copy.deepcopy(layer), bits).eval(), round_layer(layer, bits).eval()
    for transform in (torch.func.jacrev, torch.vmap, lambda of: torch.vmap(torch.func.grad(lambda x: of(x).sum()))):
        one = x if transform is torch.vmap else x[0] if transform is torch.func.jacrev else x
        found, expected = (transform(lambda x, each=each: each(x)[0])(one) for each in (small, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_float16_has_the_range_of_its_weights(bits):
    """Products without the channels' scale would leave it, and gradients times the scale alone vanish."""
    torch.manual_seed(0)
    layer = MoE(DIM, gate=TopKGating(DIM, 6), experts=Experts(DIM, 6, 64, activation=nn.ReLU))
    layer.experts.requires_grad_(False).w1.mul_(0.02)
    layer.eval().half()
    small, wanted = quantize_layer(copy.deepcopy(layer), bits), round_layer(layer, bits)
    for tokens in (3, 90):
        x = (torch.randn(1, tokens, DIM) * 15000).half().requires_grad_()
        found, expected = small(x)[0], wanted(x)[0]
        assert (found.float() - expected.float()).norm() <= 0.01 * expected.float().norm()
        of = torch.full_like(found, 1e-4)
        found, expected = (torch.autograd.grad(out, x, of)[0].float() for out in (found, expected))
        assert (found - expected).norm() <= 0.06 * expected.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("largest", [65400.0, 1e-6])
def test_scales_lie_in_the_range_of_float16(largest, bits):
    weight = torch.rand(1, 32, 5).index_fill_(1, torch.tensor(0), 1).mul_(largest).half()
    stored = quantize.pack_stack(weight, bits, 32)
    assert stored["scale"].isfinite().all()
    groups = stored["groups"][0] if bits == 4 else None
    (_, found), *_ = quantize.iter_unpacked(stored["packed"][0], groups, stored["scale"][0])
    assert (found * stored["scale"] - weight).abs().max() <= {8: 0.01, 4: 0.05}[bits] * largest


def test_sizes_of_one():
    for p, q in ((1, 3), (1, 1), (3, 1)):
        weight = torch.randn(2, p, q)
        packed, scale = quantize.pack_stack(weight).values()
        for expert in range(2):
            found = int8.unpack_matrix(packed[expert]) * scale[expert]
            torch.testing.assert_close(found, weight[expert], atol=0.05, rtol=0.05)
            torch.testing.assert_close(found, int8.unpack_matrix(packed)[expert] * scale[expert])


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_defaults_of_the_caller(bits):
    """Default dtype and device neither hide torch's operators, while this is imported, nor reach a call."""
    small, x = quantize_layer(make_frozen_layer("gated"), bits).eval(), torch.randn(1, 9, DIM)
    wanted = [small(x[:, :n])[0] for n in (1, 9)]
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        assert int8.has_packed_row_operators.__wrapped__()
        assert int4.find_cpu_block.__wrapped__() == int4.find_cpu_block()
        assert all(small(x[:, :n])[0].equal(out) for n, out in zip((1, 9), wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_an_activation_with_weights(dtype, autocast, bits):
    """It gets numbers of its own dtype, or computes in autocast, as in other experts."""
    layer = MoE(DIM, gate=TopKGating(DIM, 6), experts=Experts(DIM, 6, 64, activation=nn.PReLU)).eval()
    layer.experts.requires_grad_(False)
    layer.to(dtype)
    small, wanted = quantize_layer(copy.deepcopy(layer), bits), round_layer(layer, bits)
    for tokens in (1, 30):
        x = torch.randn(1, tokens, DIM, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found, expected = small(x)[0], wanted(x)[0]
        assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("bits", BITS)
def test_copies_casts_states_checkpoints_and_autocast(bits):
    small, x = quantize_layer(make_frozen_layer("gated"), bits), torch.randn(2, 9, DIM)
    wanted = run_layer(small, x)
    again = run_layer(copy.deepcopy(small), x)
    other = quantize_layer(make_frozen_layer("gated"), bits)
    for buffer in other.experts.buffers():
        buffer.zero_()
    other.load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "experts.w1"'):
        make_frozen_layer("gated").load_state_dict(small.state_dict())
    for found in (again, run_layer(other, x), run_layer(checkpoint_wrapper(small), x)):
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


@pytest.mark.parametrize("bits", BITS)
def test_dead_channels_and_dropout(bits):
    experts = Experts(DIM, 2, 64, dropout=0.5).requires_grad_(False)
    experts.w1[0, :, 3] = 0
    experts.w2[0, 3] = 0
    layer = quantize_layer(MoE(DIM, 2, experts=experts), bits)
    assert not unpack_experts(layer.experts, "1")[0, :, 3].any()
    if bits == 8:  # where a row has steps of its own
        assert not unpack_experts(layer.experts, "2")[0, 3].any()
    x = torch.randn(1, 20, DIM)
    assert not layer(x)[0].equal(layer(x)[0])
    layer.eval()
    assert layer(x)[0].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_it_is_counted_as_it_was(bits):
    layer = make_frozen_layer("bias, odd sizes", bits=bits)
    before = summary(layer)
    assert summary(quantize_layer(layer, bits)).parameters == before.parameters
    layer = make_frozen_layer("gated")
    before = summary(layer)
    assert str(summary(quantize_layer(layer, bits))) == str(before)


def test_rejects_unsupported_experts():
    small, two = quantize_experts(make_frozen_layer("gated")), nn.ModuleList([make_frozen_layer("gated"), MoE(DIM, 4)])
    broken: list[Any] = [make_frozen_layer("gated"), make_frozen_layer("gated")]
    for layer, number in zip(broken, (torch.nan, -torch.inf), strict=True):
        layer.experts.w2[0, 1, 2] = number
    for model, error in (
        (MoE(DIM, 4), r"experts.w1 is trainable, but 8-bit weights cannot be trained; call requires_grad_\(False\)"),
        (two, r"1.experts.w1 is trainable"),
        (make_frozen_layer("gated").to("meta"), r"experts\.w1 is on the meta device"),
        *((layer, r"experts.w2 has values that are not finite") for layer in broken),
        (nn.Linear(2, 2), r"has no stacked experts \(Experts, GatedExperts\); it has no experts at all. unstack"),
        (small, r"has no stacked .*; it has QuantizedExperts. unstack.* quantized experts cannot be converted back"),
        (unstack(make_frozen_layer("gated")), "has no stacked .*; it has UnstackedExperts. unstack"),
        (Experts(DIM, 4).requires_grad_(False), "pass the layer or model that contains it"),
        ("a model", "model must be a model"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            quantize_experts(model)
    assert isinstance(two[0].experts, GatedExperts)  # a refused call changes nothing
    with pytest.raises(ValueError, match=r"has no stacked experts .* it has QuantizedExperts"):
        unstack(small)
    with pytest.raises(ValueError, match=r"must have parameters .*Quantized experts have no parameters to shard"):
        find_sharded_names(small.experts, (4,), ())
    for given in ((), (torch.tensor([1, 0]),)):
        with pytest.raises(ValueError, match=r"with 6 experts expects slots of shape \(6, s, 32\), got \(2, 32\)"):
            small.experts(torch.randn(2, DIM), *given)


def test_rejects_unsupported_4_bit_weights():
    """A refused call changes nothing."""
    model = nn.ModuleList([make_frozen_layer("gated"), make_frozen_layer("bias, odd sizes")])
    for given, error in (
        (dict(bits=4), r"multiples of group=64, but 0\.experts has dim=32. Pass a smaller .*with bits=8"),
        (dict(bits=4, group=32), r"multiples of group=32, but 1\.experts has hidden_dim=37"),
        (dict(bits=3), "bits must be one of 8, 4, got 3"),
        (dict(bits=4, group=48), "group must be one of 32, 64, 128, 256, got 48"),
    ):
        with pytest.raises(ValueError, match=error):
            quantize_experts(model, **given)
        assert not any(isinstance(layer.experts, QuantizedExperts) for layer in model)
    with pytest.raises(ValueError, match=r"experts.w1 is trainable, but 4-bit weights cannot be trained"):
        quantize_experts(MoE(DIM, 4), 4, group=32)
    quantize_experts(model[0], 4, group=32)
    assert str(model[0].experts).startswith("QuantizedExperts(\n  32, 6, hidden_dim=64, bits=4")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gated", "two levels", "bias, odd sizes"])
def test_a_function_chooses_the_numbers(name, dtype):
    """What it returns is what is stored, to the bit; where it returns None, experts are those without a function."""
    model, seen, wanted = nn.ModuleList([make_frozen_layer(name, dtype, 4)]), {}, {}

    def choose(stack, expert, weight):
        seen[stack, expert] = weight.clone()
        weight.zero_()  # a copy
        if expert == 2:
            return None
        n, _, q = weight.shape
        levels, step, zero = torch.randint(16, weight.shape), torch.randn(n, 1, q) * 3e4, torch.randn(n, 1, q)
        wanted[stack, expert] = ((levels - 8) * step.bfloat16().double() + zero.bfloat16().double()).flatten(0, 1)
        return levels, step, zero

    before, nearest = copy.deepcopy(model[0].experts), quantize_layer(make_frozen_layer(name, dtype, 4), 4).experts
    experts = quantize_experts(model, 4, group=GROUP, rounding=choose)[0].experts
    for number in "132" if experts.gated else "12":
        found, plain, stack = (
            weight.view(6, -1, weight.shape[-1])
            for weight in (
                unpack_experts(experts, number),
                unpack_experts(nearest, number),
                getattr(before, f"w{number}"),
            )
        )
        for i in range(6):
            given = seen.pop((f"0.experts.w{number}", i))
            assert given.shape[1] == GROUP
            assert given.flatten(0, 1).equal(stack[i].float())
            assert found[i].equal(plain[i] if i == 2 else wanted[f"0.experts.w{number}", i])
    assert not seen
    kept = quantize_experts(make_frozen_layer(name, dtype, 4), 4, group=GROUP, rounding=lambda *_: None).experts
    assert all(value.equal(buffer) for value, buffer in zip(kept.buffers(), nearest.buffers(), strict=True))


def test_accepts_large_finite_roundings():
    """Levels, steps and zeros at the edge of what float32 holds are unpacked to finite numbers."""
    layer = make_frozen_layer("gated")

    def choose(stack, expert, weight):
        n, _, q = weight.shape
        levels = torch.arange(16.0).repeat(GROUP // 16).view(1, GROUP, 1).expand(n, GROUP, q)
        return levels, torch.full((n, 1, q), 2e37), torch.full((n, 1, q), -1e38)

    experts: Any = quantize_experts(layer, 4, group=GROUP, rounding=choose).experts
    for _, numbers in iter_unpacked(experts.w1_packed[0], experts.w1_groups[0], experts.w1_scale[0]):
        assert numbers.isfinite().all()


def test_rejects_wrong_gate_function_results():
    """A wrong answer for the last of all matrices changes nothing."""
    model = nn.ModuleList([make_frozen_layer("gated"), make_frozen_layer("gated")])
    before = copy.deepcopy(model.state_dict())

    def choose(stack, expert, weight, answer=None):
        weight.zero_()
        return answer if (stack, expert) == ("1.experts.w2", 5) else None

    levels, step = torch.full((2, GROUP, DIM), 15.0), torch.ones(2, 1, DIM)
    of = r"rounding, for 1\.experts\.w2 of expert 5, must return "
    for answer, error in (
        (levels, "levels, step and zero with shapes .* or None to round to the nearest level, got tensor"),
        ((levels, step), "levels, step and zero"),
        ((levels, step, 0.0), "levels, step and zero"),
        ((levels, step[:1], step), r"levels, step and zero with shapes .*\(2, 1, 32\), \(2, 1, 32"),
        ((levels.flatten(0, 1), step, step), r"levels, step and zero"),
        ((levels + 1, step, step), "integer levels from 0 to 15, got 16.0 to 16.0; round and clamp them"),
        ((levels - 16, step, step), "integer levels from 0 to 15, got -1.0 to -1.0"),
        ((levels / 2, step, step), "integer levels from 0 to 15, got 7.5 to 7.5"),
        ((levels / 0, step, step), "integer levels from 0 to 15, got inf to inf"),
        ((levels * torch.nan, step, step), "integer levels from 0 to 15, got nan to nan"),
        ((levels, step * torch.nan, step), "a step that is finite in bfloat16, got values from nan to nan"),
        ((levels, step, step.double() * 1e39), r"a zero that is finite in bfloat16, got .* 1e\+39 to 1e\+39"),
        ((levels, step * 3e38, step), r"a step and a zero .* finite weights for all levels from 0 to 15"),
        ((levels - 7, step * -3e38, step), r"a step and a zero .* finite weights for all levels from 0 to 15"),
        (
            (levels - 7, step * 3e37, step),
            r"a step and a zero .* finite weights for all levels from 0 to 15",
        ),  # 15 * step overflows
        ((levels, step * 2e37, step * 3e38), r"a step and a zero .* finite weights for all levels from 0 to 15"),
    ):
        with pytest.raises(ValueError, match=of + error):
            quantize_experts(model, 4, group=GROUP, rounding=partial(choose, answer=answer))
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    for bits, given in ((8, choose), (4, "gptq")):
        with pytest.raises(ValueError, match=f"`rounding` must be .* and requires bits=4, got .* with bits={bits}"):
            quantize_experts(model, bits, group=GROUP, rounding=given)
    assert not any(isinstance(layer.experts, QuantizedExperts) for layer in model)


@torch.no_grad()
def test_blocks_of_another_machine():
    """Bytes in any blocks stand for the same numbers; a state is put into the blocks of the experts that load it."""
    small, x = quantize_layer(make_frozen_layer("gated"), 4).eval(), torch.randn(1, 9, DIM)
    wanted = [unpack_experts(small.experts, number) for number in "132"]
    of_cpu = small.experts.settings()["block"]
    for block in (2, 32, 64):
        other = copy.deepcopy(small)
        other.experts = QuantizedExperts(make_frozen_layer("gated").experts, 4, GROUP, block)
        assert other.experts.settings() == {"bits": 4, "group": GROUP, "block": block}
        assert all(unpack_experts(other.experts, n).equal(weight) for n, weight in zip("132", wanted, strict=True))
        torch.testing.assert_close(other(x)[0], small(x)[0], rtol=0, atol=0.01)
        again = quantize_layer(make_frozen_layer("gated"), 4)
        for buffer in again.experts.buffers():
            buffer.zero_()
        again.load_state_dict(other.state_dict())
        other.experts.repack()
        for each in (again, other):
            assert each.experts.settings()["block"] == of_cpu
            assert all(unpack_experts(each.experts, n).equal(weight) for n, weight in zip("132", wanted, strict=True))


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_torchs_operators_are_checked(monkeypatch, bits):
    """What is absent or computes something else is not called."""
    assert int8.has_packed_row_operators()
    x, wrong = torch.randn(1, 9, DIM), lambda *_: torch._no_such_operator  # type: ignore[attr-defined]
    small = quantize_layer(make_frozen_layer("gated"), bits).eval()
    wanted = round_layer(make_frozen_layer("gated"), bits).eval()(x)[0]
    sums, whole, mm, to_pack = int8.sum_packed_rows, int8.unpack_rows, int4.multiply_int4, int4.pack_int4
    for form, name, other in (
        (int8, "sum_packed_rows", lambda *given: sums(*given) * 1.02),
        (int8, "unpack_rows", lambda packed: whole(packed) + 0.01),
        (int8, "sum_packed_rows", wrong),
        (int8, "unpack_rows", wrong),
        (int4, "multiply_int4", lambda *given: mm(*given) * 1.05),
        (int4, "multiply_int4", wrong),
        (int4, "pack_int4", lambda levels: to_pack(levels).flip(0)),
        (int4, "pack_int4", wrong),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(form, name, other)
            if form is int8:
                assert not int8.has_packed_row_operators.__wrapped__()
            else:
                assert int4.find_cpu_block.__wrapped__() == int4.PORTABLE_BLOCK
    monkeypatch.setattr(int8, "has_packed_row_operators", lambda: False)
    monkeypatch.setattr(int4, "find_cpu_block", lambda: int4.PORTABLE_BLOCK)
    for form, name in ((int8, "sum_packed_rows"), (int8, "unpack_rows"), (int4, "multiply_int4")):
        monkeypatch.setattr(form, name, wrong)
    for each in (small, quantize_layer(make_frozen_layer("gated"), bits).eval()):
        torch.testing.assert_close(each(x)[0], wanted)


def test_split_product_uses_more_threads(monkeypatch):
    packed, x, expert = quantize.pack_stack(torch.randn(3, 6, 5))["packed"], torch.randn(2, 6), torch.tensor([2, 0])
    wanted = torch.stack([row @ int8.unpack_matrix(packed[e]) for row, e in zip(x, expert.tolist(), strict=True)])
    for threads in (1, 3, 4, 7, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.testing.assert_close(int8.multiply_rows(x, packed, expert), wanted)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.slow
def test_compiled(bits):
    small, x = quantize_layer(make_frozen_layer("gated"), bits), torch.randn(2, 9, DIM)
    torch._dynamo.reset()
    for found, wanted in zip(
        run_layer(torch.compile(small, fullgraph=True, backend="aot_eager"), x), run_layer(small, x), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    counter, small = torch._dynamo.testing.CompileCounter(), small.eval()
    lengths = torch.compile(small.experts.forward, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in (9, 3, 30):  # few tokens are no case of their own in a graph
            assignments = assign_experts(torch.arange(2 * tokens).view(tokens, 2) % 6, torch.ones(tokens, 2), 6)
            lengths(torch.randn(tokens, DIM), assignments)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_import_is_lazy():
    """Nor does a call under fake tensors, which have no numbers."""
    code = """
import torch
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    from mixture_of_experts import MoE
    from mixture_of_experts import quantize
    moe = MoE(8, 4)
    moe.requires_grad_(False)
assert quantize.int8.has_packed_row_operators.cache_info().currsize == 0
assert quantize.int4.find_cpu_block.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
