"""The router's product: float32 whatever comes in, and nothing wider than the tokens is kept for the backward."""

import pytest
import torch

from mixture_of_experts.gating.base import top_choices
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.queues import stable_order

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("outer", [(), (2,)], ids=["one router", "two"])
@pytest.mark.parametrize("dtype", LOW)
def test_values_and_gradients_are_those_of_the_product_in_float32(dtype, outer):
    torch.manual_seed(0)
    x = torch.randn(*outer, 9, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(*outer, 6, 5, dtype=dtype, requires_grad=True)
    logits = router_logits(x, weight, torch.float32)
    wanted = x.float() @ weight.float()
    assert torch.equal(logits, wanted)
    grad = torch.randn_like(logits)
    for name, got, should in zip(
        "xw", *(torch.autograd.grad(result, [x, weight], grad) for result in (logits, wanted)), strict=True
    ):
        assert torch.equal(got, should), name


@pytest.mark.parametrize("dtype", LOW)
def test_no_copy_of_the_tokens_is_kept(dtype):
    x = torch.randn(64, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        router_logits(x, weight, torch.float32)
    assert [tensor.untyped_storage().data_ptr() for tensor in kept] == [
        tensor.untyped_storage().data_ptr() for tensor in (x, weight)
    ]


def test_gradients_under_autocast_stay_in_float32():
    torch.manual_seed(0)
    x = torch.randn(9, 6, dtype=torch.bfloat16)
    weight = torch.randn(6, 5, requires_grad=True)
    grad = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight, torch.float32)
        (got,) = torch.autograd.grad(logits, weight, grad)
    assert torch.equal(got, x.float().mT @ grad)


@pytest.mark.parametrize("choices", [1, 3, 7])
def test_choices_by_one_sort_are_those_by_one_maximum_after_the_other(choices):
    """What a GPU does for more than two choices, and the CPU never; with ties."""
    torch.manual_seed(0)
    score = torch.randint(0, 4, (200, 7)).float()
    assert torch.equal(stable_order(score, descending=True)[..., :choices], top_choices(score, choices))
