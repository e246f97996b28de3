"""What a `Routing` tells that a gate need not have said."""

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from mixture_of_experts import MoE, Routing, TopKGating


def make_routing(**more) -> Routing:
    """Three outer experts, one group of two tokens, two choices each, of two experts."""
    expert = torch.tensor([[[0, 1, 1, 0]]]).expand(3, 1, 4)
    weight = torch.tensor([[[0.75, 0.25, 0.5, 0.0]]]).expand(3, 1, 4)
    given = dict(expert=expert, kept=weight != 0, weight=weight, probs=torch.ones(3, 1, 2, 2) / 2, num_tokens=2)
    given |= dict(num_experts=2, capacity=None, k=2, sent=weight != 0)
    return Routing(**{**given, "losses": {"balance": torch.tensor(1.0), "z": torch.tensor(2.0)}, **more})


def test_losses_have_names_by_which_they_are_replaced():
    own = make_routing(losses={"own": torch.tensor(3.0), "balance": torch.tensor(1.0)})
    assert {name: loss.item() for name, loss in own.losses.items()} == {"own": 3.0, "balance": 1.0, "z": 0.0}
    assert (own.balance_loss.item(), own.z_loss.item()) == (1.0, 0.0)
    routing = make_routing()
    found = replace(routing, losses={**routing.losses, "z": torch.tensor(6.0), "own": torch.tensor(4.0)})
    assert {name: loss.item() for name, loss in found.losses.items()} == {"balance": 1.0, "z": 6.0, "own": 4.0}
    assert found.z_loss.item() == 6.0
    assert routing.z_loss.item() == 2.0  # the old one is as it was
    assert replace(found, weight=found.weight * 2).losses is found.losses


def test_routing_is_a_pytree():
    losses = {"own": torch.tensor(3.0), "balance": torch.tensor(1.0), "z": torch.tensor(2.0)}
    routing = make_routing(losses=losses)
    leaves, spec = pytree.tree_flatten(routing)
    assert sum(leaf is routing.z_loss for leaf in leaves) == 1
    half = pytree.tree_unflatten([leaf.half() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
    assert {loss.dtype for loss in half.losses.values()} == {torch.float16}
    assert (half.balance_loss.item(), half.z_loss.item(), half.losses["own"].item()) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layer_weighs_replaced_routing(compiled):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = TopKGating(8, 4)

        def forward(self, x, importance=None, mask=None):
            losses = {"z": torch.tensor(5.0), "balance": torch.tensor(7.0)}
            return replace(self.gate(x, importance, mask), losses=losses)

    moe = MoE(8, 4, gate=Wrapper(), loss_coef=0.5, z_loss_coef=0.25)
    run = torch.compile(moe, backend="eager", fullgraph=True) if compiled else moe
    assert run(torch.randn(2, 5, 8))[1].item() == 0.5 * 7 + 0.25 * 5


def test_tokens_queues_and_importance_with_outer_experts():
    routing = make_routing()
    for _ in range(2):
        assert routing.token.tolist() == [[[0, 0, 1, 1]]] * 3
        assert routing.queue_length.tolist() == [[[1, 2]]] * 3
        assert routing.importance.tolist() == [[[1.0, 0.5, 1.0, 0.0]]] * 3
        assert routing.count_occupied_slots().tolist() == [[[1, 2]]] * 3
        assert routing.position[..., :3].tolist() == [[[0, 0, 1]]] * 3
        routing = make_routing(queues=routing.find_queues())
    chosen = make_routing(primary=torch.tensor([[[False, True, True, False]]]).expand(3, 1, 4))
    assert chosen.importance.tolist() == [[[0.5, 1.0, 1.0, 0.0]]] * 3
    small = make_routing(capacity=1)
    assert (routing.slots_per_queue, small.slots_per_queue) == (2, 1)
    assert small.count_occupied_slots().tolist() == [[[1, 1]]] * 3
    limited = make_routing(capacity=2, limit=torch.tensor([[1], [2], [0]]))
    assert limited.count_occupied_slots().tolist() == [[[1, 1]], [[1, 2]], [[0, 0]]]


def test_dense_views():
    routing = make_routing()
    dispatch, combine, loss = routing
    expected = torch.zeros(3, 1, 2, 2, 2)
    expected[..., 0, 0, 0], expected[..., 0, 1, 0], expected[..., 1, 1, 1] = 0.75, 0.25, 0.5
    assert torch.equal(combine, expected)
    assert torch.equal(dispatch, (expected != 0).float())
    assert torch.equal(routing.dispatch_tensor(), dispatch)
    assert loss == 1.0
