"""What a model has and what a token uses of it: by hand, by published figures, and by counting operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    ReLUGating,
    RoutedExperts,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.gating import RouterLogits
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.summary import Cost, summary
from mixture_of_experts.unstack import unstack
from mixture_of_experts.wrappers import LatentExperts, NormedExperts, ZeroComputationExperts

D, E, H, K = 16, 8, 24, 3
ROUTER = D * E
PLAIN, GATED = 2 * D * H, 3 * D * H


class CustomExperts(RoutedExperts):
    def __init__(self):
        super().__init__()
        self.num_experts, self.dim = E, D
        self.weight, self.bias = nn.Parameter(torch.zeros(E, D, D)), nn.Parameter(torch.zeros(E, D))

    def compute(self, rows, counts):
        return rows


def make_layer(gate: Callable[..., nn.Module] = TopKGating, **more) -> MoE:
    return MoE(D, gate=gate(D, E, K), **more or {"hidden_dim": H})


def make_latent() -> MoE:
    """Experts in a space of 4, within two matrices that every token passes."""
    implementations = {"before": nn.Linear(D, 4, bias=False), "after": nn.Linear(4, D, bias=False)}
    return make_layer(experts=LatentExperts(Experts(4, E, H), **implementations))


def make_zero_computation() -> MoE:
    """Experts with a norm that they share, beside two that return the token."""
    normed = NormedExperts(Experts(D, E - 2, H), nn.LayerNorm(D, bias=False))
    return make_layer(experts=ZeroComputationExperts(normed, num_identity=2))


def make_second_policy(policy: str) -> MoE:
    return MoE(D, E, H, second_policy_train=policy, second_policy_eval=policy)


def expected_cost(every: int, routed: int, k: float, matrices: int | None = None, number: int = E) -> Cost:
    """Of weights that every token is multiplied by, and of those of one expert; biases count as parameters alone."""
    flops = 2 * (every + k * (routed if matrices is None else matrices))
    return Cost(every + number * routed, round(every + k * routed), round(flops))


CASES = {
    "plain": (make_layer, expected_cost(ROUTER, PLAIN, K)),
    "gated": (lambda: make_layer(experts=GatedExperts(D, E, H)), expected_cost(ROUTER, GATED, K)),
    "biases": (lambda: make_layer(experts=Experts(D, E, H, bias=True)), expected_cost(ROUTER, PLAIN + H + D, K, PLAIN)),
    "latent": (make_latent, expected_cost(ROUTER + 2 * 4 * D, 2 * 4 * H, K)),
    "beside identity": (
        make_zero_computation,
        Cost(ROUTER + D + 6 * PLAIN, ROUTER + D + K * 6 * PLAIN // E, 2 * (ROUTER + K * 6 * PLAIN // E)),
    ),
    "router of its own": (
        lambda: make_layer(partial(TopKGating, logits=RouterLogits(D, E))),
        expected_cost(ROUTER, PLAIN, K),
    ),
    "default": (lambda: MoE(D, E, hidden_dim=H), expected_cost(ROUTER, PLAIN, 2)._replace(at_most=True)),
    "all seconds": (lambda: make_second_policy("all"), expected_cost(ROUTER, PLAIN, 2)),
    "no seconds": (lambda: make_second_policy("none"), expected_cost(ROUTER, PLAIN, 1)),
    "top p": (lambda: make_layer(TopPGating), expected_cost(ROUTER, PLAIN, K)._replace(at_most=True)),
    "ReLU": (
        lambda: MoE(D, gate=ReLUGating(D, E, E, mean_choices=1.5), hidden_dim=H),
        expected_cost(ROUTER, PLAIN, 1.5),
    ),
    "noisy": (lambda: make_layer(NoisyTopKGating), expected_cost(2 * ROUTER, PLAIN, K)),
    "expert choice": (
        lambda: MoE(D, gate=ExpertChoiceGating(D, E, capacity_factor=1.5), hidden_dim=H),
        expected_cost(ROUTER, PLAIN, 1.5),
    ),
    "shared": (
        lambda: make_layer(hidden_dim=H, shared_expert=nn.Linear(D, D, bias=False)),
        expected_cost(ROUTER + D * D, PLAIN, K),
    ),
    "list": (
        lambda: make_layer(experts=[nn.Linear(D, D) for _ in range(E)]),
        expected_cost(ROUTER, D * D + D, K, D * D),
    ),
    "one's own": (lambda: make_layer(experts=CustomExperts()), expected_cost(ROUTER, D * D + D, K, D * D)),
    "unstacked": (lambda: unstack(make_layer()), expected_cost(ROUTER, PLAIN, K)),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_by_hand(name):
    make, expected = CASES[name]
    assert summary(make()).model == expected
    assert summary(nn.Sequential(make())).layers == {"0": expected}


@pytest.mark.parametrize("k", [(2, 2), (1, 3), (2, 1), (2, 4)])
def test_two_levels(k):
    """As many experts compute a token as are counted: its first choice makes k at level two, its others one each."""
    (outer, inner), expert = (D * 2, D * 4), PLAIN
    gates = dict(gate_outer=TopKGating(D, 2, k[0]), gate_inner=TopKGating(D, 4, k[1], outer_expert_dims=2))
    moe, x = HeirarchicalMoE(D, (2, 4), H, **gates), torch.randn(3, 5, D)
    rows = []
    moe.experts.register_forward_pre_hook(lambda module, given: rows.append(given[1].kept.sum()))
    moe(x)
    served = k[1] + k[0] - 1
    assert rows[0] == 15 * served
    active = outer + k[0] * inner + served * expert
    assert summary(moe).model == Cost(outer + 2 * inner + 8 * expert, active, 2 * active)


def test_two_levels_of_policies():
    """A random second choice at level one makes the counts of two levels the most of a token."""
    moe = HeirarchicalMoE(D, (2, 4), H)
    active = D * 2 + 2 * D * 4 + 3 * PLAIN
    assert summary(moe).model == Cost(D * 2 + 2 * D * 4 + 8 * PLAIN, active, 2 * active, at_most=True)
    assert f"at most {active:,}" in str(summary(moe))


def test_layers_that_share_their_experts():
    """Each has its own number of choices, and both compute; the experts count once as parameters."""
    shared = Experts(D, E, H)
    model = nn.ModuleList(MoE(D, gate=TopKGating(D, E, k), experts=shared) for k in (4, 1))
    found = summary(model)
    assert found.layers == {"0": expected_cost(ROUTER, PLAIN, 4), "1": expected_cost(ROUTER, PLAIN, 1)}
    assert found.model == expected_cost(2 * ROUTER, PLAIN, 4)._replace(flops=2 * (2 * ROUTER + 5 * PLAIN))


def test_a_dense_network_as_a_shared_expert_and_one_more():
    """Two parts of it compute what it did; the router is all that is new."""
    transformers = pytest.importorskip("transformers")
    from mixture_of_experts.huggingface import upcycle

    sizes = dict(vocab_size=50, hidden_size=D, intermediate_size=H, num_hidden_layers=1, num_attention_heads=4)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    dense = summary(model).model
    upcycle(model, num_experts=1, k=1, shared_expert=H // 3)
    assert summary(model).model == Cost(dense.parameters + D, dense.active + D, dense.flops + 2 * D)


def test_mixtral_8x7b():
    """Mistral 7B, upcycled, has what its authors published of Mixtral 8x7B: 46.7B parameters, 12.9B for a token."""
    transformers = pytest.importorskip("transformers")
    from mixture_of_experts.huggingface import upcycle

    config = transformers.MistralConfig(vocab_size=32000)  # the sizes of Mistral 7B
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(config)
    dense = summary(model)
    assert dense.parameters == dense.active == 7_241_732_096
    assert not dense.layers
    upcycle(model, num_experts=8, k=2)
    found = summary(model)
    with torch.device("meta"):
        theirs = summary(transformers.MixtralForCausalLM(transformers.MixtralConfig()))  # those of Mixtral 8x7B
    assert theirs.model == found.model
    assert list(theirs.layers) == [f"model.layers.{i}.mlp" for i in range(32)]
    assert theirs.layers["model.layers.0.mlp"] == next(iter(found.layers.values()))
    stands_for = sum(b.numel() for b in model.buffers() if b.numel() == 1)
    assert (found.parameters, found.active) == (46_702_792_704, 12_879_925_248)
    assert stands_for == 32
    assert len(found.layers) == 32
    embedding, norms = 32000 * 4096, 65 * 4096
    assert found.flops == 2 * (found.active - embedding - norms)
    assert "46,702,792,704" in str(found)


def test_operations_are_those_that_are_counted():
    """torch counts as many in layers that it can follow; ours are the same in every mode."""
    model, x = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)), torch.randn(3, 10, D)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 30 * summary(model).flops
    moe = make_layer()
    assert summary(moe.eval()) == summary(moe.train())


def test_gate_without_declared_inputs():
    class Gate(nn.Module):
        num_experts = E

    moe = MoE(D, E, hidden_dim=H)
    moe._modules["gate"] = Gate()
    with pytest.raises(ValueError, match="the Gate of the layer does not specify how many"):
        summary(moe)


def test_the_table():
    text = str(summary(nn.Sequential(MoE(D, E, hidden_dim=H), nn.Linear(D, D))))
    assert [line.split()[0] for line in text.splitlines()] == ["parameters", "0", "total"]
    assert "at most" in text
    assert f"{D * D + D + ROUTER + E * PLAIN:,}" in text


def test_unknown_sparse_blocks_are_reported():
    transformers = pytest.importorskip("transformers")
    config = transformers.NllbMoeConfig(
        vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_sparse_step=1, num_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.NllbMoeModel(config)
    with pytest.raises(TypeError, match=r"'encoder.layers.0.ffn' \(NllbMoeSparseMLP\)"):
        summary(model)


def test_parametrized_weights_are_multiplied():
    """The stored parameter is another module's; what it makes is multiplied as before."""
    moe = MoE(8, gate=TopKGating(8, 4), experts=GatedExperts(8, 4, 16))
    plain = summary(moe)
    for module, name in ((moe.experts, "w1"), (moe.experts, "w2"), (moe.gate, "w_gating")):
        parametrize.register_parametrization(module, name, nn.Identity())
    assert summary(moe) == plain


def test_quantized_experts_cost_as_much_as_before():
    """Layers that share experts count them once, and biases are counted."""
    experts = GatedExperts(32, 8, 64, bias=True)
    model = nn.ModuleList(MoE(32, gate=TopKGating(32, 8, k=k), experts=experts) for k in (2, 3))
    before = summary(model).model
    quantize_experts(model.requires_grad_(False), 8)
    assert summary(model).model == before
