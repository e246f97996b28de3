"""The way `batch_invariant`: a token's output and its gradient have the same bits alone and in any batch.

RowLayout of other sizes than those of this module are compared by `find_block_rows` itself, when they are made first.
`python -m tests.support.invariance` compares as many random layers as one likes.
"""

import pytest
import torch
from support import invariance
from support import strategies as make
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, ops, recipes
from mixture_of_experts.gating import (
    DepthAveragedGating,
    ExpertChoiceGating,
    NoisyTopKGating,
    ReLUGating,
    RouterLogits,
    SparseMixerGating,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.ops import matmul
from mixture_of_experts.ops.cpu import batch_invariant, chunked
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.support import batch_invariance, private_torch
from mixture_of_experts.verify import verify
from mixture_of_experts.wrappers import InputWeightedExperts, LatentExperts

DROPLESS = dict(capacity_factor_train=None, capacity_factor_eval=None)
FAST = ("one choice", "odd", "relu")  # sampling block sizes takes seconds for each kind of layer
SUPPORTED = {
    "qwen3": lambda: recipes.qwen3(64, 16, 32),
    "deepseek_v3": lambda: recipes.deepseek_v3(64, 16, 32),
    "gpt_oss": lambda: recipes.gpt_oss(64, 16, 48, k=2),
    "odd": lambda: MoE(36, gate=TopKGating(36, 5, score="sqrt_softplus"), experts=GatedExperts(36, 5, 20)),
    "wide": lambda: MoE(400, gate=TopKGating(400, 4, k=3), experts=GatedExperts(400, 4, 64, bias=True)),
    "one choice": lambda: MoE(256, gate=TopKGating(256, 4, k=1), experts=Experts(256, 4, 192)),
    "latent": lambda: MoE(
        48,
        gate=TopKGating(48, 8),
        experts=LatentExperts(Experts(16, 8, 32), before=nn.Linear(48, 16), after=nn.Linear(16, 48)),
    ),
    "shared": lambda: MoE(
        32, gate=TopKGating(32, 8), shared_expert=nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 32))
    ),
    "top_p": lambda: MoE(32, gate=TopPGating(32, 8, 4)),
    "relu": lambda: MoE(32, gate=ReLUGating(32, 8, 4, mean_choices=2.0)),
    "top2": lambda: MoE(32, gate=Top2Gating(32, 8, second_policy_train="all", second_policy_eval="all", **DROPLESS)),
}
DRAWS = {"noisy": lambda: NoisyTopKGating(32, 8), "sparse_mixer": lambda: SparseMixerGating(32, 8)}


def find_verdict(layer, threads=1):
    torch.set_num_threads(threads)
    found = verify(layer, properties=["invariance"]).findings["invariance"]
    if " products in " in found.detail and "depend on the batch for all" in found.detail:
        pytest.skip(found.detail)  # no product of another CPU may have equal bits
    return found.verdict


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTED]
)
def test_the_bits_of_a_token_are_the_same(name):
    """And by the fastest way they are not, unless this CPU's products have equal bits anyhow."""
    layer = SUPPORTED[name]()
    with ops.use("batch_invariant"):
        assert find_verdict(layer) == "holds"
    if invariance.asks_for_blocks(32, 32):
        assert find_verdict(layer) == "fails"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "threads"), [(torch.float64, 1), (torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 2)]
)
@pytest.mark.parametrize("name", SUPPORTED)
def test_in_other_dtypes_and_with_two_threads(name, dtype, threads):
    with ops.use("batch_invariant"):
        assert find_verdict(SUPPORTED[name]().to(dtype), threads) == "holds"


