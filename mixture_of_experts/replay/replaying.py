"""Replays recorded choices: hooks pass the choices to the gates, which compute the weights from live scores.

Axes: b (sequences), n (tokens per forward pass), s (tokens in the longest record), k (choices per token).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixture_of_experts.dispatch.queues import find_positions_in_runs
from mixture_of_experts.gating import get_side_inputs
from mixture_of_experts.gating.overrides import GIVEN, KEEP_ROUTER_CHOICE, check_overrides
from mixture_of_experts.replay.choice_hooks import ChoiceHooks
from mixture_of_experts.replay.records import RoutingRecords, previous_lengths, starts_sequences
from mixture_of_experts.replay.sequences import RoutingPoint, SequenceCall, find_routing_points
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.support.checks import check_choice
from mixture_of_experts.support.private_torch import assert_in_graph
from mixture_of_experts.support.tracing import is_in_activation_checkpoint
from mixture_of_experts.whole_model.router_discovery import GateSelection

BeyondMode = Literal["error", "choose"]


@contextmanager
def replay_routing(
    model: nn.Module,
    records: RoutingRecords,
    *,
    beyond: BeyondMode = "error",
    gates: GateSelection | None = None,
) -> Iterator[None]:
    """Context manager that makes every gate in `model` choose the experts in `records`.

    Each gate still computes differentiable weights for these experts from its live scores. Blocks from other libraries
    compute the weights in their own code. If the records contain weights, the recorded weights replace the live weights
    bit for bit, and gradients are passed to the live weights. Losses are computed from the recorded choices. Records
    exclude padding, so padding may be in a different position or absent during a replay.

    Each forward pass in the current thread must contain all sequences of the records, in the same order. Use
    `records.select` to create records for another batch. A forward pass that continues a cache must contain the tokens
    that follow the cached tokens. With activation checkpointing, also run the backward pass inside the context.

    Args:
        model: the module that you call.
        records: routing records of this model or a similar model. Gates are matched by name, or by order if their names
            differ.
        beyond: how to handle tokens past the end of a sequence's record. "error" raises an error, and "choose" lets the
            gate choose. Records never include the last token of a completion, because no engine has processed it.
        gates: see `record_routing`.

    Raises:
        ValueError: the model and the records differ in the number of gates, choices or experts, or a gate does not
            accept choices. This error is raised when the context is entered. It is also raised in a forward pass,
            before the first gate runs, if the number of sequences or tokens differs from the records.
        TypeError: a gate does not make k choices for each token (expert choice). This error is also raised during
            a forward pass if a block from another library does not choose experts with `torch.topk`.
        RuntimeError: a forward pass runs under reentrant checkpointing or outside of `model`, or a backward pass
            recomputes gates after the context has exited.

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
    check_choice("beyond", beyond, get_args(BeyondMode))
    if not isinstance(records, RoutingRecords):
        raise TypeError(
            f"expected records to be RoutingRecords, as yielded by record_routing, but got a {type(records).__name__}; "
            "use RoutingRecords.load for a file, or RoutingRecords(...) for a dict"
        )
    points = find_routing_points(model, "replay_routing", gates, records.weights is not None)
    replay = RoutingReplayer(points, records, beyond)
    with Attachments() as hooks:
        hooks.callback(replay.close)
        replay.attach_hooks(hooks)
        yield


