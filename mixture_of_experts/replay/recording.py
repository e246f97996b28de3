"""Uses hooks to record the expert choices of every non-padding token.

Axes: b (sequences), n (tokens per forward pass), k (choices per token).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.gating.overrides import GIVEN, KEEP_ROUTER_CHOICE
from mixture_of_experts.replay.choice_hooks import ChoiceHooks
from mixture_of_experts.replay.records import RoutingRecords
from mixture_of_experts.replay.sequences import RoutingPoint, SequenceCall, find_routing_points
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.checks import check_flag
from mixture_of_experts.whole_model.router_discovery import GateSelection


@contextmanager
def record_routing(
    model: nn.Module, *, gates: GateSelection | None = None, weights: bool = False
) -> Iterator[RoutingRecords]:
    """Context manager that records the choices of every gate in `model` for later use with `replay_routing`.

    This function finds the same gates as `track_routing`. Each gate must be a token-choice gate of this package, or a
    router from another library that chooses experts with `torch.topk`. Padding is excluded according to the layer's
    mask or the attention mask of the enclosing model.

    Each forward pass appends its sequences to the records, in batch order. Each document in a packed row
    (`segment_ids`) counts as a sequence. Documents are ordered by their first tokens. A forward pass that continues a
    cache, as in `generate`, appends its tokens to the sequences of the previous pass. If the cache was cropped, the
    records are cropped too. Beam search raises an error because it swaps sequences in the cache. Without a cache, every
    generation step records its sequences again from the first token. Only forward passes in the current thread are
    recorded. Each forward pass is recorded once, even under activation checkpointing. The recorded data remains on the
    device until it is read.

    Args:
        model: the module that you call.
        gates: the gates to record, as gate names, gate modules, or layers that contain gates. Default: all.
        weights: whether to record and replay the choices' weights as well. Weights are supported only for gates of this
            package.

    Raises:
        ValueError: the model has no gate.
        TypeError: a gate does not make k choices for each token (expert choice), or its weights cannot be recorded.
            This error is also raised in a forward pass if a block from another library does not choose with
            `torch.topk`.
        RuntimeError: during a forward pass, a gate ran twice, a gate ran outside of `model`, a gate ran in a graph that
            was compiled before the context was entered, or beam search swapped sequences. This error is also raised
            when the records are read if a forward pass continued sequences that were not recorded.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating
        >>> from mixture_of_experts.replay import record_routing, replay_routing
        >>> moe, x = MoE(dim=8, gate=TopKGating(8, num_experts=4)), torch.randn(2, 5, 8)
        >>> with record_routing(moe) as records:
        ...     out, aux_loss = moe(x)
        >>> records.layers, records.lengths("gate"), records["gate"][0].shape
        (('gate',), [5, 5], torch.Size([5, 2]))
        >>> with replay_routing(moe, records):
        ...     bool((moe(x)[0] == out).all())
        True
    """
    recording = RoutingRecorder(
        find_routing_points(model, "record_routing", gates, check_flag("weights", weights)), weights
    )
    with Attachments() as hooks:
        recording.attach_hooks(hooks)
        yield recording.records


class RoutingRecorder(ChoiceHooks):
    """Stores the choices of gates in `records`. Instances are created by `record_routing`."""

    records_weights: bool

    def __init__(self, points: list[RoutingPoint], weights: bool) -> None:
        super().__init__(points)
        self.records_weights = weights
        none: dict[str, list[Tensor]] = {point.name: [] for point in points}
        numbers = {point.name: point.num_experts for point in points}
        self.records: RoutingRecords = RoutingRecords(none, numbers, none if weights else None)
        self.pending_forwards: list[Any] | None = self.records._unread

    def on_choices(self, point: RoutingPoint, call: SequenceCall, routing: Any, kwargs: Any) -> None:
        expert = torch.where(routing.kept, routing.expert, -2 - routing.expert)
        if routing.chosen is not None:
            expert = torch.where(routing.chosen, expert, -1)
        expert, given = expert.unflatten(-1, (-1, point.k)), kwargs.get(GIVEN)
        if given is not None:  # negative overrides (no choice or no computation) are recorded unchanged
            expert = torch.where((given < 0) & (given != KEEP_ROUTER_CHOICE), given, expert)
        self.store_choices(point, call, *([expert, routing.weight.detach()] if self.records_weights else [expert]))

    def on_block_choices(self, point: RoutingPoint, call: SequenceCall, output: object, expert: Tensor) -> None:
        self.store_choices(point, call, expert)

    def store_choices(self, point: RoutingPoint, call: SequenceCall, expert: Tensor, *weight: Tensor) -> None:
        """Store a gate's choices from one forward pass. Choices are stored as int16 if the number of experts allows it,
        and as int32 otherwise."""
        sizes, mask = call.entered_gates[point.name]
        small = torch.int16 if point.num_experts < 1 << 14 else torch.int32
        values = [each.reshape(*sizes, point.k) for each in (expert.detach().to(small), *weight)]
        call.choices[point.name] = values, mask, call.num_seen
