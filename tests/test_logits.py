"""The router's product: float32 whatever comes in, and nothing wider than the tokens is kept for the backward."""

import pytest
import torch

import mixture_of_experts.gating.choices as choices_module
import mixture_of_experts.gating.logits as logits_module
from mixture_of_experts.dispatch.queues import stable_argsort
from mixture_of_experts.gating.choices import top_choices
from mixture_of_experts.gating.logits import router_logits

LOW = [torch.bfloat16, torch.float16]


def compute_logits(x, weight):
    """Logits `(..., t, e)` of tokens `(..., t, d)`, as one group."""
    return router_logits(x.unsqueeze(-3), weight).squeeze(-3)


@pytest.mark.parametrize("outer", [(), (2,)], ids=["one router", "two"])
@pytest.mark.parametrize("dtype", LOW)
def test_values_and_gradients_are_those_of_the_product_in_float32(dtype, outer):
    x = torch.randn(*outer, 9, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(*outer, 6, 5, dtype=dtype, requires_grad=True)
    logits = compute_logits(x, weight)
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
        compute_logits(x, weight)
    assert [tensor.untyped_storage().data_ptr() for tensor in kept] == [
        tensor.untyped_storage().data_ptr() for tensor in (x, weight)
    ]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("outer", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(9, 6, 5), (1, 16, 1), (300, 40, 64), (0, 6, 5)])
def test_gradients_in_bfloat16_are_those_in_float32_rounded_once(shape, outer, traced, monkeypatch):
    """What a GPU does. On the CPU, which has no such product, its sums are those of copies."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    monkeypatch.setattr(logits_module, "_wide_product", lambda x, weight: x.float() @ weight.float())
    t, d, e = shape
    x, weight = (torch.randn(*outer, *sizes, dtype=torch.bfloat16) for sizes in ((t, d), (d, e)))
    grad = torch.randn(*outer, t, e) * torch.logspace(-9, 3, e)
    grad_x, grad_weight = logits_module._narrow_grads(x, weight, grad, True, True)
    assert grad_x is not None
    assert grad_weight is not None
    of_x = grad.double() @ weight.double().mT, grad.double().abs() @ weight.double().abs().mT
    of_weight = x.double().mT @ grad.double(), x.double().abs().mT @ grad.double().abs()
    for got, (wanted, size) in ((grad_x, of_x), (grad_weight, of_weight)):
        assert got.dtype == torch.bfloat16
        assert got.shape == wanted.shape
        # half a unit in the last place, and what two parts of a number leave of it
        assert ((got.double() - wanted).abs() <= wanted.abs() * 2**-8 + size * 2**-16).all()


def test_float32_sum_product_gradients(monkeypatch):
    monkeypatch.setattr(logits_module, "_has_wide_product", lambda x, weight: True)
    monkeypatch.setattr(logits_module, "_wide_product", lambda x, weight: x.float() @ weight.float())
    x, weight = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((9, 6), (6, 5)))
    grad = torch.randn(9, 5)
    found = torch.autograd.grad(compute_logits(x, weight), [x, weight], grad)
    wanted = logits_module._narrow_grads(x.detach(), weight.detach(), grad, True, True)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("outer", [(), (2,), (3, 2)])
def test_a_wide_product_has_the_shape_and_dtype_of_one(outer):
    x, weight = (torch.empty(*outer, *shape, dtype=torch.bfloat16, device="meta") for shape in ((9, 6), (6, 5)))
    found = logits_module._wide_product(x, weight)
    assert (found.shape, found.dtype) == ((*outer, 9, 5), torch.float32)


def test_gradients_under_autocast_stay_in_float32():
    x = torch.randn(9, 6, dtype=torch.bfloat16)
    weight = torch.randn(6, 5, requires_grad=True)
    grad = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = compute_logits(x, weight)
        (got,) = torch.autograd.grad(logits, weight, grad)
    assert torch.equal(got, x.float().mT @ grad)


@pytest.mark.parametrize("choices", [1, 3, 7])
def test_choices_by_one_sort_are_those_by_one_maximum_after_the_other(choices):
    """A GPU sorts for more than two choices, a CPU for many; with ties."""
    score = torch.randint(0, 4, (200, 7)).float()
    assert torch.equal(stable_argsort(score, descending=True)[..., :choices], top_choices(score, choices))


def test_many_choices_on_a_cpu_are_those_by_one_maximum_after_the_other():
    score = torch.randint(0, 9, (50, 40)).float()
    found, left = top_choices(score, 33), score.clone()
    for choice in range(33):
        best = left.argmax(dim=-1)
        assert torch.equal(found[:, choice], best)
        left[torch.arange(50), best] = -torch.inf


@pytest.mark.parametrize("choices", [2, 3])
def test_non_cpu_topk_uses_one_sort(choices, monkeypatch):
    calls = []
    monkeypatch.setattr(
        choices_module, "stable_argsort", lambda *args, **kw: calls.append(kw) or stable_argsort(*args, **kw)
    )
    found = top_choices(torch.empty(2, 7, device="meta"), choices)
    assert calls == [{"descending": True}] * (choices > 2)
    assert found.shape == (2, choices)
    assert found.is_contiguous()
