"""Defines `Record`, which holds the statistics of a gate's decisions over one or more steps.

Each statistic is an attribute of `Record`. `measure_routing` measures a forward pass, `make_record` aggregates forward
passes, and `format_cells` formats the result.

Axes: r (forward passes), w (values per forward pass), e (experts, or `(eo, ei)` on the second level of a hierarchy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.losses import count_expert_load

NUM_SUMS = 8  # number of scalar statistics that are summed over forward passes


@dataclass(frozen=True)
class Record:
    """The routing statistics of one gate over one or more steps. Masked tokens are not counted. Means over empty sets
    are 0.

    Attributes:
        layer: path of the gate in the model.
        step: step number, starting at 0, or -1 if the record combines all steps.
        forwards: number of the gate's forward passes in this record.
        losses: the gate's losses before coefficients are applied, keyed by name (such as "balance" and "z"), each
            averaged over the forward passes that reported it.
        tokens: number of tokens that took part in routing. On the second level of a hierarchy, this is the number of
            choices that the first level forwarded.
        groups: number of token groups that requested at least one expert.
        requested: number of times that each expert is chosen before capacity is applied, a tensor of the same shape as
            `load`.
        choices_per_token: mean number of choices per token before capacity is applied. This number varies for routers
            such as `TopPGating`.
        imbalance: ratio of the maximum to the mean number of requests per expert in a token group, averaged over
            groups. A value of 1 means a balanced load. If each sequence favors different experts, `requested` looks
            balanced, but `imbalance` does not.
        worst_imbalance: the largest imbalance of any group.
        load: number of choices that each expert computes, an int64 tensor of shape `(e,)`. On the second level of a
            hierarchy, its shape is `(eo, ei)`, with one entry for each expert in the layer.
        dropped: fraction of the requested choices that were dropped because their expert had no free slot.
        unavoidable: fraction of the requested choices that exceed the total number of slots in their token group and
            would be dropped under any load distribution. With a capacity factor of 1.25, `Top2Gating` has 1.25 slots
            per token for 2 choices, so it drops some choices even if the load is balanced.
        unseen: fraction of the tokens that no expert computes.
        entropy: mean entropy of a token's probabilities, in nats, from 0 (certain) to ln(e) (uniform).
        confidence: largest probability of a token, averaged over tokens.
    """

    layer: str
    step: int
    forwards: int
    losses: Mapping[str, float]
    tokens: int
    groups: int
    requested: Tensor
    choices_per_token: float
    imbalance: float
    worst_imbalance: float
    load: Tensor
    dropped: float
    unavoidable: float
    unseen: float
    entropy: float
    confidence: float

    @property
    def relative_load(self) -> Tensor:
        """`load` divided by its mean, in float64. A value of 1 means a balanced load, and 0 means that the expert
        received no tokens."""
        return relative(self.load)

    @property
    def relative_requested(self) -> Tensor:
        """`requested` divided by its mean, in float64.

        Router collapse is visible here, but not in `load`, because capacity evens out the load.
        """
        return relative(self.requested)

    @property
    def dead(self) -> list[Any]:
        """Indices of the experts that computed no tokens, or (outer, inner) pairs on the second level of a
        hierarchy."""
        index = (self.load == 0).nonzero()
        return index.flatten().tolist() if self.load.ndim == 1 else index.tolist()

    def scalars(self) -> dict[str, float]:
        """Return the scalar statistics as a dictionary for logging."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, float)},
            "max_load": float(self.relative_load.max()),
            "max_requested": float(self.relative_requested.max()),
            "dead": len(self.dead),
            **{f"loss/{name}": value for name, value in self.losses.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Convert the record to JSON-serializable types. NaN and infinity become None."""
        return to_json_value({**vars(self), "dead": self.dead})


def to_json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: to_json_value(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.tolist() if isinstance(value, Tensor) else value


def format_cells(total: Record, steps: Sequence[Record]) -> dict[str, str]:
    """Return a gate's row in the summary and report tables, keyed by column header. The row shows the totals over all
    steps and the worst step."""
    first = {"gate": total.layer, "experts": "x".join(map(str, total.load.shape)), "forwards": f"{total.forwards}"}
    worst, at = max(((float(record.relative_requested.max()), -record.step) for record in steps), default=(0, 0))
    rest = {
        "tokens": f"{total.tokens}",
        "requested": format_range(total.relative_requested),
        "in a group": f"{total.imbalance:.2f}, {total.worst_imbalance:.2f}",
        "load": format_range(total.relative_load),
        "dead": f"{len(total.dead)}",
        "dropped": f"{total.dropped:.1%}",
        "unavoidable": f"{total.unavoidable:.1%}",
        "unseen": f"{total.unseen:.1%}",
        "entropy": f"{total.entropy:.2f} of {math.log(total.load.shape[-1]):.2f}",
        "confidence": f"{total.confidence:.2f}",
        "worst step": f"{worst:.2f} at {-at}",
        "losses": ", ".join(f"{name} {value:.3g}" for name, value in total.losses.items()),
    }
    return first | (rest if total.forwards else dict.fromkeys(rest, "-"))


def relative(counts: Tensor) -> Tensor:
    """Return counts divided by their mean, in float64, or zeros if all counts are 0."""
    return counts / counts.to(torch.float64).mean().clamp(min=1 / counts.numel())


def format_range(values: Tensor) -> str:
    return f"{float(values.min()):.2f}..{float(values.max()):.2f}"


def count_measurements(shape: Sequence[int]) -> int:
    """Return w, the number of values per forward pass for a load of the given shape."""
    return 1 + NUM_SUMS + 2 * math.prod(shape)


def measure_routing(routing: Routing, importance: Tensor | None) -> Tensor:
    """Measure one forward pass on its device, without a host sync. Returns a float32 tensor of shape `(w,)`: the
    largest imbalance, `NUM_SUMS` sums, and the requests and load of each expert. A token takes part in routing if it is
    not padding and makes a choice.
    """
    e, computed, probs = routing.num_experts, get_computed_mask(routing), routing.probs.detach().float()
    requested, load = routing.queue_length, count_expert_load(routing.expert, routing.kept, e)  # (..., b, e), (..., e)
    group_requests = requested.sum(dim=-1, keepdim=True)
    limit = routing.capacity if routing.limit is None else routing.limit.unsqueeze(-1)
    limit = group_requests if limit is None else limit
    imbalance = requested.amax(dim=-1).float() * e / group_requests.squeeze(-1).clamp(min=1)  # 0 without requests
    tokens = torch.ones_like(computed) if routing.mask is None else routing.mask
    tokens = tokens if importance is None else tokens & (importance > 0)
    # computing -p log p in place on the clamped copy is 3x faster than torch.special.entr
    entropy = -probs.clamp(min=1e-30).log_().mul_(probs).sum(dim=-1)
    sums = (
        tokens,
        imbalance > 0,  # groups
        imbalance,
        (requested - limit).clamp(min=0),  # dropped
        (group_requests - e * limit).clamp(min=0),  # unavoidable
        tokens & ~computed,
        torch.where(tokens, entropy, 0.0),
        torch.where(tokens, probs.amax(dim=-1), 0.0),  # confidence
    )
    worst = pad(imbalance.flatten(), (1, 0)).amax()  # padded, because there may be no groups
    numbers = (worst, *(each.sum() for each in sums), requested.sum(dim=-2), load)
    return torch.cat([each.float().flatten() for each in numbers])


def make_record(layer: str, step: int, losses: Mapping[str, float], numbers: Tensor, shape: Sequence[int]) -> Record:
    """Aggregate the float64 measurements `(r, w)` of several forward passes into one record. `shape` is the shape of
    the load."""
    worst, sums, *counts = numbers.split([1, NUM_SUMS, math.prod(shape), math.prod(shape)], dim=1)
    tokens, groups, imbalance, dropped, unavoidable, unseen, entropy, confidence = sums.sum(dim=0).tolist()
    requested, load = (count.sum(dim=0).to(torch.int64).view(*shape) for count in counts)
    choices = int(requested.sum())
    num_tokens, num_choices = max(tokens, 1), max(choices, 1)
    return Record(
        layer=layer,
        step=step,
        forwards=len(numbers),
        losses=losses,
        tokens=int(tokens),
        groups=int(groups),
        requested=requested,
        choices_per_token=choices / num_tokens,
        imbalance=imbalance / max(groups, 1),
        worst_imbalance=max(worst.flatten().tolist(), default=0.0),
        load=load,
        dropped=dropped / num_choices,
        unavoidable=unavoidable / num_choices,
        unseen=unseen / num_tokens,
        entropy=entropy / num_tokens,
        confidence=confidence / num_tokens,
    )


def get_computed_mask(routing: Routing) -> Tensor:
    """Return a `(..., b, n)` bool mask of the tokens that at least one expert computes."""
    if routing.k is not None:
        return routing.kept.unflatten(-1, (routing.num_tokens, routing.k)).any(dim=-1)
    zeros = torch.zeros_like(routing.probs[..., 0], dtype=torch.int64)
    return zeros.scatter_add(-1, routing.token, routing.kept.to(torch.int64)) > 0
