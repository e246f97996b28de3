"""Packed rows in stock models: their losses and statistics, and those of their conversion, are the padded batch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixture_of_experts import balance_experts
from mixture_of_experts.huggingface import aux_loss, from_transformers
from mixture_of_experts.stats import track_routing

from .test_stock_loss import WITH_LOSS, stock

LENGTHS = (5, 9, 2)
#: attention of transformers does not separate documents here: gpt-oss does so with Flash Attention alone, and linear
#: attention and state-space layers need kernels
NOT_SEPARATED = (
    "gpt_oss", "granitemoehybrid", "jamba", "lara_mini", "minimax", "qwen3_5_moe", "qwen3_next",
)  # fmt: skip
FAMILIES = [name for name in WITH_LOSS if name not in NOT_SEPARATED]
FAMILIES += ["deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "hy_v3", "llama4_text"]
FAST = ("mixtral", "qwen3_moe", "deepseek_v3")
families = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)


def make_batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same documents packed in a row, and padded."""
    gen = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 90, (n,), generator=gen) for n in LENGTHS]
    ids = pad_sequence(documents, batch_first=True)
    mask = pad_sequence([torch.ones(n, dtype=torch.int64) for n in LENGTHS], batch_first=True)
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    ids = torch.cat(documents).unsqueeze(0)
    packed = {"input_ids": ids, "position_ids": positions, "labels": ids.where(positions > 0, -100)}
    return packed, padded


def make_stock(name: str, **settings: Any) -> Any:
    model = stock(name, **settings).double().train(name != "phimoe")  # that one draws its choices in training
    model.set_experts_implementation("eager")  # other implementations do not support float64
    return model


def run(model: Any, batch: dict[str, Tensor], name: str) -> tuple[list[Any], dict[str, Any]]:
    """Logits of the real tokens, losses and gradients of a training forward; and the statistics of its routers."""
    asked = {"output_router_logits": True} if name in WITH_LOSS else {}
    with track_routing(model) as stats:
        out = model(**batch, use_cache=False, **asked)
    logits = out.logits[batch["attention_mask"].bool()] if "attention_mask" in batch else out.logits[0]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = [out.loss, logits, *torch.autograd.grad(out.loss, weights, allow_unused=True)]
    found += [out.aux_loss] if asked else []
    return found, {layer: stats.last(layer) for layer in stats.layers}


def assert_same_statistics(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for layer, record in found.items():
        other = wanted[layer]
        assert record.scalars() == pytest.approx(other.scalars(), abs=2e-6)
        assert record.requested.equal(other.requested)
        assert (record.tokens, record.groups) == (other.tokens, other.groups) == (sum(LENGTHS), len(LENGTHS))


@families
@pytest.mark.parametrize("converted", [False, True])
def test_losses_and_statistics_of_a_stock_model(name, converted):
    """The loss that transformers computes is over all tokens of the batch; statistics are by document."""
    model, (packed, padded) = make_stock(name), make_batches()
    if converted:
        model = from_transformers(model)
    (found, statistics), (wanted, padded_statistics) = (run(model, batch, name) for batch in (packed, padded))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)
    assert_same_statistics(statistics, padded_statistics)
    packed.pop("position_ids")
    _, statistics = run(model, packed, name)  # one document: other groups
    with pytest.raises(AssertionError):
        assert_same_statistics(statistics, padded_statistics)


def test_losses_by_document_of_a_converted_model():
    """Layers that are set to balance over groups, unlike the routers of their stock model."""
    model, (packed, padded) = from_transformers(make_stock("mixtral")), make_batches()
    results = []
    for over in ("group", "batch"):
        for layer in model.model.layers:
            layer.mlp.moe.gate.balance_over, layer.mlp.moe.loss_coef = over, 1.0
        found = []
        for batch in (packed, padded, {"input_ids": packed["input_ids"]}):
            model(**batch, use_cache=False)
            found.append(aux_loss(model))
        torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=1e-9)
        results.append(found)
    assert (results[0][0] - results[0][2]).abs() > 1e-3
    assert (results[0][0] - results[1][0]).abs() > 1e-3


@pytest.mark.parametrize("converted", [False, True])
def test_expert_bias_counts_the_same_choices(converted):
    """The counts are over all tokens of the batch, so documents do not matter to the bias."""
    biases = []
    for batch in make_batches():
        model: Any = make_stock("deepseek_v3")
        model = from_transformers(model) if converted else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with balance_experts(model, optimizer, rate=0.01) as balancing:
            model(**batch, use_cache=False).loss.backward()
            (counts,) = [updater.counts.clone() for updater in balancing.bias_updaters]
            assert counts.sum() == 2 * sum(LENGTHS)
            optimizer.step()
        biases.append((counts, find_bias(model)))
    torch.testing.assert_close(biases[0], biases[1], atol=0, rtol=0)


def find_bias(model: nn.Module) -> Tensor:
    names = ("e_score_correction_bias", "expert_bias")
    (bias,) = [value for name, value in model.named_buffers() if name.rpartition(".")[2] in names]
    return bias.clone()
