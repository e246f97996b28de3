"""Choices that somebody else made: how they are written, and how they and a gate's own become one.

Axes: b groups, n tokens of a group, k choices of a token; outer experts stand before them: `...`.

    0 and above    that expert computes the token
    -1             no choice
    -2 - i         expert i was chosen and is weighed with the others, but does not compute the token
    LIVE           the gate chooses
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIVE = -(1 << 15)  # the least of int16


class Settled(NamedTuple):
    """The choices of all tokens, whoever made them. All but `expert` are None where a gate chose everything."""

    expert: Tensor  #: (..., b, n, k) int64, each of an expert that is there
    weighed: Tensor | None = None  #: (..., b, n, k) bool, those among which the weight is shared
    made: Tensor | None = None  #: (..., b, n, k) bool, those that are computed
    live: Tensor | None = None  #: (..., b, n, k) bool, those that the gate made itself

    def column(self, i: int) -> Settled:
        """Those of choice i alone, `(..., b, n, 1)`."""
        return Settled(*(None if part is None else part[..., i : i + 1] for part in self))  # type: ignore[arg-type]

    def among(self, allowed: Tensor | None) -> Tensor | None:
        """`(..., b, n, k)` bool: those among which the weight is shared, of those that are allowed."""
        return allowed if self.weighed is None else self.weighed if allowed is None else allowed & self.weighed

    def chosen(self, sent: Tensor | None = None) -> Tensor | None:
        """`(..., b, n, k)` bool: those that are made, of its own choices those that the gate sends; None if all."""
        if self.made is None or self.live is None:
            return sent
        return self.made if sent is None else torch.where(self.live, sent, self.made)


def settle(given: Tensor | None, own: Tensor) -> Settled:
    """Given choices, and the gate's own `(..., b, n, k)` where those are `LIVE`."""
    if given is None:
        return Settled(own)
    live, not_made = given == LIVE, torch.where(given < -1, -2 - given, 0)
    expert = torch.where(live, own, torch.where(given < 0, not_made, given))
    return Settled(expert, live | (given != -1), live | (given >= 0), live)
