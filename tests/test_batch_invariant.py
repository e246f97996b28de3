"""The way `batch_invariant`: a token's output and its gradient have the same bits alone and in any batch.

Products of other sizes than those of this module are compared by `size_of_block` itself, when they are made first.
"""

import pytest
import torch
from support import strategies as make
from torch import nn

from mixture_of_experts import Experts, GatedExperts, HeirarchicalMoE, MoE, ops, recipes
from mixture_of_experts.around import InputWeightedExperts, LatentExperts
from mixture_of_experts.gating import (
    ExpertChoiceGating,
    NoisyTopKGating,
    ReLUGating,
    SparseMixerGating,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.support import same_bits
from mixture_of_experts.verify import verify

DROPLESS = dict(capacity_factor_train=None, capacity_factor_eval=None)
KEEP = {
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
    "noisy": lambda: MoE(32, gate=NoisyTopKGating(32, 8)),
    "sparse_mixer": lambda: MoE(32, gate=SparseMixerGating(32, 8)),
}


def verdict(layer, threads=1):
    torch.set_num_threads(threads)
    found = verify(layer, properties=["invariance"]).findings["invariance"]
    if "products of" in found.detail and "differ for every" in found.detail:
        pytest.skip(found.detail)  # no product of another CPU may have equal bits
    return found.verdict


@pytest.mark.parametrize("name", KEEP)
def test_the_bits_of_a_token_are_the_same(name):
    """And by the fastest way they are not, unless this CPU's products have equal bits anyhow."""
    layer = KEEP[name]()
    with ops.use("batch_invariant"):
        assert verdict(layer) == "holds"
    if same_bits.size_of_block(torch.float32, torch.get_num_threads(), 32, 32) > 1:
        assert verdict(layer) == "fails"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "threads"), [(torch.float64, 1), (torch.bfloat16, 1), (torch.float32, 2)])
@pytest.mark.parametrize("name", KEEP)
def test_in_other_dtypes_and_with_two_threads(name, dtype, threads):
    with ops.use("batch_invariant"):
        assert verdict(KEEP[name]().to(dtype), threads) == "holds"


def test_threads_do_not_share_a_function_of_single_numbers():
    """A batch of so many numbers that threads would: each part would end in numbers that stand in no vector."""
    layer, x = MoE(200, gate=TopKGating(200, 8, score="sigmoid")).eval(), torch.randn(1, 300, 200)
    torch.set_num_threads(2)
    with ops.use("batch_invariant"), torch.no_grad():
        alone = torch.cat([layer(x[:, start : start + 7])[0] for start in range(0, 300, 7)], dim=1)
        assert torch.equal(alone, layer(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_the_plain_way_does(training):
    """Outputs, losses and all gradients in float64, of one token and of many, of which some experts get none."""
    layer = KEEP["odd"]().double().train(training)
    for shape in [(1, 1), (2, 7), (0, 3)]:
        x = torch.randn(*shape, 36, dtype=torch.float64, requires_grad=True)
        leaves, found = {"x": x, **dict(layer.named_parameters())}, {}
        for way in ("batch_invariant", "plain"):
            with ops.use(way):
                out, loss = layer(x)
                grads = torch.autograd.grad(out.sin().sum() + loss, list(leaves.values()), allow_unused=True)
                found[way] = {"out": out, "loss": loss, **dict(zip(leaves, grads, strict=True))}
        for name, tensor in found["plain"].items():
            if tensor is not None:
                make.assert_same(found["batch_invariant"][name], tensor, name)


REFUSED = {
    "capacity": lambda: MoE(32, num_experts=4),
    "experts choose tokens": lambda: MoE(32, gate=ExpertChoiceGating(32, 4)),
    "two levels": lambda: HeirarchicalMoE(
        32, gate_outer=TopKGating(32, 2), gate_inner=TopKGating(32, 2, outer_expert_dims=2)
    ),
    "InputWeightedExperts": lambda: MoE(32, gate=TopKGating(32, 4), experts=InputWeightedExperts(Experts(32, 4))),
    "ModuleList|ExpertList": lambda: MoE(32, gate=TopKGating(32, 4), experts=[nn.Linear(32, 32) for _ in range(4)]),
    "8 bits": lambda: quantize_experts(MoE(64, gate=TopKGating(64, 4)).requires_grad_(False)),
    "logits": lambda: MoE(32, gate=TopKGating(32, 4, logits=nn.Linear(32, 4))),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_keep_them_is_refused(why):
    layer = REFUSED[why]()
    with ops.use("batch_invariant"), pytest.raises(ValueError, match=rf"batch_invariant.*({why})"):
        layer(torch.randn(1, 3, layer.dim))


def test_a_block_that_threads_would_share_is_refused():
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="width of 1001 needs blocks of 64 rows"):
        same_bits.rows_at_once(64, 1001)
    assert same_bits.rows_at_once(4, 1536) == 20


def test_a_cpu_without_such_blocks_is_told(monkeypatch):
    """Planted are products whose last bits depend on the number of rows, whatever it is."""
    monkeypatch.setattr(torch, "mm", lambda x, weight: (x @ weight) * (1 + len(x) * 2.0**-20))
    with pytest.raises(RuntimeError, match=r"17 x 23.*another number of threads"):
        same_bits.size_of_block(torch.float32, 1, 17, 23)
