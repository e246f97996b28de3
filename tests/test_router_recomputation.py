"""Routers whose backward computes scores anew, as they do on a GPU: the same decisions, losses and derivatives."""

import pytest
import torch
from support.layer_variants import DIM, NUM_EXPERTS, ROUTERS
from support.versions import ONE_DYNAMIC_GRAPH
from torch import nn

from mixture_of_experts import TopKGating
from mixture_of_experts.gating import recomputing as saving

NOT_RECOMPUTED = "NoisyTopK", "DepthAveraged", "TopK, chosen by capped logits"


@pytest.fixture
def force_recomputation(monkeypatch):
    """Numbers the calls that recompute; the CPU does as a GPU for which every result is large."""
    calls = []
    checkpoint = saving.checkpoint
    monkeypatch.setattr(saving, "_on_gpu", lambda x: x.device.type == "cpu")
    monkeypatch.setattr(saving, "MAX_SAVED_SHARE", 0.0)
    monkeypatch.setattr(saving, "MIN_ROUTER_WEIGHTS", 0)
    monkeypatch.setattr(saving, "checkpoint", lambda *args, **kw: calls.append(args[0]) or checkpoint(*args, **kw))
    return calls


def compute_results(gate: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Weights, losses, their gradients, and gradients of those."""
    torch.manual_seed(1)
    leaves = [x, *gate.parameters()]
    routing = gate(x, mask=mask)
    found = [routing.expert, routing.weight, *routing.losses.values()]
    total = (routing.weight * torch.linspace(-1, 1, routing.weight.shape[-1])).sum() + sum(routing.losses.values())
    first = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
    return [*found, *first, *second]


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_the_same_to_the_bit(router, dtype, masked, force_recomputation, monkeypatch):
    gate, x = ROUTERS[router]().to(dtype), torch.randn(3, 9, DIM, dtype=dtype, requires_grad=True)
    mask = torch.rand(3, 9) < 0.7 if masked else None
    anew = compute_results(gate, x, mask)
    assert len(force_recomputation) == (router not in NOT_RECOMPUTED)
    monkeypatch.setattr(saving, "_on_gpu", lambda x: False)
    for got, wanted in zip(anew, compute_results(gate, x, mask), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("router", ["TopK", "Top2, policy all", "ExpertChoice"])
def test_nothing_as_large_as_tokens_times_experts_is_kept(router, force_recomputation):
    gate, x = ROUTERS[router](), torch.randn(3, 9, DIM, requires_grad=True)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        gate(x)
    assert shapes
    assert (3, 9, NUM_EXPERTS) not in shapes


def test_no_recomputation_without_gradients(force_recomputation):
    with torch.no_grad():
        ROUTERS["TopK"]()(torch.randn(1, 4, DIM))
    assert not force_recomputation


@pytest.mark.parametrize(
    ("dim", "experts", "anew"), [(512, 128, False), (512, 129, True), (256, 255, False), (256, 256, True)]
)
def test_small_tensors_are_saved(dim, experts, anew, force_recomputation, monkeypatch):
    """Up to a quarter of the tokens' bytes, and of small routers all."""
    monkeypatch.setattr(saving, "MAX_SAVED_SHARE", 1 / 4)
    monkeypatch.setattr(saving, "MIN_ROUTER_WEIGHTS", 1 << 16)
    TopKGating(dim, experts)(torch.randn(1, 4, dim, requires_grad=True))
    assert bool(force_recomputation) == anew


def test_weights_of_one_forward_are_those_of_its_backward(force_recomputation):
    """`functional_call` takes them away after the forward; the module's own have no part in the gradient."""
    gate, other = ROUTERS["TopK"](), ROUTERS["TopK"]()
    own, x = dict(gate.named_parameters()), torch.randn(2, 5, DIM)

    def gradients(routing) -> list[torch.Tensor]:
        total = routing.weight.square().sum() + routing.z_loss
        return list(torch.autograd.grad(total, list(other.parameters())))

    found = gradients(torch.func.functional_call(gate, dict(other.named_parameters()), (x,)))
    assert len(force_recomputation) == 1
    for got, wanted in zip(found, gradients(other(x)), strict=True):
        assert torch.equal(got, wanted)
    assert all(gate.get_parameter(name) is weight for name, weight in own.items())


def test_transforms_and_batches_of_gradients(force_recomputation):
    gate, x = TopKGating(DIM, NUM_EXPERTS, 2), torch.randn(2, 5, DIM, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return gate(x).weight.square().sum()

    (wanted,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.func.grad(loss)(x), wanted)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(1)).squeeze(1), wanted)
    weight = gate(x).weight
    many = torch.autograd.grad(weight, x, torch.stack([2 * weight, 4 * weight]), is_grads_batched=True)[0]
    torch.testing.assert_close(many, torch.stack([wanted, 2 * wanted]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_gate_recomputes_too(dtype, monkeypatch):
    """In one graph, in which torch marks what is computed anew."""
    torch._dynamo.reset()
    monkeypatch.setattr(saving, "_on_gpu", lambda x: True)
    monkeypatch.setattr(saving, "MAX_SAVED_SHARE", 0.0)
    monkeypatch.setattr(saving, "MIN_ROUTER_WEIGHTS", 0)
    gate, graphs = TopKGating(DIM, NUM_EXPERTS, 2).to(dtype), []
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for length in (7, 12, 30):
        x = torch.randn(2, length, DIM, dtype=dtype, requires_grad=True)
        found, wanted = (
            [routing.weight, *torch.autograd.grad(routing.weight.square().sum() + routing.z_loss, [x, gate.w_gating])]
            for routing in (compiled(x), gate(x))
        )
        torch.testing.assert_close(found, wanted)
    assert len(graphs) == 1 or not ONE_DYNAMIC_GRAPH
    assert any("checkpoint" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    torch._dynamo.reset()
