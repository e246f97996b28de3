"""A model of transformers with replaced networks in several threads: masks and losses stay those of their own call."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.concurrent_calls import Call, check_threads
from support.transformers_models import ARCHITECTURES, SINGLE_NETWORK, disable_dropout, make_two_lengths
from torch import Tensor, nn

from mixture_of_experts.huggingface import aux_loss, replace_ffn
from mixture_of_experts.whole_model.aux_losses import AuxLosses


def make_calls(model: nn.Module) -> list[Call]:
    """Inference, losses, training and generation, of batches with and without padding."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def infer(inputs: dict[str, Tensor], aux: AuxLosses) -> list[Tensor]:
        with torch.inference_mode():
            return [model(**inputs).logits]

    def tell_loss(inputs: dict[str, Tensor], aux: AuxLosses) -> list[Tensor]:
        with torch.no_grad():
            return [model(**inputs).logits, aux_loss(model)]

    def train(inputs: dict[str, Tensor], aux: AuxLosses) -> list[Tensor]:
        out = model(**inputs, labels=inputs["input_ids"])
        grads = torch.autograd.grad(out.loss + aux_loss(model), parameters, allow_unused=True)
        return [out.loss.detach(), aux.take().detach(), *(g for g in grads if g is not None)]

    def generate(inputs: dict[str, Tensor], aux: AuxLosses) -> list[Tensor]:
        return [model.generate(**inputs, max_new_tokens=3, do_sample=False)]

    calls = []
    for work in (infer, tell_loss, train, generate):
        alone, batch = make_two_lengths("left")
        calls += [partial(work, batch), partial(work, {"input_ids": alone[0]})]
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_thousand_calls_of_eight_threads(training):
    torch.manual_seed(0)
    model = disable_dropout(ARCHITECTURES["llama"].build())
    replace_ffn(model, num_experts=4, gate=SINGLE_NETWORK)
    check_threads(model.train(training), make_calls(model), 64)
