"""Hash layers, in which a token's id determines its experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.overrides import GIVEN
from mixture_of_experts.gating.topk import TopKGating
from mixture_of_experts.support.checks import check_size
from mixture_of_experts.support.tracing import is_host_readable


class HashGating(TopKGating):
    """A router that maps each token id to k fixed experts. The weights of the experts are learned as in `TopKGating`.

    Without a load-balancing loss, the load is only as balanced as the frequencies of the token ids (Roller et al. 2021,
    arXiv 2106.04426). The first layers of DeepSeek-V4 use this router. Call the layer as `moe(x, token_ids=ids)`.

    Args:
        dim, num_experts, k: model dimension d, number of experts e, and number of experts per token id.
        num_ids: number of token ids, v.
        settings: other arguments of `TopKGating`.

    Shape:
        The gate maps `x` `(b, n, d)` and `token_ids` `(b, n)`, integers from 0 to v - 1, to a `Routing`.
        `experts_of_id` is a random int64 buffer `(v, k)`. The numbers of ids assigned to any two experts differ by at
        most one.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> moe = MoE(dim=8, gate=HashGating(8, 4, num_ids=100))
        >>> ids = torch.tensor([[5, 7, 5]])
        >>> routing = moe.gate(torch.randn(1, 3, 8), token_ids=ids)
        >>> routing.expert[0, :2].tolist() == routing.expert[0, 4:].tolist()  # both tokens have id 5
        True
    """

    num_ids: int

    shape_attributes: ClassVar[tuple[str, ...]] = (*TopKGating.shape_attributes, "k")
    side_inputs: ClassVar[tuple[str, ...]] = (*TopKGating.side_inputs, "token_ids")
    load_beyond_scores: ClassVar[str | None] = "experts are chosen by token id"
    experts_of_id: Tensor

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, *, num_ids: int, device: Any = None, **settings: Any
    ) -> None:
        super().__init__(dim, num_experts, k, device=device, **settings)
        v = self.num_ids = check_size("num_ids", num_ids)
        self.register_buffer("experts_of_id", draw_experts(v, k, num_experts).to(device))

    def reset_parameters(self) -> None:
        """Initialize the weights randomly, and assign random experts to each token id."""
        super().reset_parameters()
        if (table := self._buffers.get("experts_of_id")) is not None:  # it is None while the base class is constructed
            table.copy_(draw_experts(self.num_ids, table.shape[1], self.num_experts))

    def own_choices(self, tokens: Tokens, ranked: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts assigned to each token's id."""
        if (ids := tokens.side.get("token_ids")) is not None:
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TypeError(f"token_ids must be integers, got {ids.dtype}")
            if ids.ndim != tokens.x.ndim - 1:
                raise ValueError(f"token_ids must have shape {tuple(tokens.x.shape[:-1])}, got {tuple(ids.shape)}")
            self._check_range(ids)
            return functional.embedding(ids.to(torch.int64), self.experts_of_id), None
        if GIVEN in tokens.side:
            return super().own_choices(tokens, ranked, probs)
        raise ValueError(
            "HashGating requires token ids; call the layer as moe(x, token_ids=ids) with integers of shape (..., n)"
        )

    def compute_priority(self, ranked: Tensor, score: Tensor, expert: Tensor) -> Tensor:
        return score.gather(-1, expert).amax(dim=-1)

    def _check_range(self, ids: Tensor) -> None:
        """Check that the token ids are below `num_ids`. The check reads tensor values, so it is skipped on a GPU and in
        traced graphs."""
        if is_host_readable(ids) and (wrong := ids[(ids < 0) | (ids >= self.num_ids)]).numel():
            raise ValueError(
                f"token_ids must be from 0 to {self.num_ids - 1}, got {int(wrong[0])}. Construct the gate with num_ids "
                "set to the vocabulary size, and mask padding tokens whose ids are out of this range"
            )

    @property
    def first_is_likeliest(self) -> bool:
        return False


def draw_experts(num_ids: int, k: int, num_experts: int) -> Tensor:
    """Assign k different random experts to each token id, and return an int64 tensor of shape `(v, k)`. The numbers of
    ids assigned to any two experts differ by at most one."""
    order = torch.randperm(num_experts)
    start = torch.arange(num_ids)[torch.randperm(num_ids)] * k  # in random order, each id takes the next k experts
    return order[(start.unsqueeze(-1) + torch.arange(k)) % num_experts]
