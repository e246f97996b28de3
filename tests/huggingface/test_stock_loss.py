"""Converted models train as the stock models do, also by the auxiliary loss that those have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.transformers_blocks import get_grad
from support.transformers_families import build_model as build_family
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mixture_of_experts.huggingface import aux_loss, from_pretrained, from_transformers, prune, to_transformers
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.huggingface.blocks.block_settings import BlockSettings, find_attribute, find_recipe
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.router_config import INITIAL_COEF_KEY
from mixture_of_experts.stats import track_routing

#: all with a loss of their own whose model is made by the rules
WITH_LOSS = (
    "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "jamba", "laguna", "lara_mini", "mellum", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe",
    "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip
WITHOUT = ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "hy_v3", "llama4_text", "zaya")
FAST = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2", "deepseek_v3")
families = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in (*WITH_LOSS, *WITHOUT)]
)


def batch(side: str = "left") -> dict[str, Tensor]:
    """A batch with padding. No label is predicted at padding: routers of ours do not learn from it."""
    tokens = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, slice(3) if side == "left" else slice(7, None)] = 0
    labels = tokens.where(mask.bool() & mask.roll(1, dims=1).bool(), -100)
    return dict(input_ids=tokens, attention_mask=mask, labels=labels)


def stock(name: str, coef: float = 0.5, **settings: Any) -> Any:
    """A stock model, deterministic in training, with a coefficient that is seen."""
    model = build_family(name, **settings)
    for holder in (model, model.config.get_text_config()):
        if hasattr(holder, "router_aux_loss_coef"):
            holder.router_aux_loss_coef = coef
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def routers(model: nn.Module) -> list[Tensor]:
    """The gradients `(d, e)` of all routers with one matrix."""
    gates = [layer.moe.gate for layer in find_feed_forwards(model)]
    if gates:
        weights = [
            gate.w_gating if gate.w_gating is not None else find_attribute(gate, "logits.weight") for gate in gates
        ]
        return [get_grad(weight) for weight in weights if weight is not None]
    blocks = [(module, recipe) for module in model.modules() if (recipe := find_recipe(module)) is not None]
    weights = [BlockSettings(*block).router_weight for block in blocks]
    return [get_grad(weight).mT for weight in weights if weight is not None]


def assert_trains_alike(ours: Any, theirs: Any, given: dict[str, Any], sampled: bool = False) -> Any:
    """Equal losses and gradients of one training forward; return our output."""
    for model in (ours, theirs):
        model.train(not sampled).zero_grad()
    found, wanted = ours(**given), theirs(**given)
    torch.testing.assert_close(found.loss, wanted.loss, atol=1e-6, rtol=1e-6)
    found.loss.backward()
    wanted.loss.backward()
    for mine, other in zip(routers(ours), routers(theirs), strict=True):
        assert other.abs().max() > 0 or sampled
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-4)
    of_ours = dict(ours.named_parameters())
    for path, parameter in theirs.named_parameters():
        if path in of_ours:
            torch.testing.assert_close(get_grad(of_ours[path]), get_grad(parameter), atol=1e-5, rtol=2e-4)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@families
def test_loss_and_gradients_are_those_of_the_stock_model(name, side):
    """Also of the loss that is off by default, over the tokens of all layers that are no padding."""
    theirs, given = stock(name), batch(side)
    config = theirs.config.to_dict()
    ours = from_transformers(copy.deepcopy(theirs))
    sampled = name == "phimoe"  # draws in training
    off = assert_trains_alike(ours, theirs, given, sampled)
    on = assert_trains_alike(ours, theirs, given | dict(output_router_logits=True), sampled)
    if name in WITH_LOSS:
        assert on.loss - off.loss > 0.1
        torch.testing.assert_close(on.aux_loss, theirs(**given, output_router_logits=True).aux_loss, atol=1e-5, rtol=0)
        assert not hasattr(ours.config.get_text_config(), INITIAL_COEF_KEY)
    else:
        assert torch.equal(on.loss, off.loss)
    wanted = theirs(**given, output_router_logits=True).router_logits if name != "zaya" else ()
    found = on.router_logits if name in WITH_LOSS else ()
    for mine, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(mine, other.view_as(mine).float(), atol=1e-5, rtol=1e-5)
    assert aux_loss(ours) == 0
    assert to_transformers(ours).config.to_dict() == config


def test_the_configuration_asks_for_the_loss(tmp_path):
    """As an argument does; also of what was saved and loaded."""
    theirs, given = stock("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5), batch()
    ours = from_transformers(copy.deepcopy(theirs))
    assert_trains_alike(ours, theirs, given)
    ours.save_pretrained(tmp_path)
    for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        on = assert_trains_alike(loaded, theirs, given)
        assert on.loss - assert_trains_alike(loaded, theirs, given | dict(output_router_logits=False)).loss > 0.1


def test_with_activation_checkpointing():
    """A recomputation computes what the forward did, and adds nothing to what the model returned."""
    theirs, given = stock("mixtral", num_hidden_layers=3), batch() | dict(output_router_logits=True, use_cache=False)
    ours = from_transformers(copy.deepcopy(theirs))
    ours.activation_checkpointing_enable()
    assert len(assert_trains_alike(ours, theirs, given).router_logits) == 3
    ours.activation_checkpointing_enable(dict(use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):  # routers would get no gradient
        ours.train()(**given)
    ours(**given | dict(output_router_logits=False)).loss.backward()  # nothing to lose


def test_with_groups_that_need_padding():
    """Groups of 4 of 10 tokens: the loss is over the tokens, not over the rows of groups."""
    theirs, given = stock("mixtral"), batch() | dict(output_router_logits=True)
    ours = from_transformers(copy.deepcopy(theirs))
    for layer in find_feed_forwards(ours):
        layer.moe.group_size = 4
    assert_trains_alike(ours, theirs, given)


def test_with_statistics_and_a_copy():
    theirs, given = stock("mixtral"), batch() | dict(output_router_logits=True)
    ours = copy.deepcopy(from_transformers(copy.deepcopy(theirs)))
    with track_routing(ours):
        assert_trains_alike(ours, theirs, given)
    assert_trains_alike(copy.deepcopy(ours), theirs, given)  # the hooks are copied too


def test_inference_returns_logits_too():
    theirs, given = stock("mixtral"), batch()
    ours = from_transformers(copy.deepcopy(theirs)).eval()
    with torch.no_grad():
        for one in (given, {name: value[:, -1:] for name, value in given.items()}):
            found, wanted = (model(**one, output_router_logits=True) for model in (ours, theirs))
            torch.testing.assert_close(found.router_logits, wanted.router_logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.aux_loss, wanted.aux_loss, atol=1e-5, rtol=1e-5)
            assert ours(**one).router_logits is None


@pytest.mark.slow
def test_a_pruned_model():
    """Its number of experts is that of the loss."""
    ours, given = from_transformers(stock("mixtral")), batch() | dict(output_router_logits=True)
    prune(ours, 3, "random")
    theirs = to_transformers(copy.deepcopy(ours))
    assert_trains_alike(ours, theirs, given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled():
    """From the first forward on, also if those before it returned no logits; and in one graph once an eager forward has
    set transformers' own hooks, which a stock model needs too."""
    ours, given = from_transformers(stock("mixtral")).train(), batch() | dict(output_router_logits=True)
    compiled = torch.compile(ours, backend="eager")
    for each in (batch(), given):
        found, wanted = compiled(**each), copy.deepcopy(ours)(**each)
        torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.router_logits, wanted.router_logits)
    wanted = ours(**given)
    found = torch.compile(ours, backend="eager", fullgraph=True)(**given)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.router_logits, wanted.router_logits)


