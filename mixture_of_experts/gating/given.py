"""Given choices, which somebody else made: how they are written, and how they join a gate's own.

Axes: b groups, n tokens of a group, k choices of a token; outer experts stand before them: `...`.

    0 and above    this expert computes the token
    -1             no choice
    -2 - i         expert i takes its share of the token's weight, but does not compute the token
    LIVE           the gate chooses
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIVE = -(1 << 15)  # the least of int16


class Settled(NamedTuple):
    """The choices of all tokens, given ones and the gate's own."""

    expert: Tensor  #: (..., b, n, k) int64, from 0 to e - 1
    weighed: Tensor | None  #: (..., b, n, k) bool, choices that share the token's weight; None: all
    computed: Tensor | None  #: (..., b, n, k) bool, choices that are computed; None: all
    live: Tensor | None = None  #: (..., b, n, k) bool, choices that are the gate's own; None: all

    def column(self, i: int) -> Settled:
        """Choice i of every token, `(..., b, n, 1)`."""
        return Settled(*(None if part is None else part[..., i : i + 1] for part in self))  # type: ignore[arg-type]

    def among(self, allowed: Tensor | None) -> Tensor | None:
        """`(..., b, n, k)` bool, choices that are `allowed` and share the token's weight; None if all are."""
        return allowed if self.weighed is None else self.weighed if allowed is None else allowed & self.weighed

    def chosen(self, sent: Tensor | None = None) -> Tensor | None:
        """`(..., b, n, k)` bool, choices that are made; of the gate's own only those `sent`. None if all are made."""
        if self.computed is None or sent is None:
            return self.computed if sent is None else sent
        own = sent & self.computed
        return own if self.live is None else torch.where(self.live, own, self.computed)

    def without(self, closed: Tensor | None) -> Settled:
        """The same choices, without those of experts that are `closed` `(..., b, n, e)` to their token."""
        if closed is None:
            return self
        is_open = ~closed.gather(-1, self.expert)
        weighed, computed = (is_open if part is None else part & is_open for part in (self.weighed, self.computed))
        return self._replace(weighed=weighed, computed=computed)


def settle(given: Tensor | None, own: Tensor, chosen: Tensor | None = None) -> Settled:
    """Join choices `(..., b, n, k)`: the given ones, and the gate's `own` where those are `LIVE`. `chosen` says which
    of its own the gate makes."""
    if given is None:
        return Settled(own, chosen, chosen)
    live, not_computed = given == LIVE, torch.where(given < -1, -2 - given, 0)
    expert = torch.where(live, own, torch.where(given < 0, not_computed, given))
    own_chosen = live if chosen is None else live & chosen
    return Settled(expert, own_chosen | ~live & (given != -1), own_chosen | (given >= 0), live)
