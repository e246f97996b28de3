"""A call of stacked feed-forward experts, as every way reads it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mixture_of_experts.decision import Decision
from mixture_of_experts.ops.network import Network


class Call(NamedTuple):
    """One call, its operands in one dtype.

    Attributes:
        x: `(t, d)` tokens.
        decision: what the gates decide on these tokens.
        network: the experts' weights.
        training: the experts' mode. A way may not depend on whether a gradient is asked for, since a recomputation must
            go the way of its forward.
    """

    x: Tensor
    decision: Decision
    network: Network
    training: bool
