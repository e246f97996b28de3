"""Sparse blocks of transformers and layers of ours compute the same on each other's weights, which come back bit for
bit."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.transformers_blocks import (
    BLOCKS,
    EXCLUDED_BLOCKS,
    can_convert,
    can_convert_back,
    compare_block,
    has_backend,
    is_tracked,
    make_block,
)
from torch import Tensor, nn

from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.huggingface import from_transformers, to_transformers
from mixture_of_experts.huggingface.blocks.block_classes import RECIPES_BY_BLOCK

SLOW_EXPERTS = {"SwitchTransformersSparseMLP"}  # a list of networks
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, decoder_sparse_step=1, head_dim=8),
    "Olmoe": dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=True),
    "DeepseekV3": dict(
        n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        n_shared_experts=2, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    ),
    "GptOss": dict(num_local_experts=8, num_experts_per_tok=2, swiglu_limit=0.7, head_dim=8),
}  # fmt: skip


def build_model(name: str, dim: int = 32, hidden: int = 24, **more: Any) -> nn.Module:
    """A small model of weights as large as trained ones, with biases that matter."""
    settings: Mapping[str, Any] = dict(
        hidden_size=dim, intermediate_size=hidden, moe_intermediate_size=hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=64, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**settings, **MODELS[name], **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if path.endswith("e_score_correction_bias"):
            nn.init.normal_(tensor, std=0.2)
        elif tensor.requires_grad:
            nn.init.normal_(tensor, std=dim**-0.5) if tensor.ndim > 1 else tensor.data.add_(
                0.2 * torch.randn_like(tensor)
            )
    return model.eval()


def get_block(model: nn.Module) -> nn.Module:
    return model.model.layers[1].mlp


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, square):
    """The layer has weights of its own; back go those that were trained there."""
    block, x = get_block(build_model(name, hidden=32 if square else 24)), torch.randn(2, 9, 32)
    moe = from_transformers(block)
    torch.testing.assert_close(run_block(moe, x), run_block(block, x), atol=1e-5, rtol=1e-5)
    assert all(p.data_ptr() not in {q.data_ptr() for q in block.parameters()} for p in moe.parameters())
    for parameter in moe.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.testing.assert_close(run_block(to_transformers(moe, block), x), run_block(moe, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_dtypes_and_modes_stay(name):
    block = get_block(build_model(name)).to(torch.bfloat16).train()
    moe = from_transformers(block)
    assert moe.training
    assert {p.dtype for p in moe.parameters()} == {p.dtype for p in block.parameters()}
    state = copy.deepcopy(block.state_dict())
    to_transformers(moe, block)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - EXCLUDED_BLOCKS.keys()))
def test_every_block_round_trips(name):
    """Outputs and all gradients in eval and training; bit for bit, buffers too, into a block of other weights."""
    can_convert(name)
    can_convert_back(name)


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - EXCLUDED_BLOCKS.keys()))
def test_every_block_is_tracked(name):
    is_tracked(name)


@pytest.mark.parametrize("name", sorted(RECIPES_BY_BLOCK))
def test_backend_supports_every_experts_interface(name):
    experts = make_block(name)
    if name in {"DbrxFFN", "JetMoeMoE", "Llama4TextMoe", "LongcatFlashMoE", "Step3p7SparseMoeBlock"} | SLOW_EXPERTS:
        assert not hasattr(getattr(experts, "experts", None), "has_gate")
    else:
        has_backend(name)


def test_the_table_names_the_blocks_there_are():
    """Those that a later version adds are found, and those that it takes away."""
    assert set(RECIPES_BY_BLOCK) | set(EXCLUDED_BLOCKS) == set(BLOCKS)
    assert not set(RECIPES_BY_BLOCK) & set(EXCLUDED_BLOCKS)


def test_the_page_shows_the_exceptions():
    """`python tests/support/transformers_blocks.py` prints what belongs there."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "published_mixtures.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (\w+ \| \w+ \| \w+ \| no) \|", page, re.MULTILINE))
    assert rows == {name: "no | no | no | no" if name in EXCLUDED_BLOCKS else "yes | yes | yes | no" for name in rows}
    assert set(EXCLUDED_BLOCKS) < set(rows) < set(BLOCKS)
    known = len(BLOCKS) - len(EXCLUDED_BLOCKS)
    assert f"| of {len(BLOCKS)} | {known} | {known} | {known} | {len(BLOCKS) - len(rows)} |" in page


def test_excluded_block_still_fails():
    """NLLB's second choice is always expert 0, its first always expert 1."""
    torch.manual_seed(0)
    block, x = make_block("NllbMoeSparseMLP").eval(), torch.randn(1, 7, 16)
    flat = x.flatten(0, 1)
    first, weight, _ = block.router(flat)
    zero, one = (block.experts[f"expert_{i}"](flat) for i in (0, 1))
    firsts = (weight * first).sum(-1, keepdim=True)
    expected = firsts * one + (weight.sum(-1, keepdim=True) - firsts) * zero
    torch.testing.assert_close(block(x).view_as(flat), expected)
    assert first.argmax(-1).unique().numel() > 1


