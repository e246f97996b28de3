"""What a `Routing` tells that a gate need not have said."""

import torch

from mixture_of_experts import Routing


def a_routing(**more) -> Routing:
    """Three outer experts, one group of two tokens, two choices each, of two experts."""
    expert = torch.tensor([[[0, 1, 1, 0]]]).expand(3, 1, 4)
    weight = torch.tensor([[[0.75, 0.25, 0.5, 0.0]]]).expand(3, 1, 4)
    given = dict(expert=expert, kept=weight != 0, weight=weight, probs=torch.ones(3, 1, 2, 2) / 2, num_tokens=2)
    given |= dict(num_experts=2, capacity=None, k=2, chosen=weight != 0)
    return Routing(**{**given, "balance_loss": torch.tensor(1.0), "z_loss": torch.tensor(2.0), **more})


def test_losses_have_names():
    assert {name: loss.item() for name, loss in a_routing().losses.items()} == {"balance": 1.0, "z": 2.0}
    own = a_routing(losses={"own": torch.tensor(3.0), "z": torch.tensor(4.0)})
    assert {name: loss.item() for name, loss in own.losses.items()} == {"own": 3.0, "z": 4.0}
    assert a_routing(losses={"own": torch.tensor(3.0)}).losses["z"] == 2.0


def test_tokens_queues_and_importance_with_outer_experts():
    routing = a_routing()
    for _ in range(2):
        assert routing.token.tolist() == [[[0, 0, 1, 1]]] * 3
        assert routing.queued.tolist() == [[[1, 2]]] * 3
        assert routing.importance.tolist() == [[[1.0, 0.5, 1.0, 0.0]]] * 3
        assert routing.slots_held(routing.group_queues()).tolist() == [[[1, 2]]] * 3
        assert routing.slot[..., :3].tolist() == [[[0, 0, 1]]] * 3
        routing = a_routing(queues=routing.group_queues())
    chosen = a_routing(primary=torch.tensor([[[False, True, True, False]]]).expand(3, 1, 4))
    assert chosen.importance.tolist() == [[[0.5, 1.0, 1.0, 0.0]]] * 3
    small = a_routing(capacity=1)
    assert (routing.slots, small.slots) == (2, 1)
    assert small.slots_held(routing.group_queues()).tolist() == [[[1, 1]]] * 3
    limited = a_routing(capacity=2, limit=torch.tensor([[1], [2], [0]]))
    assert limited.slots_held(routing.group_queues()).tolist() == [[[1, 1]], [[1, 2]], [[0, 0]]]


def test_dense_views():
    routing = a_routing()
    dispatch, combine, loss = routing
    expected = torch.zeros(3, 1, 2, 2, 2)
    expected[..., 0, 0, 0], expected[..., 0, 1, 0], expected[..., 1, 1, 1] = 0.75, 0.25, 0.5
    assert torch.equal(combine, expected)
    assert torch.equal(dispatch, (expected != 0).float())
    assert torch.equal(routing.dispatch_tensor(), dispatch)
    assert loss == 1.0
