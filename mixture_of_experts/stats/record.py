"""`Record`: what a gate decided in one step or several, as numbers to read, log and print.

A statistic is one attribute of `Record`, with how it is summed up and shown, and a line in `measure`.

Axes: r forwards, w numbers of a forward, e experts (`(eo, ei)` on the second level of a hierarchy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_origin, get_type_hints

import torch
from torch import Tensor

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.losses import load_of


class Statistic(NamedTuple):
    """How a statistic is summed up and shown; `measure` has its numbers in one forward.

    Attributes:
        by: how its numbers are summed up: "sum"; "most", the largest instead; "expert", a sum for each expert; or the
            name of another statistic, by whose sum the sum is divided.
        columns: its columns in the summary and in the report: formats by headers.
    """

    by: str
    columns: Mapping[str, str] = {}


@dataclass(frozen=True)
class Record:
    """What one gate decided in one step, or in several. Masked tokens do not count; an empty mean is 0.

    Attributes:
        layer: path of the gate in the model.
        step: number of the step, from 0; -1 for all steps together.
        forwards: number of forwards of the gate in this record.
        losses: the losses by name, without coefficients: "balance", "z" and others of the gate; means over forwards.
        tokens: number of tokens that took part; on a second level, of choices that level one handed on.
        groups: number of groups of tokens that requested any expert.
        requested: number of choices of each expert before capacity, of the load's shape.
        choices_per_token: mean number of a token's choices before capacity; it varies for routers such as `TopPGating`.
        imbalance: requests of a group's most requested expert over the group's mean, 1 if balanced; mean over groups.
            If sequences crowd on different experts, `requested` looks balanced, but this number does not.
        worst_imbalance: imbalance of the worst group.
        load: `(e,)` int64, number of choices that each expert computes. For the second level of a hierarchy it is
            `(eo, ei)`, the load of the layer's experts.
        dropped: share of the requested choices that found no slot.
        unavoidable: share of the requested choices beyond all slots of their group, which no load avoids. `Top2Gating`
            at capacity factor 1.25 has 1.25 slots for the 2 choices of a token, so even a balanced load drops some.
        unseen: share of the tokens that no expert computes.
        entropy: mean entropy of a token's probabilities, in nats: 0 is certain, ln(e) uniform.
        confidence: mean of a token's largest probability.
    """

    layer: str
    step: int
    forwards: int
    losses: Mapping[str, float]
    tokens: Annotated[int, Statistic("sum", {"tokens": "{tokens}"})]
    groups: Annotated[int, Statistic("sum")]
    requested: Annotated[Tensor, Statistic("expert", {"requested": "{requested}"})]
    choices_per_token: Annotated[float, Statistic("tokens")]
    imbalance: Annotated[float, Statistic("groups", {"in a group": "{imbalance:.2f}, {worst_imbalance:.2f}"})]
    worst_imbalance: Annotated[float, Statistic("most")]
    load: Annotated[Tensor, Statistic("expert", {"load": "{load}", "dead": "{dead}"})]
    dropped: Annotated[float, Statistic("requested", {"dropped": "{dropped:.1%}"})]
    unavoidable: Annotated[float, Statistic("requested", {"unavoidable": "{unavoidable:.1%}"})]
    unseen: Annotated[float, Statistic("tokens", {"unseen": "{unseen:.1%}"})]
    entropy: Annotated[float, Statistic("tokens", {"entropy": "{entropy:.2f} of {most_entropy:.2f}"})]
    confidence: Annotated[float, Statistic("tokens", {"confidence": "{confidence:.2f}"})]

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
    def dead(self) -> list[Any]:
        """Experts that computed no token: their numbers, or pairs (outer, inner)."""
        index = (self.load == 0).nonzero()
        return index.flatten().tolist() if self.load.ndim == 1 else index.tolist()

    def scalars(self) -> dict[str, float]:
        """The single numbers, for a logger."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, float)},
            "max_load": float(self.relative_load.max()),
            "max_requested": float(self.relative_requested.max()),
            "dead": len(self.dead),
            **{f"loss/{name}": value for name, value in self.losses.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole record, in types that JSON knows; a number that is NaN or infinite is None."""
        return known_to_json({**vars(self), "dead": self.dead})


def known_to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: known_to_json(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.tolist() if isinstance(value, Tensor) else value


STATISTICS: dict[str, Statistic] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Record, include_extras=True).items()
    if get_origin(hint) is Annotated
}


def sizes_of(shape: Sequence[int]) -> list[int]:
    """How many numbers a forward has of each statistic, from the shape of its load."""
    return [math.prod(shape) if statistic.by == "expert" else 1 for statistic in STATISTICS.values()]


def numbers_of(routing: Routing, importance: Tensor | None) -> Tensor:
    """The numbers of one forward for all statistics, `(w,)` float32."""
    measured, found = measure(routing, importance), []
    for name, (by, _) in STATISTICS.items():
        numbers = measured[name]
        if by == "most":
            numbers = torch.nn.functional.pad(numbers.flatten(), (1, 0)).amax()  # there may be no group
        else:
            numbers = numbers.sum(dim=-2) if by == "expert" else numbers.sum()
        found.append(numbers.float().flatten())
    return torch.cat(found)


def statistics_of(numbers: Tensor, shape: Sequence[int]) -> dict[str, Any]:
    """All statistics of some forwards, from their numbers `(r, w)` and the shape of the load."""
    parts, found = dict(zip(STATISTICS, numbers.split(sizes_of(shape), dim=1), strict=True)), {}
    for name, (by, _) in STATISTICS.items():
        total = parts[name].sum(dim=0)
        if by == "expert":
            found[name] = total.to(torch.int64).view(*shape)
        elif by == "most":
            found[name] = max(parts[name].flatten().tolist(), default=0.0)
        else:
            found[name] = int(total) if by == "sum" else float(total / parts[by].sum().clamp(min=1))
    return found


def cells_of(total: Record, steps: Sequence[Record]) -> dict[str, str]:
    """A gate's line in the summary and in the report, by headers: all steps together, and the worst of them."""
    first = {"gate": total.layer, "experts": "x".join(map(str, total.load.shape)), "forwards": f"{total.forwards}"}
    values = vars(total) | {"dead": len(total.dead), "most_entropy": math.log(total.load.shape[-1])}
    values |= {"requested": span(total.relative_requested), "load": span(total.relative_load)}
    worst, at = max(((float(record.relative_requested.max()), -record.step) for record in steps), default=(0, 0))
    rest = {
        **{header: form.format(**values) for _, columns in STATISTICS.values() for header, form in columns.items()},
        "worst step": f"{worst:.2f} at {-at}",
        "losses": ", ".join(f"{name} {value:.3g}" for name, value in total.losses.items()),
    }
    return first | (rest if total.forwards else dict.fromkeys(rest, "-"))


def relative(counts: Tensor) -> Tensor:
    """Counts over their mean, float64; zeros if all counts are 0."""
    return counts / counts.to(torch.float64).mean().clamp(min=1 / counts.numel())


def span(values: Tensor) -> str:
    return f"{float(values.min()):.2f}..{float(values.max()):.2f}"


# One forward, on its device and without a host sync; routers of level two stand in front: `...`


def measure(routing: Routing, importance: Tensor | None) -> dict[str, Tensor]:
    """The numbers of every statistic of `Record` in one forward, by its name; they are summed up.

    Those of experts are `(..., b, e)`; others are of groups, tokens or choices, in any shape. A token takes part if it
    is real and makes a choice.
    """
    e, seen, probs = routing.num_experts, computed_tokens(routing), routing.probs.detach().float()
    requested, load = routing.queued, load_of(routing.expert, routing.kept, e)
    of_group = requested.sum(dim=-1, keepdim=True)
    limit = routing.capacity if routing.limit is None else routing.limit.unsqueeze(-1)
    limit = of_group if limit is None else limit
    imbalance = requested.amax(dim=-1).float() * e / of_group.squeeze(-1).clamp(min=1)
    tokens = torch.ones_like(seen) if routing.real is None else routing.real
    tokens = tokens if importance is None else tokens & (importance > 0)
    # -p log p in the memory of the clamped p takes a third of the time of torch.special.entr
    entropy = -probs.clamp(min=1e-30).log_().mul_(probs).sum(dim=-1)
    return {
        "tokens": tokens,
        "groups": imbalance > 0,
        "requested": requested,
        "choices_per_token": requested,
        "imbalance": imbalance,  # 0 in a group without requests
        "worst_imbalance": imbalance,
        "load": load.unsqueeze(-2),
        "dropped": (requested - limit).clamp(min=0),
        "unavoidable": (of_group - e * limit).clamp(min=0),
        "unseen": tokens & ~seen,
        "entropy": torch.where(tokens, entropy, 0.0),
        "confidence": torch.where(tokens, probs.amax(dim=-1), 0.0),
    }


def computed_tokens(routing: Routing) -> Tensor:
    """`(..., b, n)` bool, the tokens that an expert computes."""
    if routing.k is not None:
        return routing.kept.unflatten(-1, (routing.num_tokens, routing.k)).any(dim=-1)
    zeros = torch.zeros_like(routing.probs[..., 0], dtype=torch.int64)
    return zeros.scatter_add(-1, routing.token, routing.kept.to(torch.int64)) > 0
