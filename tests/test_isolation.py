"""A token that is not finite changes no result of another token, whichever way computes the call."""

import pytest
import torch
from support.isolation import BAD, LAYERS, SHAPE, check_isolated, compute_grouped_as_on_cuda, one_level

from mixture_of_experts import Experts

WAYS = ["cpu", "grouped", "grouped on CUDA", "batched", "plain"]


def isolated(monkeypatch, layer, way, *args):
    if way == "grouped on CUDA":
        way = "grouped"
        compute_grouped_as_on_cuda(monkeypatch)
    check_isolated(layer, way, *args)


@pytest.mark.parametrize("of", ["x", "grad"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_training(monkeypatch, way, layer, of):
    for value in BAD.values() if of == "x" else (torch.nan,):
        isolated(monkeypatch, LAYERS[layer](), way, value, of)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_inference(monkeypatch, way, layer):
    for value in BAD.values():
        isolated(monkeypatch, LAYERS[layer]().eval(), way, value, "x")


@pytest.mark.parametrize("factor", [None, 2.0, 8.0])
@pytest.mark.parametrize("way", WAYS)
def test_choices_of_weight_0(monkeypatch, way, factor):
    """With a capacity they hold slots, which may be all slots that are occupied."""
    weights = torch.where(torch.arange(SHAPE[1]).view(-1, 1) % 3 == 0, 0.0, torch.nan).expand(*SHAPE, 2)
    layer = one_level(factor, Experts(16, 4, 32))
    isolated(monkeypatch, layer, way, torch.nan, "x", {"given_weights": weights})
