"""What a context leaves: its records, and hooks on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixture_of_experts.replay import RoutingRecords, record_routing


def record_forward(model: nn.Module, *args: Any, **kwargs: Any) -> RoutingRecords:
    """What the gates of a model choose in one forward."""
    with record_routing(model) as records:
        model(*args, **kwargs)
    return records


def assert_records_equal(one: RoutingRecords, other: RoutingRecords) -> None:
    assert one.layers == other.layers
    for layer in one:
        for a, b in zip(one[layer], other[layer], strict=True):
            assert a.equal(b), layer


def count_hooks(model: nn.Module) -> int:
    """The number of hooks on all modules of a model, each as often as it is kept."""
    return sum(len(value) for module in model.modules() for name, value in vars(module).items() if "_hooks" in name)
