"""Expert networks whose weights have a low-rank update: `w + down @ up` for each expert. Only `down` and `up` are
trained.

Axes: e (experts), p and q (input and output features of a weight), k (rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.ops.network import Network


class LowRankWeight(NamedTuple):
    """A weight `(e, p, q)` and its low-rank update, which consists of `down` `(e, p, k)` and `up` `(e, k, q)`."""

    name: str  # key in `Network.tensors`
    weight: Tensor
    down: Tensor
    up: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def mT(self) -> LowRankWeight:  # noqa: N802  (the name of the tensor attribute)
        return LowRankWeight(self.name, self.weight.mT, self.up.mT, self.down.mT)


class AdaptedNetwork(Network):
    """The weights of all experts, including at least one `LowRankWeight`. Each factor is named after its weight, with
    the prefix "down." or "up."."""

    def get_low_rank_weights(self) -> list[LowRankWeight]:
        """Return the weights that have a low-rank update, starting with those in `w_in`."""
        return [weight for weight in (*self.w_in, self.w_out) if isinstance(weight, LowRankWeight)]

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        for name, weight, down, up in self.get_low_rank_weights():
            found |= {name: weight, f"down.{name}": down, f"up.{name}": up}
        return found

    def with_tensors(self, tensors: Mapping[str, Any]) -> AdaptedNetwork:
        whole = dict(tensors)
        for name, *_ in self.get_low_rank_weights():
            parts: Any = map(tensors.get, (name, f"down.{name}", f"up.{name}"))
            whole[name] = LowRankWeight(name, *parts)
        return AdaptedNetwork(**vars(super().with_tensors(whole)))

    def merged(self) -> Network:
        """Return a network in which the low-rank updates are added to the weights."""
        sums = {name: torch.baddbmm(weight, down, up) for name, weight, down, up in self.get_low_rank_weights()}
        return super().with_tensors(super().tensors() | sums)
