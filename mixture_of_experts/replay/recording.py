"""Recording: hooks store the choices of every real token of every sequence.

Axes: b sequences, n tokens of a forward, k choices of a token; of level two also eo outer experts, c slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.decision import plan_slots_of
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating import reads_of
from mixture_of_experts.gating.base import GIVEN_WEIGHTS
from mixture_of_experts.gating.given import LIVE
from mixture_of_experts.gating.levels import GIVEN
from mixture_of_experts.replay.hooks import ChoiceHooks
from mixture_of_experts.replay.records import RoutingRecords
from mixture_of_experts.replay.sequences import ChoiceSite, Seen, Sequences, SequencesCall, choice_sites
from mixture_of_experts.replay.topk_calls import Choosing
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.checks import check_flag
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.sites import Gates, Site, serve


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
    sites = choice_sites(model, "record_routing", gates)
    if check_flag("weights", weights):
        serve([one.site for one in sites], "record_routing(weights=True)", why_no_weights)
    recording = Recording(sites, weights)
    with Attached() as hooks:
        recording.start(hooks, seen)
        with call_stack.within([(recording, call_stack.ForwardCall())]):
            yield recording.records


class Part(NamedTuple):
    """The choices of a gate in one forward."""

    name: str
    values: tuple[Tensor, ...]  # (b, n, k) each: the choices, and the weights if they are recorded
    mask: Tensor | None  # (b, n)
    call: SequencesCall


class Recording(ChoiceHooks):
    """The choices that `record_routing` has stored and not yet moved to the records."""

    outermost = False
    sites: Sequence[ChoiceSite]
    weights: bool
    records: RoutingRecords

    def __init__(self, sites: list[ChoiceSite], weights: bool) -> None:
        self.sites, self.weights = sites, weights
        self.calls: list[SequencesCall] = []  # with what they chose
        none: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        numbers = {site.name: site.num_experts for site in sites}
        self.records = RoutingRecords(none, numbers, none if weights else None)
        self.records._unread = self.hand_over

    def before_layer(self, site: ChoiceSite, call: SequencesCall | None, args: Any, kwargs: Any) -> None:
        if call is not None:
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
        weight = (routing.weight.detach().reshape(*shape, site.k),) if self.weights else ()
        self.note(site, call, expert.reshape(*shape, site.choices), mask, *weight)

    def begin_block(self, site: ChoiceSite, call: SequencesCall | None, args: object) -> Choosing | None:
        return None if call is None else Choosing(site)

    def end_block(self, site: ChoiceSite, call: SequencesCall | None, expert: Tensor, output: object) -> None:
        if call is not None:
            expert = expert.reshape(*sequences_of(site, call, expert.numel() // site.k), site.k)
            self.note(site, call, expert, call.tokens.mask)

    def note(self, site: ChoiceSite, call: SequencesCall, expert: Tensor, mask: Tensor | None, *weight: Tensor) -> None:
        call.once(site.name)
        small = torch.int16 if site.num_experts < 1 << 14 else torch.int32
        if not call.parts:
            self.calls.append(call)
        call.parts.append(Part(site.name, (expert.detach().to(small), *weight), mask, call))

    def hand_over(self, records: RoutingRecords) -> None:
        """Move the stored choices of forwards that ended well from the device to the records."""
        parts = [part for call in self.calls if call.ended for part in call.parts]
        self.calls = [call for call in self.calls if not call.ended]
        for place, kept in enumerate(records._kept):
            for name, sequences in kept.items():
                if of_gate := [part for part in parts if part.name == name]:
                    kept[name] = joined(name, sequences, of_gate, place)


def why_no_weights(site: Site) -> str | None:
    """Why the weights of a site can be neither recorded nor replayed; None if they can."""
    if site.external:
        return "its own code computes the weights: convert the block by from_transformers"
    if site.is_level:
        return "in a layer of two levels only choices are recorded"
    return None if GIVEN_WEIGHTS in reads_of(site.gate) else f"its forward takes no {GIVEN_WEIGHTS}"


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


def joined(name: str, before: list[Tensor], parts: list[Part], place: int) -> list[Tensor]:
    """The recorded sequences of a gate after new forwards, which begin sequences or continue some: the choices, or the
    weights, by their place in the values of each part."""
    pieces = [[record] for record in before]
    for part in parts:
        found = part.values[place].cpu()
        rows = list(found) if part.mask is None else [*map(Tensor.__getitem__, found, part.mask.cpu())]
        if not part.call.continues:
            pieces += [[row.clone()] for row in rows]
            continue
        if len(rows) > len(pieces):
            raise RuntimeError(f"{name!r}: a forward continues {len(rows)} sequences, {len(pieces)} were recorded")
        seen = part.call.read_before(len(rows))
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
