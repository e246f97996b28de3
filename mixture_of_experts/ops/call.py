"""A call of stacked feed-forward experts: tokens, what the gates decided, and the weights, as every way reads them.

Axes: t tokens, e experts, d model dim, h hidden dim, o dim of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch import Decision
from mixture_of_experts.ops.activations import ActivationLike, takes_two

Halves = Literal["concatenated", "interleaved"]


class Network(NamedTuple):
    """The weights of all experts as they are stored: `act(x w_in) w_out`, gated or not, with biases or without.

    Attributes:
        w_in: one weight `(e, d, h)`; or two, of the gate and of what it multiplies; or one `(e, d, 2 h)` of both.
        w_out: `(e, h, o)`.
        b_in: a bias `(e, q)` or None for each of `w_in (e, d, q)`.
        b_out: `(e, o)` or None.
        activation: a function of one tensor, or of `(gate, up)`.
        halves: how gate and up lie in one weight `(e, d, 2 h)`; None if every weight is one of them.
    """

    w_in: tuple[Tensor, ...]
    w_out: Tensor
    b_in: tuple[Tensor | None, ...]
    b_out: Tensor | None
    activation: ActivationLike
    halves: Halves | None = None

    @property
    def gated(self) -> bool:
        return len(self.w_in) == 2 or self.halves is not None

    def fields(self) -> tuple[Tensor | None, ...]:
        """All weights and biases, None where there is none."""
        return (*self.w_in, self.w_out, *self.b_in, self.b_out)

    def tensors(self) -> list[Tensor]:
        """All weights and biases there are."""
        return [tensor for tensor in self.fields() if tensor is not None]

    def map(self, function: Callable[[Tensor], Any]) -> Network:
        """The same with `function` of every tensor, in the order of `fields`."""
        made = [None if tensor is None else function(tensor) for tensor in self.fields()]
        number = len(self.w_in)
        w_in, (w_out, *b_in, b_out) = tuple(made[:number]), made[number:]
        return self._replace(w_in=w_in, w_out=w_out, b_in=tuple(b_in), b_out=b_out)

    def filled(self, tensors: Sequence[Tensor]) -> Network:
        """The same with other tensors, given as `tensors` gives them."""
        given = iter(tensors)
        return self.map(lambda _: next(given))

    def parts(self, pre: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gate and up (or the one tensor there is), as views, of what was computed with each of `w_in`."""
        if self.halves is None:
            return pre
        return pre[0].chunk(2, dim=-1) if self.halves == "concatenated" else (pre[0][..., ::2], pre[0][..., 1::2])

    def hidden(self, pre: Sequence[Tensor]) -> Tensor:
        """The hidden layer `(..., h)` of what was computed with each of `w_in`."""
        parts = self.parts(pre)
        if len(parts) == 1:
            return self.activation(parts[0])
        return self.activation(*parts) if takes_two(self.activation) else self.activation(parts[0]) * parts[1]


class Call(NamedTuple):
    """One call, its operands in one dtype.

    Attributes:
        x: `(t, d)`.
        decision: what the gates decided.
        network: the experts' weights.
        training: the experts' mode: a way may not depend on whether a gradient is asked for, since a recomputation
            must go the way of its forward.
    """

    x: Tensor
    decision: Decision
    network: Network
    training: bool


def matching(x: Tensor, network: Network) -> tuple[Tensor, Network]:
    """Operands in one dtype: autocast's where it is on (it knows no grouped products), else the weights'."""
    device, dtype = x.device.type, network.w_out.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, dtype):
        dtype = torch.get_autocast_dtype(device)
    if all(tensor.dtype == dtype for tensor in network.tensors()):
        return x.to(dtype), network
    return x.to(dtype), network.map(lambda tensor: tensor.to(dtype))