class RoutingReplayer(ChoiceHooks):
    """Supplies recorded choices to the gates of a model. Instances are created by `replay_routing`."""

    is_replay: ClassVar[bool] = True
    beyond: BeyondMode
    is_closed: bool

    def __init__(self, points: list[RoutingPoint], records: RoutingRecords, beyond: BeyondMode) -> None:
        super().__init__(points)
        self.beyond, self.is_closed = beyond, False
        layers, names = records.layers, [point.name for point in points]
        if len(layers) != len(points):
            raise ValueError(
                f"the model has {len(points)} gates ({', '.join(names)}), but the records have {len(layers)} "
                f"({', '.join(layers)})"
            )
        self.record_lengths: dict[str, list[int]] = {}  # sequence lengths, keyed by gate
        # choices `(b, s + 1, k)`, and their weights if recorded, keyed by gate
        self.choice_tables: dict[str, list[Tensor]] = {}
        for point, layer in zip(points, names if set(layers) == set(names) else layers, strict=True):
            self.record_lengths[point.name] = records.lengths(layer)
            self.choice_tables[point.name] = build_choice_tables(point, layer, records)
        self.recompute_choices: dict[str, Tensor] = {}  # choices of blocks that a backward pass may recompute
        self.awaiting_backward: set[str] = set()  # blocks that no backward pass has recomputed yet

    def close(self) -> None:
        self.is_closed = True

    def supply_choices(
        self, point: RoutingPoint, call: SequenceCall | None, shape: tuple[int, int], mask: Tensor | None, device: Any
    ) -> list[Tensor]:
        """Return the choices `(b, n, k)` in int64 for the tokens of a forward pass, followed by the choices' weights if
        they were recorded. `mask` is the mask returned by `RoutingPoint.read_inputs`."""
        tables, seen = self.choice_tables[point.name], 0 if call is None else call.num_seen
        if call is not None:
            self.check_forward(point, call, shape, mask)
            call.choices[point.name] = None
        if tables[0].device != device:
            tables[:] = [table.to(device) for table in tables]
        if mask is not None and mask.dtype != torch.bool:  # packed rows
            mask = mask.to(device)
            place = find_positions_in_runs(mask.flatten()).view(shape).clamp(max=tables[0].shape[1] - 1)
            return [table[mask.clamp(min=0), place] for table in tables]
        if mask is None:
            index = torch.arange(shape[1], device=device).expand(shape)
        else:
            index = mask.to(device).cumsum(dim=-1) - 1
        index = index + (seen.to(device).unsqueeze(-1) if isinstance(seen, Tensor) else seen)
        inside = index.clamp(0, tables[0].shape[1] - 1).unsqueeze(-1).expand(*shape, point.k)
        return [table.gather(1, inside) for table in tables]

    def supply_block_choices(self, point: RoutingPoint, call: SequenceCall | None, device: Any) -> Tensor:
        """Return the choices `(b n, k)` in int64 for a block's tokens. During recomputation, return the choices of the
        block's last forward pass."""
        if call is None:
            self.awaiting_backward.discard(point.name)
            return self.recompute_choices[point.name]
        sizes, mask = call.entered_gates[point.name]
        given = self.supply_choices(point, call, sizes, mask, device)[0].flatten(0, 1)
        if point.hook_target.training and is_in_activation_checkpoint():
            if point.name in self.awaiting_backward and not self.recompute_choices[point.name].equal(given):
                raise RuntimeError(
                    "activation checkpointing cannot distinguish two batches with different padding at "
                    f"{point.name!r}; run the backward pass of the first batch before the forward pass of the second"
                )
            self.recompute_choices[point.name] = given
            self.awaiting_backward.add(point.name)
        return given

    def check_forward(
        self, point: RoutingPoint, call: SequenceCall, shape: tuple[int, int], mask: Tensor | None
    ) -> None:
        """Check that the numbers of sequences and tokens in a forward pass match the records. In a compiled graph,
        check only the number of sequences."""
        lengths = self.record_lengths[point.name]
        packed = None if mask is None or mask.dtype == torch.bool else mask  # sequence number of each token
        if packed is None:
            self.check_number_of_sequences(point, shape[0], lengths)
        if torch.compiler.is_compiling():
            if packed is not None:  # a graph cannot read the number of documents
                assert_in_graph(
                    packed.max() + 1 == len(lengths),
                    f"the number of documents in the packed rows at {point.name!r} differs from that of the records",
                )
            return
        if (
            point.hook_target.training
            and is_in_activation_checkpoint()
            and (not starts_sequences(call.num_seen) or not torch.is_grad_enabled())
        ):
            raise RuntimeError(
                f"{point.name!r} runs under reentrant checkpointing, or under checkpointing with a cache, so a "
                "backward pass cannot determine what to replay; pass use_reentrant=False and use_cache=False"
            )
        if any(found is mask and fit == lengths for found, fit in call.checked_masks):
            return
        if packed is not None:
            real = packed[packed >= 0].bincount().tolist()
            self.check_number_of_sequences(point, len(real), lengths)
        else:
            real = [shape[1]] * shape[0] if mask is None else mask.sum(dim=-1).tolist()
        for i, (length, new, read) in enumerate(
            zip(lengths, real, previous_lengths(call.num_seen, len(real)), strict=True)
        ):
            short = new + read < length and call.cache is None
            if short or (new + read > length and self.beyond == "error"):
                remedy = "truncate it with records.select(sequences, tokens)" if short else 'pass beyond="choose"'
                raise ValueError(
                    f"sequence {i} has {new + read} real tokens at {point.name!r}, but its record has {length}; "
                    f"{remedy}"
                )
        call.checked_masks.append((mask, lengths))

    def check_number_of_sequences(self, point: RoutingPoint, number: int, lengths: list[int]) -> None:
        if number != len(lengths):
            raise ValueError(
                f"the forward pass has {number} sequences at {point.name!r}, but the records have {len(lengths)}; "
                "select the sequences of a batch with records.select(...)"
            )

    def on_choices(self, point: RoutingPoint, call: SequenceCall, output: Any, more: Any) -> None:
        """Make backward passes raise an error after the context has exited, because recomputed gates would then make
        their own choices."""
        if torch.compiler.is_compiling() or not is_in_activation_checkpoint():
            return
        for part in output if isinstance(output, tuple) else (getattr(output, "weight", output),):
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(partial(self.raise_if_closed, point.name))

    on_block_choices = on_choices

    def raise_if_closed(self, name: str, grad: Tensor) -> None:
        if self.is_closed:
            raise RuntimeError(
                f"activation checkpointing recomputes {name!r} after replay_routing has exited, so its choices would "
                "not be replayed; run the backward pass inside the context"
            )


