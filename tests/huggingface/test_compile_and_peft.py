"""Swapped models under `torch.compile` and PEFT: masks, losses and weights stay right."""

from __future__ import annotations

import peft
import pytest
import torch
from support.transformers_models import ARCHITECTURES, SINGLE_NETWORK, disable_dropout, make_two_lengths
from torch import Tensor, nn

from mixture_of_experts.huggingface import export, from_transformers, prune, replace_ffn, to_transformers, upcycle
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.unstack import restack, unstack
from mixture_of_experts.whole_model.call_stack import CALL_STACKS

from .test_block_conversion import build_model as build_stock

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # in PEFT
    pytest.mark.filterwarnings(
        "ignore:the routers in .* were initialized in memory:UserWarning"
    ),  # see test_adapter_checkpoints.py
]


def build_model(name: str) -> nn.Module:
    model = disable_dropout(ARCHITECTURES[name].build()).train()
    replace_ffn(model, num_experts=4, gate=SINGLE_NETWORK, loss_coef=0.5)
    return model


def make_labelled_batch() -> dict[str, Tensor]:
    _, batch = make_two_lengths("right")
    return {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)}


def compute_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.exhaustive), "opt"])
def test_compile_in_one_graph(name):
    """Mask, and loss, and their gradients; a step with another mask compiles nothing anew."""
    torch.compiler.reset()
    model, graphs, made = build_model(name), [], 0
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for step in range(2):
        made = len(graphs)
        batch = make_labelled_batch()
        batch["attention_mask"] = batch["attention_mask"].roll(step, 0)
        eager = model(**batch)
        expected = compute_gradients(model, eager.loss)
        out = compiled(**batch, use_cache=False)
        torch.testing.assert_close(out.loss, eager.loss)
        torch.testing.assert_close(out.logits, eager.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(compute_gradients(model, out.loss), expected)
        assert not CALL_STACKS.calls
    assert len(graphs) == made > 0
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_compile_with_checkpointing():
    """Not in one graph; but with the right masks."""
    model, batch = build_model("llama"), make_labelled_batch()
    other = {**batch, "attention_mask": batch["attention_mask"].flip(0)}
    expected = compute_gradients(model, model(**batch).loss + model(**other).loss)
    model.activation_checkpointing_enable()
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**batch, use_cache=False).loss + compiled(**other, use_cache=False).loss
    torch.testing.assert_close(compute_gradients(model, loss), expected, atol=1e-6, rtol=1e-5)
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
def test_rejects_wrapped_model(change, wrap):
    """Its loss would lack the auxiliary loss, and the model in it would not be saved with its experts."""
    model = ARCHITECTURES["llama"].build()
    if change is export:
        upcycle(model, num_experts=4)
    wrapped = wrap(model)
    kinds = [type(module) for module in wrapped.modules()]
    with pytest.raises(ValueError, match=r"is a wrapper; modify|has PEFT adapters"):
        change(wrapped)
    assert [type(module) for module in wrapped.modules()] == kinds


def test_models_changed_in_inference_mode_train():
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
    model, batch = build_model("llama"), make_labelled_batch()
    expected = model(**batch).loss
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["gate", "mlp"])
    ).train()
    torch.testing.assert_close(wrapped(**batch).loss, expected)
    alone, padded = make_two_lengths("right")
    logits = wrapped.eval()(**padded).logits[1, : alone[1].shape[1]]
    torch.testing.assert_close(logits, wrapped(alone[1]).logits[0], atol=2e-5, rtol=0)
