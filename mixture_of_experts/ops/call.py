"""A call of stacked feed-forward experts, as every way reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.decision import Decision
from mixture_of_experts.ops.network import Network


class Call(NamedTuple):
    """One call, with all operands in one dtype.

    Attributes:
        x: `(t, d)`, tokens.
        decision: the gates' decision on these tokens.
        network: the experts' weights.
        training: the experts' mode. The choice of a way depends on this, not on the grad mode, since a recomputation
            must take the same way as its forward.
    """

    x: Tensor
    decision: Decision
    network: Network
    training: bool

    def is_inference(self) -> bool:
        """Whether it is a call of token choice, in eval and without gradients."""
        return not (self.training or torch.is_grad_enabled() or self.decision.k is None)