def build_choice_tables(point: RoutingPoint, layer: str, records: RoutingRecords) -> list[Tensor]:
    """Check that the records match a gate. Return the gate's choices `(b, s + 1, k)` in int64, followed by the choices'
    weights if they were recorded. Past the end of a record, choices are `KEEP_ROUTER_CHOICE` and weights are NaN."""
    prefix = f"{point.name!r}" + ("" if layer == point.name else f" ({layer!r} in the records)")
    if not point.router.is_external and GIVEN not in get_side_inputs(point.router.gate):
        raise ValueError(
            f"{prefix} is a {point.router.class_name}, which does not accept external choices; in its `decide` method, "
            f"choose experts with `self.apply_overrides(tokens, expert)`, and add {GIVEN!r} to its `side_inputs`"
        )
    k = {record.shape[1] for record in records[layer]} - {point.k}
    if k:
        raise ValueError(f"{prefix} makes {point.k} choices per token, but the records have {k.pop()}")
    if (e := records.num_experts(layer)) not in (None, point.num_experts):
        raise ValueError(f"{prefix} has {point.num_experts} experts, but the records have {e}")
    experts = pad_records([record.long() for record in records[layer]], point.k, KEEP_ROUTER_CHOICE)
    try:
        check_overrides(experts, point.num_experts)
    except ValueError as error:
        raise ValueError(f"invalid records for {prefix}: {error}") from error
    if point.router.is_external and bool(((experts < 0) & (experts != KEEP_ROUTER_CHOICE)).any()):
        raise ValueError(f"{prefix} makes {point.k} choices for every token, but the records lack some of them")
    if records.weights is None:
        return [experts]
    weights = pad_records(records.weights[layer], point.k, torch.nan)
    return [experts, weights.masked_fill(experts == KEEP_ROUTER_CHOICE, torch.nan)]


def pad_records(records: list[Tensor], k: int, filler: float) -> Tensor:
    """Pad the records `(s, k)` of all sequences with `filler`, and stack them into one tensor `(b, s + 1, k)`."""
    longest = torch.full((max([0, *map(len, records)]) + 1, k), filler)
    return pad_sequence([*records, longest], batch_first=True, padding_value=filler)[:-1]
