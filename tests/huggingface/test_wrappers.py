"""Swapped models under `torch.compile` and PEFT: masks, losses and weights stay right."""

from __future__ import annotations

import peft
import pytest
import torch
from support.transformers_models import ARCHITECTURES, ONE_PLACE, two_lengths, without_dropout
from torch import Tensor, nn

from mixture_of_experts.huggingface import export, from_transformers, prune, replace_ffn, to_transformers, upcycle
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.unstack import restack, unstack
from mixture_of_experts.whole_model.call_stack import STACKS

from .test_blocks import build as build_stock

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # in PEFT
    pytest.mark.filterwarnings("ignore:the routers in .* were drawn in memory:UserWarning"),  # see test_adapters.py
]


def build(name: str) -> nn.Module:
    model = without_dropout(ARCHITECTURES[name].build()).train()
    replace_ffn(model, num_experts=4, gate=ONE_PLACE, loss_coef=0.5)
    return model


def labelled() -> dict[str, Tensor]:
    _, batch = two_lengths("right")
    return {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.exhaustive), "opt"])
def test_compile_in_one_graph(name):
    """Mask, and loss, and their gradients; a step with another mask compiles nothing anew."""
    torch.compiler.reset()
    model, graphs, made = build(name), [], 0
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for step in range(2):
        made = len(graphs)
        batch = labelled()
        batch["attention_mask"] = batch["attention_mask"].roll(step, 0)
        eager = model(**batch)
        expected = gradients(model, eager.loss)
        out = compiled(**batch, use_cache=False)
        torch.testing.assert_close(out.loss, eager.loss)
        torch.testing.assert_close(out.logits, eager.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients(model, out.loss), expected)
        assert not STACKS.calls
    assert len(graphs) == made > 0
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_compile_with_checkpointing():
    """Not in one graph; but with the right masks."""
    model, batch = build("llama"), labelled()
    other = {**batch, "attention_mask": batch["attention_mask"].flip(0)}
    expected = gradients(model, model(**batch).loss + model(**other).loss)
    model.activation_checkpointing_enable()
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**batch, use_cache=False).loss + compiled(**other, use_cache=False).loss
    torch.testing.assert_close(gradients(model, loss), expected, atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


# PEFT


@pytest.mark.parametrize("change", [upcycle, replace_ffn, from_transformers, to_transformers, export])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model,
        lambda model: torch.compile(model, backend="eager"),
        torch.nn.DataParallel,
    ],
    ids=["peft", "compile", "parallel"],
)
def test_a_wrapper_is_not_what_is_changed(change, wrap):
    """Its loss would lack the auxiliary loss, and the model in it would not be saved with its experts."""
    model = ARCHITECTURES["llama"].build()
    if change is export:
        upcycle(model, num_experts=4)
    wrapped = wrap(model)
    kinds = [type(module) for module in wrapped.modules()]
    with pytest.raises(ValueError, match=r"is a wrapper: change|has adapters of PEFT"):
        change(wrapped)
    assert [type(module) for module in wrapped.modules()] == kinds


def test_what_is_changed_in_inference_mode_can_be_trained():
    model, inputs = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].inputs()
    stock = build_stock("Mixtral")
    changes = {
        "upcycle": lambda: upcycle(model, num_experts=4),
        "prune": lambda: prune(model, 3, calibration=[inputs]),
        "unstack": lambda: unstack(model),
        "restack": lambda: restack(model),
        "quantize": lambda: quantize_experts(model.requires_grad_(False)),
        "from": lambda: from_transformers(stock),
        "to": lambda: to_transformers(stock),
    }
    for name, change in changes.items():
        with torch.inference_mode():
            change()
        made = [tensor for one in (model, stock) for tensor in (*one.parameters(), *one.buffers())]
        assert not any(tensor.is_inference() for tensor in made), name


def test_peft_brings_mask_and_loss():
    model, batch = build("llama"), labelled()
    expected = model(**batch).loss
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["gate", "mlp"])
    ).train()
    torch.testing.assert_close(wrapped(**batch).loss, expected)
    alone, padded = two_lengths("right")
    logits = wrapped.eval()(**padded).logits[1, : alone[1].shape[1]]
    torch.testing.assert_close(logits, wrapped(alone[1]).logits[0], atol=2e-5, rtol=0)