@pytest.mark.parametrize(
    "name", ["AXK1MoE", "GptOssMLP", "JetMoeMoE", "Llama4TextMoe", "LongcatFlashMoE", "MuseSparkMoE"]
)
def test_padding_of_a_block_costs_nothing_and_is_zero(name):
    """Wrappers around experts too: biases, norms and identities are of real tokens alone."""
    torch.manual_seed(0)
    moe, x = from_transformers(make_block(name)).eval(), torch.randn(2, 7, 16)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    out = moe(x, mask=mask)[0]
    torch.testing.assert_close(out[mask], moe(x)[0][mask], atol=1e-5, rtol=1e-5)
    assert not out[~mask].any()


def test_layers_that_choose_by_token_ids():
    """DeepSeek-V4's first ones: `moe(x, token_ids=ids)`, and back with the table of ids."""
    torch.manual_seed(0)
    block, other = (make_block("DeepseekV4SparseMoeBlock", 2) for _ in range(2))
    for one in (block, other):
        one.gate.tid2eid.copy_(torch.stack([torch.randperm(8)[:3] for _ in range(len(one.gate.tid2eid))]))
    moe, ids = from_transformers(block), torch.randint(len(block.gate.tid2eid), (2, 7))
    results = []
    for call in (lambda x: block(x, input_ids=ids), lambda x: moe(x, token_ids=ids)[0]):
        x = torch.linspace(-1, 1, 224).view(2, 7, 16).requires_grad_()
        out = call(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    to_transformers(moe, other)
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in other.state_dict().items())
    with pytest.raises(ValueError, match="the gate is HashGating, but the block has TopKGating"):
        to_transformers(moe, make_block("DeepseekV4SparseMoeBlock"))


def test_rejects_unknown_choice_or_wrapper():
    moe = from_transformers(make_block("Kolibri1SparseMoeBlock"))
    moe.gate.select = "score"
    with pytest.raises(ValueError, match="the gate has select 'score', but the block has 'logits'"):
        to_transformers(moe, make_block("Kolibri1SparseMoeBlock"))
    moe = from_transformers(make_block("Llama4TextMoe"))
    moe.experts = moe.experts.experts
    with pytest.raises(ValueError, match="experts are GatedExperts, but the block has InputWeightedExperts wrap"):
        to_transformers(moe, make_block("Llama4TextMoe"))


def test_rejects_non_layers_and_meta_weights():
    block, model = make_block("MixtralSparseMoeBlock"), build_model("Mixtral")
    before = {name: value.clone() for name, value in block.state_dict().items()}
    moe = from_transformers(block)
    for other in (nn.Linear(2, 2), model, from_transformers(model).model.layers[0].mlp):
        with pytest.raises(TypeError, match=r"expected `moe` to be an MoE, .*; pass its `moe` attribute"):
            to_transformers(other, block)
    for wrong in (lambda: to_transformers(None), lambda: to_transformers(moe, 3), lambda: from_transformers(None)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"(moe|block) must be a model \(an nn.Module\), got"):
            wrong()
    with pytest.raises(ValueError, match="block has weights on the meta device; load"):
        to_transformers(moe, make_block("MixtralSparseMoeBlock").to("meta"))
    with pytest.raises(ValueError, match="moe has weights on the meta device; load"):
        to_transformers(moe.to("meta"), block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_mean_with_a_shared_expert_needs_one():
    """Cohere's blocks halve what experts return only beside a shared expert."""
    block, x = make_block("Cohere2MoeSparseMoeBlock"), torch.randn(2, 7, 16)
    for shared in (True, False):
        if not shared:
            block.num_shared_experts = 0
            del block.shared_experts
        block.shared_expert_combination_strategy = "average"
        torch.testing.assert_close(from_transformers(block)(x)[0], block(x), atol=1e-5, rtol=1e-5)


def test_rejects_different_layers():
    block = get_block(build_model("Mixtral"))
    before = copy.deepcopy(block.state_dict())
    moe = MoE(32, 8, gate=TopKGating(32, 8, 2, normalize=False, scale=2.0), experts=GatedExperts(32, 8, 16))
    described = r"normalize False, but the block has True; .*scale 2.0, .*w1 has shape \(8, 32, 16\)"
    with pytest.raises(ValueError, match=described):
        to_transformers(moe, block)
    with pytest.raises(ValueError, match="the activation GELU"):
        to_transformers(
            MoE(32, 8, gate=TopKGating(32, 8, 2), experts=GatedExperts(32, 8, 24, activation=nn.GELU)), block
        )
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key]), key
    block.jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"jitter_noise=0\.1"):
        from_transformers(block)
    with pytest.raises(ValueError, match=r"Linear is not a supported block; .* such as DeepseekV3MoE"):
        from_transformers(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["DeepseekV3MoE", "Dots1MoE"])
def test_weights_are_not_normalized_if_the_setting_is_none(name):
    block = make_block(name).eval()
    (block if hasattr(block, "norm_topk_prob") else block.gate).norm_topk_prob = None
    assert from_transformers(block).gate.normalize is False
    assert compare_block(block, from_transformers(block)).value < 1e-5
