"""`Record`: what a gate decided in one step or several, as numbers to read, log and print.

Axes: e experts (`(eo, ei)` on the second level of a hierarchy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.stats.measures import SUMS


@dataclass(frozen=True)
class Record:
    """What one gate decided in one step, or in several. Masked tokens do not count; an empty mean is 0.

    Attributes:
        layer: path of the gate in the model.
        step: number of the step, from 0; -1 for all steps together.
        forwards: number of forwards of the gate in this record.
        load: `(e,)` int64, number of choices that each expert computes. For the second level of a hierarchy it is
            `(eo, ei)`, the load of the layer's experts.
        requested: number of choices of each expert before capacity, of the load's shape.
        tokens: number of tokens that took part; on a second level, of choices that level one handed on.
        dropped: share of the requested choices that found no slot.
        unavoidable: share of the requested choices beyond all slots of their group, which no load avoids. `Top2Gating`
            at capacity factor 1.25 has 1.25 slots for the 2 choices of a token, so even a balanced load drops some.
        imbalance: requests of a group's most requested expert over the group's mean, 1 if balanced; mean over groups.
            If sequences crowd on different experts, `requested` looks balanced, but this number does not.
        worst_imbalance: imbalance of the worst group.
        unseen: share of the tokens that no expert computes.
        entropy: mean entropy of a token's probabilities, in nats: 0 is certain, ln(e) uniform.
        confidence: mean of a token's largest probability.
        losses: the losses by name, without coefficients: "balance", "z" and others of the gate; means over forwards.
        lost_in_layer: second level only: number of the layer's tokens that no expert computes, whichever level dropped
            them; None in compiled forwards.
        outer: second level only: a record of each outer expert (without losses).
    """

    layer: str
    step: int
    forwards: int
    load: Tensor
    requested: Tensor
    tokens: int
    dropped: float
    unavoidable: float
    imbalance: float
    worst_imbalance: float
    unseen: float
    entropy: float
    confidence: float
    losses: Mapping[str, float]
    lost_in_layer: int | None = None
    outer: tuple[Record, ...] = ()

    @property
    def relative_load(self) -> Tensor:
        """Load over mean load, float64 of the load's shape: 1 is balanced, 0 an expert without a token."""
        return relative(self.load)

    @property
    def relative_requested(self) -> Tensor:
        """Requested choices over their mean, float64 of the load's shape.

        A collapse of the router shows here; capacity evens `load` out.
        """
        return relative(self.requested)

    @property
    def choices_per_token(self) -> float:
        """Mean number of choices of a token before capacity; it varies for routers such as `TopPGating`."""
        return float(self.requested.sum()) / max(self.tokens, 1)

    @property
    def dead(self) -> list[Any]:
        """Experts that computed no token: their numbers, or pairs (outer, inner)."""
        index = (self.load == 0).nonzero()
        return index.flatten().tolist() if self.load.ndim == 1 else index.tolist()

    def scalars(self) -> dict[str, float]:
        """The single numbers, for a logger."""
        names = ("dropped", "unavoidable", "imbalance", "worst_imbalance", "unseen", "entropy", "confidence")
        return {
            **{name: getattr(self, name) for name in names},
            "max_load": float(self.relative_load.max()),
            "max_requested": float(self.relative_requested.max()),
            "dead": len(self.dead),
            "choices_per_token": self.choices_per_token,
            **{f"loss/{name}": value for name, value in self.losses.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole record, in types that JSON knows; a number that is NaN or infinite is None."""
        fields = {name: known_to_json(getattr(self, name)) for name in self.__dataclass_fields__}
        losses = {name: known_to_json(value) for name, value in self.losses.items()}
        fields.update(load=self.load.tolist(), requested=self.requested.tolist(), losses=losses)
        fields["outer"] = [record.to_dict() for record in self.outer]
        if not self.outer:  # one level
            del fields["outer"], fields["lost_in_layer"]
        return {**fields, "dead": self.dead, "choices_per_token": self.choices_per_token}


def known_to_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def relative(counts: Tensor) -> Tensor:
    """Counts over their mean, float64; zeros if all counts are 0."""
    return counts / counts.to(torch.float64).mean().clamp(min=1 / counts.numel())


def summed_up(
    layer: str, step: int, forwards: int, load: Tensor, requested: Tensor, sums: Tensor, worst: Tensor, **more: Any
) -> Record:
    """A record from the `SUMS` and the worst imbalances of one router, or of all routers of a gate."""
    of = dict(zip(SUMS, sums.tolist(), strict=True))
    tokens, choices = max(of["tokens"], 1), max(int(requested.sum()), 1)
    return Record(
        layer=layer,
        step=step,
        forwards=forwards,
        load=load,
        requested=requested,
        tokens=int(of["tokens"]),
        dropped=of["dropped"] / choices,
        unavoidable=of["unavoidable"] / choices,
        imbalance=of["imbalance"] / max(of["groups"], 1),
        worst_imbalance=float(worst.max()),
        unseen=of["unseen"] / tokens,
        entropy=of["entropy"] / tokens,
        confidence=of["confidence"] / tokens,
        **{"losses": {}, **more},
    )


SUMMARY_HEADER = (
    *("gate", "experts", "forwards", "tokens", "requested", "worst step", "in a group", "load", "dead"),
    *("dropped", "unseen", "entropy", "confidence", "losses"),
)
HIGH_DROPS = 0.1  # the summary warns above this share of avoidable drops
HIGH_LOAD = 2.0  # and above this load of an expert in late steps, relative to a balanced load


def summary_cells(total: Record, steps: Sequence[Record]) -> tuple[str, ...]:
    """The cells of a gate's line in the summary. Loads are the least and the most, relative to a balanced load."""
    experts = "x".join(map(str, total.load.shape))
    if not total.forwards:
        return (total.layer, experts, "0", *["-"] * (len(SUMMARY_HEADER) - 3))
    worst, at = max((float(record.relative_requested.max()), -record.step) for record in steps)
    return (
        total.layer,
        experts,
        str(total.forwards),
        str(total.tokens),
        span(total.relative_requested),
        f"{worst:.2f} at {-at}",
        f"{total.imbalance:.2f}, {total.worst_imbalance:.2f}",
        span(total.relative_load),
        str(len(total.dead)),
        f"{total.dropped:.1%}",
        f"{total.unseen:.1%}",
        f"{total.entropy:.2f} of {math.log(total.load.shape[-1]):.2f}",
        f"{total.confidence:.2f}",
        ", ".join(f"{name} {value:.3g}" for name, value in total.losses.items()),
    )


def warning_of_nan(layer: str, step: int) -> str:
    """What is said of a gate whose probabilities were NaN, first in that step."""
    return (
        f"warning: {layer} computed probabilities that are NaN, first in step {step}: its weights or its inputs are "
        "not finite. Go back to a checkpoint from before that step"
    )


def warnings_of(total: Record, late: Record, when: str) -> list[str]:
    """What a reader of a gate's records should look at.

    Args:
        total: all steps together.
        late, when: the last quarter of them, and how to call it.
    """
    found = []
    if total.dropped - total.unavoidable > HIGH_DROPS:
        found.append(
            f"warning: {total.layer} dropped {total.dropped:.0%} of its choices; of a balanced load it would have "
            f"dropped {total.unavoidable:.0%}. In a group the most requested expert has {total.imbalance:.1f} times "
            "its share: raise loss_coef, the capacity factor or group_size"
        )
    most, mean = late.requested.max(), late.requested.to(torch.float64).mean()
    if most > HIGH_LOAD * mean + 5 * mean.sqrt():  # what chance adds to a few choices is no sign
        expert = ".".join(str(int(i)) for i in (late.requested == most).nonzero()[0])
        found.append(
            f"warning: {total.layer}: expert {expert} was requested {most / mean:.1f} times a balanced load "
            f"{when}: raise loss_coef, or balance by an expert bias"
        )
    return found


def in_the_last(steps: int) -> str:
    return "in the last step" if steps == 1 else f"in the last {steps} steps"


def span(values: Tensor) -> str:
    return f"{float(values.min()):.2f}..{float(values.max()):.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as lines of aligned columns; the first and the last column align left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
