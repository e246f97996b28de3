"""A few rows in inference are computed without a permutation: what comes out is that of the permutation."""

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.layer_variants import DIM, NUM_EXPERTS, ROUTERS, run_layer
from torch import Tensor, nn

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, Top2Gating, TopKGating, ops
from mixture_of_experts.ops import few_tokens
from mixture_of_experts.ops.cpu import decode
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.support import private_torch

ROWS = {
    "compute_row_by_row": 0,
    "compute_expert_by_expert": 1 << 60,
}  # least numbers of a weight that each is taken from
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_few_rows(layer, x, mask=None, few=True, **tolerance):
    """Compare the layer in inference, which `few` says goes the way of decoding, with itself with gradients; return its
    outputs. Rows are computed by themselves, and by expert."""
    planned = run_layer(layer, x, mask)
    for name, least in ROWS.items():
        taken = []
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(decode, "MIN_ROW_SUM_NUMEL", least)
            patch.setattr(decode, "ROW_SUM_DTYPES", ALL_DTYPES)
            patch.setattr(decode, "MAX_ROW_SUM_TOKENS", decode.MAX_DECODE_ROWS)
            for each in ROWS:
                implementation = getattr(decode, each)

                def record_call(call, *products, each=each, implementation=implementation, taken=taken):
                    taken.append((each, call))
                    return implementation(call, *products)

                patch.setattr(decode, each, record_call)
            out = run_layer(layer, x, mask)
        assert len(taken) == few
        for each, call in taken:
            assert each == (name if len(call.x) and call.assignments.kept.all() else "compute_expert_by_expert")
        torch.testing.assert_close(out, planned, **tolerance)
    return planned


def make_layer(name: str, experts: type[Experts], dtype: torch.dtype) -> nn.Module:
    """A layer with a router by name in eval; the biases of some experts are not 0."""
    if name == "two levels":
        layer = HeirarchicalMoE(DIM, (2, 4), experts=experts(DIM, (2, 4), 16), second_policy_eval="all")
    else:
        layer = MoE(DIM, gate=ROUTERS[name](), experts=experts(DIM, NUM_EXPERTS, 16, bias=name == "TopK"))
    for bias in (layer.experts.b1, layer.experts.b2):
        if bias is not None:
            nn.init.normal_(bias)
    return layer.to(dtype).eval()


