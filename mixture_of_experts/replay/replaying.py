"""Replay: hooks give gates the choices of records; gates weigh them by their live scores.

Axes: b sequences, n tokens of a forward, s tokens of the longest record, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixture_of_experts.gating import reads_of
from mixture_of_experts.gating.given import GIVEN, LIVE, check_given
from mixture_of_experts.replay.hooks import ChoiceHooks
from mixture_of_experts.replay.records import RoutingRecords, begins, read_before
from mixture_of_experts.replay.sequences import ChoiceSite, SequencesCall, choice_sites
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.support.tracing import in_checkpoint
from mixture_of_experts.whole_model.sites import Gates

Beyond = Literal["error", "choose"]


@contextmanager
def replay_routing(
    model: nn.Module,
    records: RoutingRecords,
    *,
    beyond: Beyond = "error",
    gates: Gates | None = None,
) -> Iterator[None]:
    """Have every gate in `model` choose what `records` say, while the context lasts.

    A token's experts are those of the record. The gate computes their weights from live scores, with gradients, by its
    own rule; a block of `transformers` does so by its own code. If the records hold weights, these are the weights, to
    the bit; their gradient goes on to the live ones. Losses are those of the recorded choices. Records have
    real tokens only, so padding may stand elsewhere, or be missing.

    Each forward of this thread must have all sequences of the records, in their order; `records.select` makes records
    of another batch. A forward that continues a cache has the tokens that follow. With activation checkpointing call
    the backward inside the context too.

    Args:
        model: the module that you call.
        records: records of this model or one like it. Gates are matched by name; if names differ, by order.
        beyond: what happens to a token beyond the end of its sequence's record: "error", or "choose": its gate chooses.
            The last token of a completion is such a one: no engine has read it.
        gates: as in `record_routing`.

    Raises:
        ValueError: on entering: gates, choices or experts of model and records differ in number, or a gate cannot take
            choices; in a forward, before its first gate: numbers of sequences or tokens differ.
        TypeError: tokens make no k choices at a gate (expert choice); in a forward, a block of `transformers` does not
            choose by `torch.topk`.
        RuntimeError: in a forward or a backward that cannot be replayed: under reentrant checkpointing, outside of
            `model`, or in a backward after the context was left.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating
        >>> from mixture_of_experts.replay import RoutingRecords, replay_routing
        >>> moe = MoE(dim=8, gate=TopKGating(8, num_experts=4))
        >>> records = RoutingRecords({"gate": [torch.tensor([[3, 1], [0, 2]])]})
        >>> chosen = []
        >>> _ = moe.gate.register_forward_hook(lambda gate, args, routing: chosen.append(routing.expert.tolist()))
        >>> with replay_routing(moe, records):
        ...     out, aux_loss = moe(torch.randn(1, 2, 8))
        >>> chosen
        [[[3, 1, 0, 2]]]
    """
    check_choice("beyond", beyond, get_args(Beyond))
    if not isinstance(records, RoutingRecords):
        raise TypeError(
            f"records must be RoutingRecords, as record_routing yields, got a {type(records).__name__}: "
            "RoutingRecords.load reads a file, and RoutingRecords(...) takes a dict"
        )
    sites = choice_sites(model, "replay_routing", gates, records.weights is not None)
    replay = Replay(sites, records, beyond)
    with Attached() as hooks:
        hooks.callback(replay.close)
        replay.start(hooks)
        yield


class Replay(ChoiceHooks):
    """Gives the gates of a model their choices; made by `replay_routing`."""

    replays: ClassVar[bool] = True
    beyond: Beyond
    closed: bool

    def __init__(self, sites: list[ChoiceSite], records: RoutingRecords, beyond: Beyond) -> None:
        super().__init__(sites)
        self.beyond, self.closed = beyond, False
        layers, names = records.layers, [site.name for site in sites]
        if len(layers) != len(sites):
            raise ValueError(
                f"the model has {len(sites)} gates ({', '.join(names)}), the records {len(layers)} "
                f"({', '.join(layers)})"
            )
        self.lengths: dict[str, list[int]] = {}  # of the sequences of each gate
        self.tables: dict[str, list[Tensor]] = {}  # `(b, s + 1, k)`, its choices, and their weights if there are any
        for site, layer in zip(sites, names if set(layers) == set(names) else layers, strict=True):
            self.lengths[site.name] = records.lengths(layer)
            self.tables[site.name] = tables_of(site, layer, records)
        self.to_run_again: dict[str, Tensor] = {}  # choices of blocks that a backward may run again
        self.waiting: set[str] = set()  # blocks that no backward has run again yet

    def close(self) -> None:
        self.closed = True

    def give(
        self, site: ChoiceSite, call: SequencesCall | None, shape: tuple[int, int], mask: Tensor | None, device: Any
    ) -> list[Tensor]:
        """`(b, n, k)` int64, the choices for the tokens of a forward; and their weights, if the records hold them."""
        tables, seen = self.tables[site.name], 0 if call is None else call.seen
        if call is not None:
            self.check(site, call, shape, mask)
            call.chosen[site.name] = None
        if mask is None:
            index = torch.arange(shape[1], device=device).expand(shape)
        else:
            index = mask.to(device).cumsum(dim=-1) - 1
        index = index + (seen.to(device).unsqueeze(-1) if isinstance(seen, Tensor) else seen)
        if tables[0].device != device:
            tables[:] = [table.to(device) for table in tables]
        inside = index.clamp(0, tables[0].shape[1] - 1).unsqueeze(-1).expand(*shape, site.k)
        return [table.gather(1, inside) for table in tables]

    def give_block(self, site: ChoiceSite, call: SequencesCall | None, device: Any) -> Tensor:
        """`(b n, k)` int64, the choices for the tokens of a block; those of its last forward if it runs again."""
        if call is None:
            self.waiting.discard(site.name)
            return self.to_run_again[site.name]
        sizes, mask = call.entered[site.name]
        given = self.give(site, call, sizes, mask, device)[0].flatten(0, 1)
        if site.called.training and in_checkpoint():
            if site.name in self.waiting and not self.to_run_again[site.name].equal(given):
                raise RuntimeError(
                    f"{site.name!r} runs under activation checkpointing on two batches of other padding before a "
                    "backward, which could not tell them apart: call the backward of the first one first"
                )
            self.to_run_again[site.name] = given
            self.waiting.add(site.name)
        return given

    def check(self, site: ChoiceSite, call: SequencesCall, shape: tuple[int, int], mask: Tensor | None) -> None:
        """Check that a forward has as many sequences and tokens as the records; in a graph only sequences."""
        lengths = self.lengths[site.name]
        if shape[0] != len(lengths):
            raise ValueError(
                f"a forward of {shape[0]} sequences came to {site.name!r}, the records have {len(lengths)}: "
                "records.select(...) takes the sequences of a batch"
            )
        if torch.compiler.is_compiling():
            return
        if site.called.training and in_checkpoint() and (not begins(call.seen) or not torch.is_grad_enabled()):
            raise RuntimeError(
                f"{site.name!r} runs under reentrant checkpointing, or under checkpointing with a cache, where a "
                "backward would not know what to replay: pass use_reentrant=False and use_cache=False"
            )
        if any(found is mask and fit == lengths for found, fit in call.checked):
            return
        real = [shape[1]] * shape[0] if mask is None else mask.sum(dim=-1).tolist()
        for i, (length, new, read) in enumerate(zip(lengths, real, read_before(call.seen, shape[0]), strict=True)):
            short = new + read < length and call.cache is None
            if short or (new + read > length and self.beyond == "error"):
                remedy = "records.select(sequences, tokens) cuts them" if short else 'beyond="choose" lets gates choose'
                raise ValueError(
                    f"sequence {i} has {new + read} real tokens at {site.name!r}, its record has {length}: {remedy}"
                )
        call.checked.append((mask, lengths))

    def after(self, site: ChoiceSite, call: SequencesCall, output: Any, more: Any) -> None:
        """Have a backward after the context raise an error: without hooks, recomputed gates would choose themselves."""
        if torch.compiler.is_compiling() or not in_checkpoint():
            return
        for part in output if isinstance(output, tuple) else (getattr(output, "weight", output),):
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(partial(self.refuse_if_closed, site.name))

    after_block = after

    def refuse_if_closed(self, name: str, grad: Tensor) -> None:
        if self.closed:
            raise RuntimeError(
                f"activation checkpointing runs {name!r} again after replay_routing was left, so that it would choose "
                "by itself: call the backward inside the context"
            )


def tables_of(site: ChoiceSite, layer: str, records: RoutingRecords) -> list[Tensor]:
    """The choices `(b, s + 1, k)` of a gate, int64, and their weights if there are any, after a check that they fit.
    Behind the end of a record stands what means "the gate's own"."""
    of = f"{site.name!r}" + ("" if layer == site.name else f" (the records' {layer!r})")
    if not site.site.external and GIVEN not in reads_of(site.site.gate):
        raise ValueError(
            f"{of} is a {site.site.kind}, which cannot be given choices: let its `decide` choose by "
            f"`self.merge_given(tokens, expert)`, and add {GIVEN!r} to its `reads`"
        )
    k = {record.shape[1] for record in records[layer]} - {site.k}
    if k:
        raise ValueError(f"{of} makes {site.k} choices for a token, the records have {k.pop()}")
    if (e := records.num_experts(layer)) not in (None, site.num_experts):
        raise ValueError(f"{of} has {site.num_experts} experts, the records are of {e}")
    experts = padded([record.long() for record in records[layer]], site.k, LIVE)
    try:
        check_given(experts, site.num_experts)
    except ValueError as error:
        raise ValueError(f"{of}: in the records, {error}") from error
    if site.site.external and bool(((experts < 0) & (experts != LIVE)).any()):
        raise ValueError(f"{of} makes {site.k} choices for every token, in the records some are not made")
    if records.weights is None:
        return [experts]
    weights = padded(records.weights[layer], site.k, torch.nan)
    return [experts, weights.masked_fill(experts == LIVE, torch.nan)]


def padded(records: list[Tensor], k: int, filler: float) -> Tensor:
    """The record `(s, k)` of each sequence in one tensor `(b, s + 1, k)`."""
    longer = torch.full((max([0, *map(len, records)]) + 1, k), filler)
    return pad_sequence([*records, longer], batch_first=True, padding_value=filler)[:-1]
