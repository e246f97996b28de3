"""What was recorded of a gate, as numbers to read, log and print.

Axes: e experts (`(eo, ei)` on the second level of a hierarchy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """What one gate decided in one step (or several). Masked tokens appear in nothing; an empty mean is 0.

    Attributes:
        layer: path of the gate in the model.
        step: number of the step, from 0; -1 for all steps together.
        forwards: forwards of the gate that are summed up here.
        load: `(e,)` int64 choices that each expert computes; `(eo, ei)` for the second level of a hierarchy, where it
            is the load of the layer's experts.
        requested: the same before capacity.
        tokens: tokens that took part; on a second level the choices that level one handed on.
        dropped: share of the requested choices that found no slot.
        unseen: share of the tokens that no expert computes.
        entropy: mean entropy of a token's probabilities, in nats: 0 is certain, ln(e) uniform.
        confidence: mean of a token's largest probability.
        losses: the losses by name, without coefficients: the parts of the balancing loss and "z"; means over forwards.
        lost_in_layer: second level only: tokens of the layer that no expert computes, whichever level dropped them;
            None in compiled forwards.
        outer: second level only: the same for each outer expert (without losses).
    """

    layer: str
    step: int
    forwards: int
    load: Tensor
    requested: Tensor
    tokens: int
    dropped: float
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
        """The same of the requested choices: what the router wants, where capacity evens the load out."""
        return relative(self.requested)

    @property
    def dead(self) -> list[Any]:
        """Experts that computed no token: their numbers, or pairs (outer, inner)."""
        index = (self.load == 0).nonzero()
        return index.flatten().tolist() if self.load.ndim == 1 else index.tolist()

    def scalars(self) -> dict[str, float]:
        """The single numbers, for a logger."""
        names = ("dropped", "unseen", "entropy", "confidence")
        return {
            **{name: getattr(self, name) for name in names},
            "max_load": float(self.relative_load.max()),
            "max_requested": float(self.relative_requested.max()),
            "dead": len(self.dead),
            **{f"loss/{name}": value for name, value in self.losses.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields.update(load=self.load.tolist(), requested=self.requested.tolist(), losses=dict(self.losses))
        fields["outer"] = [record.to_dict() for record in self.outer]
        if not self.outer:  # one level
            del fields["outer"], fields["lost_in_layer"]
        return {**fields, "dead": self.dead}


def relative(counts: Tensor) -> Tensor:
    """Counts over their mean, float64; zeros if there is nothing."""
    return counts / counts.to(torch.float64).mean().clamp(min=1 / counts.numel())


def summed_up(
    layer: str, step: int, forwards: int, load: Tensor, requested: Tensor, sums: Tensor, **more: Any
) -> Record:
    """A record from the sums `(5,)` of a router, or of all routers of a gate."""
    tokens, unseen, without_slot, entropy, confidence = sums.tolist()
    count = max(tokens, 1)
    return Record(
        layer=layer,
        step=step,
        forwards=forwards,
        load=load,
        requested=requested,
        tokens=int(tokens),
        dropped=without_slot / max(int(requested.sum()), 1),
        unseen=unseen / count,
        entropy=entropy / count,
        confidence=confidence / count,
        **{"losses": {}, **more},
    )


SUMMARY_HEADER = (
    *("gate", "experts", "forwards", "tokens", "requested", "load", "dead"),
    *("dropped", "unseen", "entropy", "confidence", "losses"),
)


def summary_cells(record: Record) -> tuple[str, ...]:
    """A line of the summary. Loads are the least and the most, relative to a balanced one."""
    experts = "x".join(map(str, record.load.shape))
    if not record.forwards:
        return (record.layer, experts, "0", *["-"] * (len(SUMMARY_HEADER) - 3))
    return (
        record.layer,
        experts,
        str(record.forwards),
        str(record.tokens),
        span(record.relative_requested),
        span(record.relative_load),
        str(len(record.dead)),
        f"{record.dropped:.1%}",
        f"{record.unseen:.1%}",
        f"{record.entropy:.2f} of {math.log(record.load.shape[-1]):.2f}",
        f"{record.confidence:.2f}",
        ", ".join(f"{name} {value:.3g}" for name, value in record.losses.items()),
    )


def span(values: Tensor) -> str:
    return f"{float(values.min()):.2f}..{float(values.max()):.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as lines of aligned columns; first and last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