def other_bits(layer, count=40):
    """How many tokens get other bits alone than among all."""
    x = torch.randn(1, count, layer.dim, dtype=next(layer.parameters()).dtype)
    with ops.use("batch_invariant"), torch.no_grad():
        return int((torch.cat([layer(token)[0] for token in x.split(1, dim=1)], dim=1) != layer(x)[0]).any(-1).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_on_a_cpu_without_such_products(monkeypatch, dtype):
    """There experts multiply in float32, whose blocks are others than those of torch's own products of 16 bits."""
    monkeypatch.setattr(private_torch, "has_native_matmul", lambda dtype: dtype in (torch.float32, torch.float64))
    batch_invariance._sample_block_rows.cache_clear()
    layer = MoE(256, gate=TopKGating(256, 4), experts=GatedExperts(256, 4, 192)).to(dtype).eval()
    try:
        assert other_bits(layer) == 0
    finally:
        batch_invariance._sample_block_rows.cache_clear()  # another test asks with the products of this CPU


@pytest.mark.parametrize("width", [24, 64, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_bfloat16(width, bias):
    shared = nn.Linear(width, width, bias=bias)
    layer = MoE(width, gate=TopKGating(width, 4), experts=Experts(width, 4, 16), shared_expert=shared)
    assert other_bits(layer.bfloat16().eval()) == 0


@pytest.mark.slow
def test_random_layers_keep_the_bits_or_raise():
    found, lines = invariance.attack(60)
    assert not lines, "\n".join(lines)
    assert min(found["equal"], found["raised"]) >= 5


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(4))
def test_many_random_layers_keep_the_bits_or_raise(seed):
    assert not invariance.attack(400, seed=1 + seed, tokens=40 + 300 * (seed % 2))[1]


def test_the_attack_finds_rows_that_stand_in_no_blocks(monkeypatch):
    if not invariance.asks_for_blocks(64, 48):
        pytest.skip("this CPU's products have equal bits for every number of rows")
    monkeypatch.setattr(batch_invariant, "round_up_to_vectors", lambda *_: 1)
    c = invariance.Combination("top-2", "gated", "none", "float32", 1, False, 64)
    assert invariance.outcome(c)[0] == "differing"


def test_every_product_of_experts_is_one_that_was_sampled(monkeypatch):
    """By the same function, on operands of the same dtype, shape and strides, with no more rows."""
    sampled, run = set(), set()

    def noting(found):
        def multiply(x, y, out, *, accumulate=False):
            kind = (
                x.dtype,
                x.ndim,
                accumulate,
                *y.shape[-2:],
                *y.stride()[-2:],
                x.is_contiguous(),
                out.is_contiguous(),
            )
            found.add(kind)
            assert x.shape[-2] <= batch_invariance.MAX_ROWS
            matmul.matmul_into(x, y, out, accumulate=accumulate)

        return multiply

    monkeypatch.setattr(batch_invariant, "matmul_into", noting(sampled))
    monkeypatch.setattr(chunked, "matmul_into", noting(run))
    monkeypatch.setattr(
        chunked.ChunkLayout, "outer_products", lambda self, x, y, out: out
    )  # sums over tokens have no blocks
    batch_invariance._sample_block_rows.cache_clear()
    layer = MoE(24, gate=TopKGating(24, 3), experts=GatedExperts(24, 3, 40))
    x = torch.randn(2, 700, 24, requires_grad=True)
    with ops.use("batch_invariant"):
        layer(x)[0].sum().backward()
        layer(x[:1, :9])[0].sum().backward()
    assert len(run) > 3
    assert run <= sampled


def test_a_size_is_sampled_within_activation_checkpointing():
    """Checkpointing counts the tensors that a forward saves: the sampling of the first one must not be among them."""
    layer, x = SUPPORTED["latent"](), torch.randn(1, 5, 48, requires_grad=True)
    batch_invariance._sample_block_rows.cache_clear()
    with ops.use("batch_invariant"):
        checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all()


def test_a_size_is_sampled_in_inference_mode():
    batch_invariance._sample_block_rows.cache_clear()
    with ops.use("batch_invariant"), torch.inference_mode():
        SUPPORTED["shared"]().eval()(torch.randn(1, 3, 32))


@pytest.mark.parametrize("name", DRAWS)
def test_routers_that_draw_in_training_keep_the_bits_in_eval(name):
    layer = MoE(32, gate=DRAWS[name](), experts=Experts(32, 8, 16))
    with ops.use("batch_invariant"), pytest.raises(ValueError, match=r"batch_invariant.*training; call eval\(\)"):
        layer(torch.randn(1, 3, 32))
    nn.init.normal_(layer.gate.w_gating)
    assert other_bits(layer.eval()) == 0


@pytest.mark.slow
def test_threads_do_not_share_a_function_of_single_numbers():
    """A batch of so many numbers that threads would: each part would end in numbers that stand in no vector."""
    layer, x = MoE(200, gate=TopKGating(200, 8, score="sigmoid")).eval(), torch.randn(1, 300, 200)
    torch.set_num_threads(2)
    with ops.use("batch_invariant"), torch.no_grad():
        alone = torch.cat([layer(x[:, start : start + 7])[0] for start in range(0, 300, 7)], dim=1)
        assert torch.equal(alone, layer(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_plain_implementation(training):
    """Outputs, losses and all gradients in float64, of one token and of many, of which some experts get none."""
    layer = SUPPORTED["odd"]().double().train(training)
    for shape in [(1, 1), (2, 7), (0, 3), (3, 300)]:
        x = torch.randn(*shape, 36, dtype=torch.float64, requires_grad=True)
        leaves, found = {"x": x, **dict(layer.named_parameters())}, {}
        for implementation in ("batch_invariant", "plain"):
            with ops.use(implementation):
                out, loss = layer(x)
                grads = torch.autograd.grad(out.sin().sum() + loss, list(leaves.values()), allow_unused=True)
                found[implementation] = {"out": out, "loss": loss, **dict(zip(leaves, grads, strict=True))}
        for name, tensor in found["plain"].items():
            if tensor is not None:
                make.assert_same(found["batch_invariant"][name], tensor, name)


class Renamed(TopKGating):
    """A subclass that changes nothing that is computed."""

    def extra_repr(self):
        return "renamed"


class Rescored(TopKGating):
    def compute_logits(self, x, weight, bias):
        return super().compute_logits(x - x.mean(dim=1, keepdim=True), weight, bias)


class MyExperts(GatedExperts):
    def forward(self, x, assignments=None, **others):
        return super().forward(x, assignments, **others)


def shared(module):
    return lambda: MoE(32, gate=TopKGating(32, 4), shared_expert=module)


def gated_by(kind=TopKGating, **settings):
    return lambda: MoE(32, gate=kind(32, 4, **settings))


UNSUPPORTED = {
    "capacity": lambda: MoE(32, gate=Top2Gating(32, 4, second_policy_train="all")),
    "policy 'random' draws": lambda: MoE(32, num_experts=4),
    "experts choose tokens": lambda: MoE(32, gate=ExpertChoiceGating(32, 4)),
    "two levels": lambda: HeirarchicalMoE(
        32, gate_outer=TopKGating(32, 2), gate_inner=TopKGating(32, 2, outer_expert_dims=2)
    ),
    "InputWeightedExperts": lambda: MoE(32, gate=TopKGating(32, 4), experts=InputWeightedExperts(Experts(32, 4))),
    "ModuleList|ExpertList": lambda: MoE(32, gate=TopKGating(32, 4), experts=[nn.Linear(32, 32) for _ in range(4)]),
    "8-bit experts": lambda: quantize_experts(MoE(64, gate=TopKGating(64, 4)).requires_grad_(False)),
    "logits are computed by Linear; use RouterLogits": gated_by(logits=nn.Linear(32, 4)),
    "DepthAveragedGating computes its logits": gated_by(DepthAveragedGating, state_dim=8, logits=RouterLogits(8, 4)),
    "score is <.*unknown function": gated_by(score=lambda logits: logits.sigmoid()),
    "normalize is <.*unknown function": gated_by(normalize=lambda weight: weight / weight.max()),
    "jitter=0.1 draws": gated_by(jitter=0.1),
    "Rescored overrides 'compute_logits'": gated_by(Rescored),
    "MyExperts overrides 'forward'": lambda: MoE(32, gate=TopKGating(32, 4), experts=MyExperts(32, 4)),
    "dropout=0.5 draws": lambda: MoE(32, gate=TopKGating(32, 4), experts=Experts(32, 4, dropout=0.5)),
    "activation Tanh is none of": lambda: MoE(32, gate=TopKGating(32, 4), experts=Experts(32, 4, activation=nn.Tanh)),
    "layer's shared_expert .* Softmax is not known to process tokens": shared(nn.Softmax(dim=0)),
    "layer's shared_expert .* Dropout.*draws random numbers": shared(nn.Sequential(nn.Linear(32, 32), nn.Dropout())),
    "layer's experts .* Bilinear is not known to process tokens": lambda: MoE(
        32, gate=TopKGating(32, 4), experts=LatentExperts(Experts(32, 4), before=nn.Bilinear(32, 32, 32))
    ),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_rejects_batch_dependent_layers(why):
    """Before anything is computed: no module is called, and no random number drawn."""
    layer, called = UNSUPPORTED[why](), []
    for part in layer.children():
        part.register_forward_pre_hook(lambda module, args: called.append(module))
    before = torch.get_rng_state()
    with ops.use("batch_invariant"), pytest.raises(ValueError, match=rf"batch_invariant.*({why})"):
        layer(torch.zeros(1, 3, layer.dim))
    assert not called
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subclass_that_changes_nothing_is_served():
    assert other_bits(gated_by(Renamed)().eval(), count=5) == 0


def test_a_part_that_is_called_alone_is_refused():
    experts = LatentExperts(Experts(32, 4), before=nn.Bilinear(32, 32, 32))
    with (
        ops.use("batch_invariant"),
        pytest.raises(ValueError, match=r"batch_invariant.*Bilinear is not known to process tokens"),
    ):
        experts(torch.randn(4, 2, 32))


def test_the_sampling_sees_the_order_of_a_sum_through_float16():
    """Planted are products that are summed in another order where there are few rows, and rounded to float16: numbers
    that do not cancel out would nearly always round alike."""

    def planted(x, y, weight):
        x, weight = x.float(), weight.float()
        return [((x @ weight) if len(x) >= 8 else (x.flip(-1) @ weight.flip(0))).half().unsqueeze(0)]

    assert batch_invariance.find_block_rows(planted, (48, 3), torch.empty(48, 3, dtype=torch.float16)) == 8


def test_rejects_code_block_shared_by_threads():
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="width of 1001 requires blocks of 64 rows"):
        batch_invariance.find_max_rows(64, 1001)
    assert batch_invariance.find_max_rows(4, 1536) == 20


def test_cpu_without_block_support_is_reported():
    """Planted are products whose last bits depend on the number of rows, whatever it is."""

    def planted(x, y, weight):
        return [((x @ weight) * (1 + x.shape[-2] * 2.0**-20)).unsqueeze(0)]

    with pytest.raises(RuntimeError, match=r"17 x 23.*another number of threads"):
        batch_invariance.find_block_rows(planted, (17, 23), torch.randn(17, 23))


def test_methods_set_on_a_module_raise():
    layer = MoE(16, gate=TopKGating(16, 4)).eval()
    decide = layer.gate.decide
    layer.gate.decide = lambda tokens: decide(tokens)
    with ops.use("batch_invariant"), pytest.raises(ValueError, match="overrides 'decide'"):
        layer(torch.randn(1, 3, 16))