def test_a_coefficient_takes_the_place_of_the_loss():
    """0.0 too: there is no loss then."""
    given = batch()
    for coef in (0.25, 0.0):
        ours = from_transformers(stock("mixtral", output_router_logits=True), loss_coef=coef).train()
        found = ours(**given)
        torch.testing.assert_close(found.loss, ours.eval()(**given).loss + (0 if coef == 0 else aux_loss(ours)))
        assert found.router_logits is None
        assert [layer.moe.loss_coef for layer in find_feed_forwards(ours)] == [coef] * 2
    ours = from_transformers(stock("mixtral"), z_loss_coef=0.25).train()  # beside the model's own
    on, off = ours(**given, output_router_logits=True), ours(**given)
    torch.testing.assert_close(on.loss - off.loss, 0.5 * stock("mixtral")(**given, output_router_logits=True).aux_loss)
    torch.testing.assert_close(off.loss, ours.eval()(**given).loss + aux_loss(ours))


def test_a_single_block_has_no_loss():
    moe = from_transformers(stock("mixtral").model.layers[0].mlp)
    assert moe.loss_coef == moe.z_loss_coef == 0.0
    assert moe(torch.randn(2, 5, 32))[1] == 0
    assert from_transformers(stock("mixtral").model.layers[0].mlp, loss_coef=0.5).loss_coef == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--loss-coef", "0.25"], ["--loss-coef", "0"]], ids=["default", "0.25", "0"])
@pytest.mark.parametrize("source", ["stock", "layers"])
def test_quantized_folders(source, words, tmp_path):
    """By default the loss is that of the stock model, or of the folder; `--loss-coef` takes its place."""
    model = stock("mixtral", output_router_logits=True)
    (model if source == "stock" else from_transformers(model, loss_coef=0.5)).save_pretrained(tmp_path / "in")
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), *words]) == 0
    loaded, given = from_pretrained(tmp_path / "out").train(), batch()
    on, off = loaded(**given), loaded.eval()(**given, output_router_logits=False)
    coef = float(words[1]) if words else 0.5 if source == "layers" else 0.0
    assert [layer.moe.loss_coef for layer in find_feed_forwards(loaded)] == [coef] * 2
    if source == "stock" and not words:
        assert loaded.config.router_aux_loss_coef == 0.5
        torch.testing.assert_close(on.loss, off.loss + 0.5 * on.aux_loss)
    else:
        loaded.train()(**given)
        torch.testing.assert_close(on.loss, off.loss + aux_loss(loaded))
        assert on.aux_loss is None
