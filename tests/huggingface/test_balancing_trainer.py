"""Biases of transformers' own models move as ours do; in the Trainer, once for each of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.transformers_models import ARCHITECTURES, disable_dropout, make_two_lengths
from torch import Tensor, nn

from mixture_of_experts import TopKGating, balance_experts
from mixture_of_experts.huggingface import BalanceCallback, replace_ffn
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards

from .test_block_conversion import build_model as build_sparse
from .test_losses import make_batch, make_trainer

pytestmark = pytest.mark.slow

RATE = 1e-2
BIASES = ("e_score_correction_bias", "expert_bias")
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_local_experts=8, n_routed_experts=8,
    moe_num_experts=8, num_experts_per_tok=2, moe_k=2, n_group=1, topk_group=1, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, first_k_dense_replace=0, num_dense_layers=0, moe_layer_start_index=0,
)  # fmt: skip
#: where their bias is: on the router, on the block, on a module beside, a parameter
FAMILIES = {
    "Glm4Moe": dict(),
    "MiniMaxM2": dict(),
    "Lfm2Moe": dict(layer_types=["full_attention", "full_attention"]),
    "Ernie4_5_Moe": dict(),
    "Afmoe": dict(layer_types=["full_attention", "full_attention"]),
}


def build_family(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **FAMILIES[name]})
    return disable_dropout(getattr(transformers, f"{name}ForCausalLM")(config)).train()


def find_biases(model: nn.Module) -> dict[str, Tensor]:
    found = [*model.named_buffers(), *model.named_parameters()]
    return {name: value for name, value in found if name.rpartition(".")[2] in BIASES}


def record_choices(model: nn.Module) -> list[tuple[nn.Module, list[Tensor]]]:
    """What each module of experts is given, from now on."""
    seen: list[tuple[nn.Module, list[Tensor]]] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            seen.append((module, []))

            def keep(module: nn.Module, args: Any, kwargs: Any, to: list[Tensor] = seen[-1][1]) -> None:
                if module.training and torch.is_grad_enabled():
                    to.append(kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

            module.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def run_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Of two micro-batches, with evaluations between them."""
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        with torch.no_grad():
            model.eval()(**batch)
            model.train()
    optimizer.step()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_bias_counts_real_tokens(checkpointing):
    """DeepSeek-V3: padding is no token, a recomputation is none either, and micro-batches add up."""
    model, (_, batch) = build_sparse("DeepseekV3").train(), make_two_lengths("right")
    seen, before = record_choices(model), {name: value.clone() for name, value in find_biases(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancing = balance_experts(model, optimizer, rate=RATE)
    if checkpointing:
        model.activation_checkpointing_enable()
    run_step(model, optimizer, batch)
    real = batch["attention_mask"].bool().flatten()
    assert len(before) == len(seen) == 2
    for (name, old), (_, calls) in zip(before.items(), seen, strict=True):
        load = torch.zeros(8, dtype=torch.int64)
        for expert in calls[:2] if not checkpointing else calls[:1] * 2:
            load += expert[real].flatten().bincount(minlength=8)
        assert load.sum() == 2 * 3 * real.sum()
        expected = old + RATE * torch.sign(load.sum() - 8 * load)
        torch.testing.assert_close(find_biases(model)[name], expected)
    balancing.remove()
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name == "model")


@pytest.mark.parametrize("name", ["Glm4Moe", "Ernie4_5_Moe"])
def test_last_of_two_contexts_moves_the_bias(name):
    model, (_, batch) = build_family(name), make_two_lengths("right")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first, second = (balance_experts(model, optimizer, rate=rate) for rate in (1.0, RATE))
    for rate in (RATE, 1.0):
        before = {name: value.clone() for name, value in find_biases(model).items()}
        model(**batch).logits.sum().backward()
        optimizer.step()
        for name, bias in find_biases(model).items():
            torch.testing.assert_close((bias - before[name]).abs().max(), torch.tensor(rate))
        second.remove()
    first.remove()


@pytest.mark.parametrize("name", ["Glm4Moe", "Lfm2Moe"])
def test_transformers_nan_tokens_are_not_counted(name):
    """A tenth token is NaN in the first sparse block: the counts are those of the text without it."""
    model, ids = build_family(name), torch.randint(3, 60, (2, 10))
    balancing = balance_experts(model, torch.optim.SGD(model.parameters(), lr=0.0))
    first, found = model.get_submodule(balancing.gates[0].rpartition(".")[0]), []
    first.register_forward_pre_hook(
        lambda block, args: args[0].index_fill(1, torch.arange(9, args[0].shape[1]), torch.nan)
    )
    for text in (ids, ids[:, :9]):
        model(input_ids=text).logits.sum().backward()
        found.append(balancing.bias_updaters[0].counts.clone())
        balancing.bias_updaters[0].counts.zero_()
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (1, r"reads scores, which the router '.*\.mlp\.gate' .* from_transformers"),
        (2, r"does not support '.*\.mlp\.gate': experts are chosen in 2 groups, .*\. Use rule='sign'$"),
    ],
)
def test_quantile_rule_rejects_transformers_routers(groups, says):
    """Nor does a conversion help where experts are chosen in groups."""
    model = build_sparse("DeepseekV3", n_group=groups, topk_group=1)
    with pytest.raises(ValueError, match=says):
        balance_experts(model, torch.optim.SGD(model.parameters(), lr=0.0), "quantile")
    assert not any(module._forward_hooks for module in model.modules())


def test_low_precision_bias_warns():
    model = build_sparse("DeepseekV3").bfloat16()
    with pytest.warns(UserWarning, match="the expert bias of '.*gate' is torch.bfloat16"):
        balance_experts(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("theirs", [False, True])
def test_in_the_trainer(tmp_path, theirs):
    """As many steps as the optimizer took, and none after the training; resumed it goes on where it was."""
    torch.manual_seed(0)
    if theirs:
        model = build_sparse("DeepseekV3").train()
    else:
        model = disable_dropout(ARCHITECTURES["llama"].build()).train()
        replace_ffn(model, num_experts=4, gate=lambda d, e: TopKGating(d, e, expert_bias=True))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows = make_batch(16)
    names = [name for name in start if name.rpartition(".")[2] in BIASES]
    assert len(names) == 2

    def run(steps: int, resume: str | None = None) -> dict[str, Tensor]:
        settings = dict(max_steps=steps, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, seed=1)
        made = make_trainer(model, rows, tmp_path, **settings, optim="adamw_torch", learning_rate=1e-3)
        del model.zero_grad
        callback = BalanceCallback(rate=RATE)
        made.add_callback(callback)
        made.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items()}

    found = run(4)
    for name in names:
        steps = (found[name] - start[name]) / RATE
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert 1 <= steps.abs().max() <= 4 + 1e-3
    counts = [module.moe.gate.expert_counts for module in find_feed_forwards(model)]
    assert not any(count.any() for count in counts)
    if theirs:
        return  # transformers 5.24 leaves stacked experts as they are where its Trainer resumes
    model.load_state_dict(start)
    again = run(4, str(tmp_path / "checkpoint-2"))
    for name in found:
        torch.testing.assert_close(again[name], found[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_transformers_bias_in_compiled_model():
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, (_, batch) = build_sparse("DeepseekV3").train(), make_two_lengths("right")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balance_experts(model, optimizer, rate=RATE)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        found.append({name: value.clone() for name, value in find_biases(model).items()})
    torch.testing.assert_close(*found)
    torch.compiler.reset()
