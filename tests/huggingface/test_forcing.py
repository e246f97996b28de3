"""Forced experts in transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.transformers_models import make_two_lengths

from mixture_of_experts import force_routing

from .test_balancing_trainer import FAMILIES, build_family, record_choices
from .test_block_conversion import build_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["DeepseekV3", "Mixtral", *FAMILIES])
def test_balanced_forcing_cycles_experts(name):
    """Padding too; the weights are those of their own choices, and have gradients."""
    model: Any = build_family(name) if name in FAMILIES else build_model(name).train()
    (_, batch), seen = make_two_lengths("right"), record_choices(model)
    with force_routing(model):
        out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    free = model(**batch, labels=batch["input_ids"])
    assert len(seen) == 2
    for module, (forced, own) in seen:
        assert forced.dtype == own.dtype
        assert torch.equal(forced.flatten(), torch.arange(forced.numel()) % module.num_experts)
        assert not torch.equal(forced, own)
    assert not torch.equal(out.logits, free.logits)
    routers = [p for key, p in model.named_parameters() if key.endswith(("gate.weight", "router.gate.weight"))]
    assert len(routers) == 2
    assert all(p.grad is not None and p.grad.any() for p in routers)
