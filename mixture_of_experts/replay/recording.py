"""Recording: hooks store the choices of every real token of every sequence.

Axes: b sequences, n tokens of a forward, k choices of a token; of level two also eo outer experts, c slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.decision import plan_slots_of
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.given import LIVE
from mixture_of_experts.gating.levels import GIVEN
from mixture_of_experts.replay.hooks import ChoiceHooks
from mixture_of_experts.replay.records import RoutingRecords
from mixture_of_experts.replay.sequences import ChoiceSite, Seen, Sequences, SequencesCall, choice_sites
from mixture_of_experts.replay.topk_calls import Choosing
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.checks import check_flag
from mixture_of_experts.whole_model.sites import Gates


@contextmanager
def record_routing(
    model: nn.Module, *, seen: Seen | None = None, gates: Gates | None = None, weights: bool = False
) -> Iterator[RoutingRecords]:
    """Record the choices of every gate in `model`, while the context lasts, for `replay_routing`.

    It finds the gates that `track_routing` finds: gates of token choice of this package, and the routers of MoE models
    in `transformers` that choose by `torch.topk`. Padding is left out, by the layer's mask or by the attention mask of
    the model around.

    Each forward adds its sequences to the records, in the order of the batch. A forward that continues a cache
    (`generate`) adds its tokens to the sequences of the forward before it. If the cache was cut, the record is cut too.
    Beam search is refused, because it exchanges the sequences of the cache. Without a cache every step of a generation
    adds its sequences anew, from their first token. Only forwards of this thread are recorded, each
    once, also under activation checkpointing. Numbers stay on the device until they are read.

    Args:
        model: the module that you call.
        seen: for a model with its own kind of cache: a function `(args, kwargs)` of its forward's arguments. It returns
            how many real tokens of each sequence earlier forwards have read, `(b,)` or one number for all; 0 begins
            new sequences. By default `past_key_values` and the attention mask tell that.
        gates: the gates to record, by their names or as modules (gates, or layers around them); by default all.
        weights: whether the weights of the choices are recorded too, and so replayed. Only for layers of one level with
            gates of this package.

    Raises:
        ValueError: the model has no gate.
        TypeError: tokens make no k choices at a gate (expert choice), or its weights cannot be recorded; in a forward,
            a block of `transformers` does not choose by `torch.topk`.
        RuntimeError: in a forward, a gate runs twice, outside of `model`, or in a graph from before the context; or
            beam search exchanged sequences; on reading, a forward continued sequences that were not recorded.

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
    recording = Recording(choice_sites(model, "record_routing", gates, check_flag("weights", weights)), weights)
    with Attached() as hooks:
        recording.start(hooks, seen)
        yield recording.records


