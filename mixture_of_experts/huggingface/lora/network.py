"""A network whose weights have low-rank parts, `w + down @ up` for each expert; only these are trained.

Axes: e experts, p inner and q outer dimension of a weight, k rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.ops.network import W_IN, Network


class LowRank(NamedTuple):
    """A weight `(e, p, q)` and its low-rank part, down `(e, p, k)` and up `(e, k, q)`, or None for both."""

    name: str  # in `Network.tensors`
    weight: Tensor
    down: Tensor | None
    up: Any

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def mT(self) -> LowRank:  # noqa: N802  (as of a tensor)
        if self.down is None:
            return self._replace(weight=self.weight.mT)
        return LowRank(self.name, self.weight.mT, self.up.mT, self.down.mT)


@dataclass(frozen=True)
class AdaptedNetwork(Network):
    """The weights of all experts, and the low-rank parts of some of them.

    Attributes:
        parts: for each such weight, by its name in `Network.tensors`, "down." and "up." with that name: `(e, p, k)` and
            `(e, k, q)`.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {name: part for name, part in self.parts.items() if part is not None}

    def with_tensors(self, tensors: Mapping[str, Any]) -> AdaptedNetwork:
        parts = {name: tensors.get(name) for name in self.parts}
        return AdaptedNetwork(**vars(super().with_tensors(tensors)), parts=parts)

    def adapted(self) -> list[LowRank]:
        """Every weight with its part; those of `w_in` come first."""
        named = zip((*W_IN[: len(self.w_in)], "w_out"), (*self.w_in, self.w_out), strict=True)
        return [LowRank(name, w, self.parts.get(f"down.{name}"), self.parts.get(f"up.{name}")) for name, w in named]

    def spelled(self) -> Any:
        """The network with `LowRank` in the places of its weights."""
        *w_in, w_out = self.adapted()
        return replace(self, w_in=tuple(w_in), w_out=w_out)  # type: ignore[arg-type]

    def merged(self) -> Network:
        """The network whose weights are the sums."""
        tensors = super().tensors()
        for name, w, down, up in self.adapted():
            if down is not None:
                tensors[name] = torch.baddbmm(w, down, up)
        return super().with_tensors(tensors)
