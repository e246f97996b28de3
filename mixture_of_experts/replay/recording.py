"""Recording: hooks store the choices of every real token of every sequence.

Axes: b sequences, n tokens of a forward, k choices of a token; of level two also eo outer experts, c slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from mixture_of_experts.replay.records import RoutingRecords
from mixture_of_experts.replay.sequences import (
    ChoiceSite,
    Seen,
    Sequences,
    SequencesCall,
    choice_sites,
    sequences_around,
)
from mixture_of_experts.replay.topk_calls import BlockWatch, Choosing, refuse_one_graph, refuse_other_ways
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.checks import check_flag
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch
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
        recording.start(model, hooks, seen)
        with call_stack.within([(recording, call_stack.ForwardCall())]):
            yield recording.records


class Part(NamedTuple):
    """The choices of a gate in one forward."""

    name: str
    expert: Tensor  # (b, n, k)
    weight: Tensor | None  # (b, n, k)
    mask: Tensor | None  # (b, n)
    seen: Tensor | int
    continues: bool


class Recording:
    """The choices that `record_routing` has stored and not yet moved to the records."""

    records: RoutingRecords
    sites: list[ChoiceSite]
    weights: bool

    def __init__(self, sites: list[ChoiceSite], weights: bool) -> None:
        self.sites, self.weights = sites, weights
        self.parts: dict[str, list[Part]] = {site.name: [] for site in sites}
        self.records = RoutingRecords(
            {site.name: [] for site in sites},
            {site.name: site.num_experts for site in sites},
            {site.name: [] for site in sites} if weights else None,
        )
        self.records._unread = self.hand_over

    def start(self, model: nn.Module, hooks: Attached, seen: Seen | None) -> None:
        whole = Whole(self)
        around = sequences_around(self, self.sites, seen, whole.take)
        for site in self.sites:
            sequences = around[site.site.around]
            if site.external:
                begin, chosen = partial(self.begin_block, site, sequences), partial(self.chosen, site, sequences)
                BlockWatch(begin, chosen).follow(site.called, hooks, first=False)
                continue
            hooks.before(site.called, partial(self.before_layer, site, sequences))
            hooks.after(site.site.called, partial(self.after_gate, site, sequences), with_kwargs=True)
        for module, sequences in around.items():
            sequences.follow(module, hooks)
        if model not in around:
            whole.follow(model, hooks)

    def before_layer(
        self,
        site: ChoiceSite,
        sequences: Sequences,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        if (call := sequences.call(site)) is not None and kwargs is not None:
            call.layer, call.sizes[site.name] = site.layer, site.sizes(args, kwargs)

    def after_gate(
        self,
        site: ChoiceSite,
        sequences: Sequences,
        gate: nn.Module,
        args: object,
        kwargs: dict[str, Any],
        routing: Routing | None = None,
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
        shape = (math.prod(shape[:-1]), shape[-1])
        weight = routing.weight.reshape(*shape, site.k) if self.weights else None
        mask = None if mask is None else mask.reshape(shape)
        self.note(site, call, expert.reshape(*shape, site.choices), mask, weight)

    def begin_block(self, site: ChoiceSite, sequences: Sequences, args: object) -> Choosing | None:
        refuse_one_graph(site)
        return None if sequences.call(site) is None else Choosing(site)

    def chosen(self, site: ChoiceSite, sequences: Sequences, mode: Choosing, output: object) -> None:
        if (call := sequences.call(site)) is None:
            return
        expert = refuse_other_ways(site, mode)
        expert = expert.reshape(*sequences_of(site, call, expert.numel() // site.k), site.k)
        self.note(site, call, expert, call.tokens.mask)

    def note(
        self, site: ChoiceSite, call: SequencesCall, expert: Tensor, mask: Tensor | None, weight: Tensor | None = None
    ) -> None:
        call.once(site.name)
        small = torch.int16 if site.num_experts < 1 << 14 else torch.int32
        weight = None if weight is None else weight.detach()
        call.parts.append(Part(site.name, expert.detach().to(small), weight, mask, call.seen, call.continues))

    def keep(self, parts: list[Part]) -> None:
        """Store the choices of a forward that ended well."""
        for part in parts:
            self.parts[part.name].append(part)

    def hand_over(self, records: RoutingRecords) -> None:
        """Move the stored choices from the device to the records."""
        for name, parts in self.parts.items():
            if parts:
                if records._weights is not None:
                    weights = [part.weight for part in parts if part.weight is not None]
                    records._weights[name] = joined(name, records._weights[name], parts, weights)
                records._experts[name] = joined(name, records._experts[name], parts, [part.expert for part in parts])
                parts.clear()


class WholeCall(ForwardCall):
    """A forward, under way, of a model that has models around gates in it."""

    def __init__(self, around: WholeCall | None) -> None:
        self.around = around
        self.parts: list[Part] = []


class Whole(Watch):
    """Hands what was recorded to the recording, when the forward of the whole model has ended well."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(owner=recording)
        self.recording = recording

    def begins(self, module: nn.Module, args: object, kwargs: object) -> WholeCall:
        return WholeCall(call_stack.current(self))

    def take(self, parts: list[Part]) -> None:
        """Take the parts of a model in it."""
        call = call_stack.current(self)
        if call is None:  # that model was called itself
            self.recording.keep(parts)
        else:
            call.parts.extend(parts)

    def ended(self, call: WholeCall, output: object) -> None:
        if call.around is None:
            self.recording.keep(call.parts)
        else:
            call.around.parts.extend(call.parts)


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


def joined(name: str, before: list[Tensor], parts: list[Part], of_parts: list[Tensor]) -> list[Tensor]:
    """The recorded sequences of a gate after new forwards, which begin sequences or continue some.

    `of_parts`: the experts, or the weights, `(b, n, k)` of each forward.
    """
    pieces = [[record] for record in before]
    for part, values in zip(parts, of_parts, strict=True):
        found = values.cpu()
        rows = list(found) if part.mask is None else [*map(Tensor.__getitem__, found, part.mask.cpu())]
        if not part.continues:
            pieces += [[row.clone()] for row in rows]
            continue
        if len(rows) > len(pieces):
            raise RuntimeError(f"{name!r}: a forward continues {len(rows)} sequences, {len(pieces)} were recorded")
        seen = part.seen.tolist() if isinstance(part.seen, Tensor) else [part.seen] * len(rows)
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