@dataclass(eq=False)
class Recording(ChoiceHooks):
    """The choices that `record_routing` has stored and not yet moved to the records."""

    sites: list[ChoiceSite]
    weights: bool
    calls: list[SequencesCall] = field(default_factory=list)  # with what they chose
    outermost = False

    def __post_init__(self) -> None:
        none: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        numbers = {site.name: site.num_experts for site in self.sites}
        self.records: RoutingRecords = RoutingRecords(none, numbers, none if self.weights else None)
        self.records._unread = self.hand_over

    def before_layer(
        self, site: ChoiceSite, sequences: Sequences, layer: object, args: Any, kwargs: Any = None
    ) -> None:
        if kwargs is not None and (call := sequences.call(site)) is not None:
            call.layer, call.sizes[site.name] = site.layer, site.tokens(args, kwargs)[1:]

    def follow_layer(self, site: ChoiceSite, sequences: Sequences, hooks: Attached) -> None:
        hooks.after(site.site.called, partial(self.after_gate, site, sequences), with_kwargs=True)

    def after_gate(
        self, site: ChoiceSite, sequences: Sequences, gate: nn.Module, args: Any, kwargs: Any, routing: Any = None
    ) -> None:
        call = sequences.call(site)
        if call is None or routing is None or call.layer != site.layer:
            return
        shape, mask = call.sizes[site.name]
        expert = torch.where(routing.kept, routing.expert, -2 - routing.expert)
        if routing.weighed is not None:
            expert = torch.where(routing.weighed, expert, -1)
        expert, given = expert.unflatten(-1, (-1, site.k)), kwargs.get(GIVEN)
        if given is not None:  # a choice that was given as not made is recorded as it was given
            expert = torch.where((given < 0) & (given != LIVE), given, expert)
        if site.site.level_one is not None:
            expert = of_level_two(expert, call.outer)
        call.outer = routing
        values = {"experts": expert.reshape(*shape, site.choices)}
        if self.weights:
            values["weights"] = routing.weight.detach().reshape(*shape, site.k)
        self.note(site, call, mask, values)

    def begin_block(self, site: ChoiceSite, call: SequencesCall | None, hidden: object) -> Choosing | None:
        return None if call is None else Choosing(site)

    def ended(self, site: ChoiceSite, call: SequencesCall | None, output: object, expert: Tensor) -> None:
        if call is not None:
            expert = expert.reshape(*sequences_of(site, call, expert.numel() // site.k), site.k)
            self.note(site, call, call.tokens.mask, {"experts": expert})

    def note(self, site: ChoiceSite, call: SequencesCall, mask: Tensor | None, values: dict[str, Tensor]) -> None:
        """Store what a gate chose in a forward: values `(b, n, k)` by kind, of the tokens of a mask `(b, n)`."""
        if not call.chosen:
            self.calls.append(call)
        call.once(site.name)
        small = torch.int16 if site.num_experts < 1 << 14 else torch.int32
        values["experts"] = values["experts"].detach().to(small)
        call.chosen[site.name] = values, mask

    def hand_over(self, kept: dict[str, dict[str, list[Tensor]]]) -> None:
        """Move the stored values of forwards that ended well from the device to what records keep."""
        ended = [call for call in self.calls if call.ended]
        self.calls = [call for call in self.calls if not call.ended]
        for kind, of_gates in kept.items():
            for name, sequences in of_gates.items():
                if calls := [call for call in ended if name in call.chosen]:
                    of_gates[name] = joined(name, kind, sequences, calls)


def sequences_of(site: ChoiceSite, call: SequencesCall, num_tokens: int) -> tuple[int, int]:
    """The sizes `(b, n)` of the tokens of a block."""
    b, n = call.tokens.shape or (1, num_tokens)
    if call.tokens.unknown is not None or b * n != num_tokens:
        why = call.tokens.unknown or f"its model was given ({b}, {n})"
        raise ValueError(f"{num_tokens} tokens of {site.name!r} cannot be told apart: {why}")
    return b, n


def of_level_two(expert: Tensor, outer: Routing) -> Tensor:
    """Choices of level two, by slots `(eo, b, c, k2)`, by assignments of level one `(b n k, k2)`; -1 without a slot."""
    slots, k = plan_slots_of(outer), expert.shape[-1]
    none = expert.new_full((outer.expert.numel() + 1, k), -1)
    return none.index_copy(0, slots.assignment.to(torch.int64), expert.reshape(-1, k))[:-1]


def joined(name: str, kind: str, before: list[Tensor], calls: list[SequencesCall]) -> list[Tensor]:
    """What records keep of a gate, experts or weights, after forwards that begin sequences or continue some."""
    pieces = [[record] for record in before]
    for call in calls:
        values, mask = call.chosen[name]
        found = values[kind].cpu()
        rows = list(found) if mask is None else [*map(Tensor.__getitem__, found, mask.cpu())]
        if not call.continues:
            pieces += [[row] for row in rows]
            continue
        if len(rows) > len(pieces):
            raise RuntimeError(f"{name!r}: a forward continues {len(rows)} sequences, {len(pieces)} were recorded")
        seen = call.read_before(len(rows))
        for piece, row, read in zip(pieces[len(pieces) - len(rows) :], rows, seen, strict=True):
            have = sum(map(len, piece))
            if have < read:
                raise RuntimeError(
                    f"{name!r}: a forward continues after {read} tokens of a sequence, {have} were recorded"
                )
            if have > read:  # the cache was cut
                piece[:] = [torch.cat(piece)[:read]]
            piece.append(row)
    return [torch.cat(piece) for piece in pieces]