def make_calls(shapes: list[tuple[int, int]], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tokens of these shapes, all real and some masked."""
    for shape in shapes:
        x = torch.randn(*shape, DIM, dtype=dtype)
        yield x, None
        yield x, torch.arange(x.shape[0] * x.shape[1]).view(shape) % 3 != 1


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, *(pytest.param(low, marks=pytest.mark.slow) for low in (torch.float32, torch.bfloat16))],
    ids=str,
)
@pytest.mark.parametrize("experts", [Experts, GatedExperts])
@pytest.mark.parametrize("name", [*ROUTERS, "two levels"])
def test_few_rows(experts, name, dtype):
    """With every router, masked and not, down to no token at all."""
    layer, shapes = make_layer(name, experts, dtype), [(1, 1), (2, 1), (1, 5), (3, 4), (0, 1), (1, 0)]
    for x, mask in make_calls(shapes[:2] if name == "two levels" else shapes, dtype):  # whose tokens have four choices
        check_few_rows(layer, x, mask, few=name != "ExpertChoice")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_of_a_row_depends_on_its_dtype(monkeypatch, dtype):
    """Not on the CPU, so that machines compute the same bits."""
    layer = MoE(256, gate=TopKGating(256, 4), experts=Experts(256, 4, 256)).to(dtype).eval()
    x, taken = torch.randn(1, 1, 256, dtype=dtype), []
    expected = run_layer(layer, x)
    for name in ROWS:
        implementation = getattr(decode, name)
        monkeypatch.setattr(
            decode,
            name,
            lambda *call, name=name, implementation=implementation: taken.append(name) or implementation(*call),
        )
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        with torch.no_grad():
            torch.testing.assert_close(run_layer(layer, x), expected)
    assert taken == ["compute_row_by_row" if dtype == torch.bfloat16 else "compute_expert_by_expert"] * 2


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_few_rows_are_summed_in_float32(shape):
    """Whatever the experts' dtype is, under autocast, and where a router of one's own has weights of low precision."""

    class Coarse(TopKGating):
        def forward(self, *args, **kwargs):
            routing = super().forward(*args, **kwargs)
            return replace(routing, weight=routing.weight.bfloat16())

    x = torch.randn(*shape, DIM)
    exact = dict(rtol=1e-6, atol=1e-6)
    layer = MoE(DIM, gate=TopKGating(DIM, NUM_EXPERTS), experts=Experts(DIM, NUM_EXPERTS, 16)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        check_few_rows(layer, x, **exact)
    layer = MoE(DIM, gate=Coarse(DIM, NUM_EXPERTS), experts=Experts(DIM, NUM_EXPERTS, 16)).eval()
    check_few_rows(layer, x, **exact)


@pytest.mark.parametrize("k", [1, 2])
def test_autocast_does_not_change_the_precision_of_a_row(k):
    """On a CPU without float16 products, a token is computed in float32 even under autocast to float16."""
    moe = MoE(16, gate=TopKGating(16, 4, k, normalize=True), experts=GatedExperts(16, 4)).eval()
    x = torch.randn(1, 1, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        got = moe(x)[0]
    want = copy.deepcopy(moe).double()(x.double())[0].float()
    assert torch.allclose(got, want, atol=1e-2 if private_torch.has_native_matmul(torch.float16) else 1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_few_rows_skip_dropped_choices(shape):
    """By `kept`, and to the last NaN: an expert without a row is not touched."""

    class Half(TopKGating):
        def forward(self, *args, **kwargs):
            routing = super().forward(*args, **kwargs)
            return replace(routing, kept=routing.kept & (routing.expert % 2 == 0))

    layer = MoE(DIM, gate=Half(DIM, NUM_EXPERTS), experts=Experts(DIM, NUM_EXPERTS, 16)).eval()
    x = torch.randn(*shape, DIM)
    check_few_rows(layer, x)
    with torch.no_grad():
        layer.experts.w1[1::2] = torch.nan
    assert check_few_rows(layer, x)[0].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("t", "k", "h", "o"), [(1, 1, 6, 5), (1, 2, 9, 8), (3, 2, 4, 6), (2, 3, 12, 3)])
def test_rows_are_shared_among_threads(t, k, h, o, threads, monkeypatch):
    """A weight is cut into parts if it can be, and weights in strides of their own are no list of rows."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(decode, "MIN_ROW_SUM_NUMEL", 0)
    monkeypatch.setattr(decode, "ROW_SUM_DTYPES", ALL_DTYPES)
    taken, implementation = [], decode.compute_row_by_row
    monkeypatch.setattr(decode, "compute_row_by_row", lambda *call: taken.append(call) or implementation(*call))
    expert, weight, x = torch.randint(4, (t, k)), torch.rand(t, k), torch.randn(t, 7)
    for strides in (False, True):
        w1, w3, w2 = (torch.randn(4, *size) for size in ((7, h), (7, h), (h, o)))
        if strides:
            w1, w3, w2 = (w.mT.contiguous().mT for w in (w1, w3, w2))
        call = x, expert, weight, w1, w2, w3
        with torch.no_grad():
            found = ops.moe_ffn(*call, activation=nn.SiLU())
        with ops.use("plain"):
            torch.testing.assert_close(found, ops.moe_ffn(*call, activation=nn.SiLU()))
        assert len(taken) == 1


@pytest.mark.parametrize("copied", [True, False], ids=["copied weights", "all experts"])
@pytest.mark.parametrize("name", [*ROUTERS, "two levels"])
def test_few_tokens_without_a_plan(name, copied, monkeypatch):
    """As GPUs decode by torch's operators: what the definition computes, and an expert without a row is not touched."""
    monkeypatch.setattr(few_tokens, "COPY_COST", 0 if copied else 1 << 20)
    taken, implementation = [], few_tokens.run
    monkeypatch.setattr(few_tokens, "run", lambda call: taken.append(call) or implementation(call))
    layer = make_layer(name, GatedExperts, torch.float64)
    for x, mask in make_calls([(1, 1), (64, 1), (1, 5), (3, 4), (0, 1), (1, 0), (1, 65)], torch.float64):
        taken.clear()
        with torch.no_grad(), ops.use("batched"):
            found = run_layer(layer, x, mask)
        assert len(taken) == (name != "ExpertChoice" and x.shape[0] * x.shape[1] <= few_tokens.MAX_INFERENCE_TOKENS)
        with torch.no_grad(), ops.use("plain"):
            torch.testing.assert_close(found, run_layer(layer, x, mask))


@pytest.mark.parametrize("per_copy", [0, 1 << 20])
def test_few_tokens_skip_unchosen_experts(per_copy, monkeypatch):
    """To the last NaN; a token may have an expert twice."""
    monkeypatch.setattr(few_tokens, "COPY_COST", per_copy)
    w1, w2, x = torch.randn(4, 8, 8), torch.randn(4, 8, 8), torch.randn(3, 8)
    w1[2:] = torch.nan
    expert, weight = torch.tensor([[0, 1], [1, 1], [4, 0]]), torch.rand(3, 2)
    with torch.no_grad(), ops.use("batched"):
        found = ops.moe_ffn(x, expert, weight, w1, w2, activation=nn.SiLU())
    with ops.use("plain"):
        torch.testing.assert_close(found, ops.moe_ffn(x, expert, weight, w1, w2, activation=nn.SiLU()))
    assert found.isfinite().all()


@pytest.mark.parametrize("experts", [Experts, GatedExperts])
@pytest.mark.parametrize("mapped", ["gate", "experts", "all", "inputs"])
def test_few_rows_of_an_ensemble(experts, mapped):
    """Numbers cannot be read under vmap, whatever is mapped: there the permutation serves few rows too."""
    layers = [MoE(DIM, NUM_EXPERTS, experts=experts(DIM, NUM_EXPERTS, 16), second_policy_eval="all") for _ in range(3)]
    stacked, _ = torch.func.stack_module_state([layer.eval() for layer in layers])
    own = layers[0].state_dict()
    x = torch.randn(3, 1, 2, DIM) if mapped == "inputs" else torch.randn(1, 2, DIM)
    in_dims = {name: 0 if mapped == "all" or name.startswith(mapped) else None for name in own}
    state = {name: stacked[name] if axis == 0 else own[name] for name, axis in in_dims.items()}
    axes = (in_dims, 0 if mapped == "inputs" else None)
    with torch.no_grad():
        one = lambda state, x: torch.func.functional_call(layers[0], state, (x,))[0]  # noqa: E731
        out = torch.vmap(one, axes)(state, x)
        for index in range(3):
            state_of = {name: value[index] if in_dims[name] == 0 else value for name, value in state.items()}
            torch.testing.assert_close(out[index], one(state_of, x[index] if mapped == "inputs" else x))


# ---- what a layer says of itself ----


def decoding_warnings(moe: MoE, calls: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(calls):
            moe(torch.randn(3, 1, 8))
    return [str(warning.message) for warning in caught]


def test_batch_dependent_decoding_warns_once():
    moe = MoE(8, 4).eval()
    (message,) = decoding_warnings(moe, calls=3)
    assert "With capacity_factor_eval=2.0 and second_policy_eval='random'" in message
    remedy = message.rpartition("set ")[2]
    assert remedy == "gate.capacity_factor_eval = None, gate.second_policy_eval = 'all'"
    moe.gate.capacity_factor_eval, moe.gate.second_policy_eval = None, "all"
    assert decoding_warnings(moe) == []


@pytest.mark.parametrize(
    "gate",
    [
        TopKGating(8, 4, capacity_factor_train=1.0),
        Top2Gating(8, 4, capacity_factor_eval=None, second_policy_eval="threshold"),
    ],
)
def test_batch_independent_decoding_does_not_warn(gate):
    assert decoding_warnings(MoE(8, gate=gate).eval()) == []


def test_sequences_and_training_do_not_warn():
    moe = MoE(8, 4)
    assert decoding_warnings(moe) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe.eval()(torch.randn(1, 2, 8))
        HeirarchicalMoE(8, (2, 2), capacity_factor_eval=0.1, min_expert_capacity=1).eval()(torch.randn(1, 4, 8))


def stride_rows(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def stride_features(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def make_feature_token(x: Tensor) -> Tensor:
    """As `features[:, :, -n:].transpose(1, 2)` of a convolution."""
    return torch.cat([torch.zeros_like(x.mT), x.mT], dim=-1)[..., x.shape[1] :].transpose(1, 2)


@pytest.mark.parametrize("strided", [stride_rows, stride_features, make_feature_token])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dim", [1, 64])
def test_strides_of_the_inputs_change_nothing(dim, k, strided):
    """Whichever operators compute: kept weights and those in 8 and 4 bits, few tokens in eval and many."""
    for make, training in itertools.product((Experts, GatedExperts), (True, False)):
        torch.manual_seed(0)
        kept = MoE(dim, gate=TopKGating(dim, 4, k), experts=make(dim, 4, 1024)).train(training)
        kept.experts.requires_grad_(False)
        for bits in (16, 8, 4) if dim == 64 else (16, 8):
            layer = copy.deepcopy(kept) if bits == 16 else quantize_experts(copy.deepcopy(kept), bits)
            for length, dtype in itertools.product((1, 2, 3, 9), (torch.float32, torch.bfloat16)):
                x = torch.randn(1, length, dim).to(dtype)
                with torch.set_grad_enabled(training):
                    assert torch.equal(layer.to(dtype)(strided(x))[0], layer(x)[0])
