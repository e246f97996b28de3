"""Expert-choice routing, in which experts choose tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixture_of_experts.dispatch.capacity import expert_capacity
from mixture_of_experts.dispatch.queues import Queues, stable_argsort
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.gating.base import Gate
from mixture_of_experts.gating.capacity_factor import CapacityFactor
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.gating.recomputing import copy_slice_on_gpu, gather_chosen, recomputed_on_gpu
from mixture_of_experts.losses import token_mean


class ExpertChoiceGating(Gate):
    """A router in which each expert chooses its top tokens from a group (Zhou et al. 2022, arXiv 2202.09368).

    The load is balanced by construction, so `balance_loss` is 0. However, a token may be chosen by any number of
    experts, including none.

    This router is NOT CAUSAL, because experts see the whole group when they choose tokens. In a language model, later
    tokens would affect whether an earlier token is processed. Use this router only if the whole group is known, as in
    encoders.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e.
        capacity_factor: mean number of experts per token. Each expert chooses `min(n, max(1, int(n * factor / e)))`
            tokens.
        process_group: process group across which the batch is split; see `Gate`.
        device, dtype: device and dtype of the weights, as in `torch.nn`.

    Example:
        >>> import torch
        >>> gate = ExpertChoiceGating(dim=8, num_experts=4)
        >>> gate(torch.randn(2, 16, 8)).expert.shape
        torch.Size([2, 32])
    """

    w_gating: nn.Parameter

    capacity_factor: CapacityFactor = CapacityFactor(dropless=False)
    _capacity_factor: tuple[int, int]

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, process_group=process_group)
        self.capacity_factor = capacity_factor
        self.w_gating = self._empty_matrix(device, dtype)
        self.reset_parameters()

    def variant_reason(self) -> str:
        return "experts choose tokens, so the experts of a token depend on other tokens; use a token-choice gate"

    @property
    def expected_choices(self) -> float:
        """The mean number of experts that choose a token, which equals the capacity factor up to rounding."""
        factor: Any = self.capacity_factor
        return factor

    def forward(
        self, x: Tensor, importance: Tensor | None = None, mask: Tensor | None = None, **side: Tensor
    ) -> Routing:
        """Return the `Routing`, which assigns tokens to experts.

        Args:
            x: `(b, n, d)`.
            importance: must be None, because this gate does not support two-level gating. Other values raise a
                ValueError.
            mask: `(b, n)` bool, True for real tokens. Experts choose only from the real tokens. The number of real
                tokens determines how many tokens each expert chooses.
            side: `router_input` `(b, n, d)`, which replaces `x` as the router's input.
        """
        if importance is not None:
            raise ValueError("expert-choice routing does not support `importance`; use a token-choice gate")
        tokens = self.read(x, None, mask, side=side)
        n, e = tokens.num_tokens, self.num_experts
        probs, log_total = recomputed_on_gpu(self._compute_scores, tokens.x, self.w_gating)
        capacity, limit = expert_capacity(n, tokens.length, self._capacity_factor, e, minimum=1)

        score = probs.transpose(-2, -1)  # (b, e, n)
        ranked = score.detach()
        if mask is not None:
            ranked = torch.where(mask.unsqueeze(-2), ranked, -1.0)
        token = copy_slice_on_gpu(stable_argsort(ranked, descending=True)[..., :capacity])
        slot = torch.arange(token.shape[-1], device=token.device).expand_as(token)
        expert = torch.arange(e, device=token.device).unsqueeze(-1).expand_as(token)
        chosen = torch.ones_like(token, dtype=torch.bool) if limit is None else slot < limit[:, None, None]
        weight = torch.where(chosen, gather_chosen(score, token), 0.0)
        kept = chosen & (weight != 0)
        return Routing(
            expert=expert.flatten(-2),
            kept=kept.flatten(-2),
            weight=weight.flatten(-2),
            probs=probs,
            num_tokens=n,
            num_experts=e,
            capacity=capacity,
            k=None,
            sent=chosen.flatten(-2),
            queues=Queues(slot.flatten(-2), chosen.sum(dim=-1)),
            token_index=token.flatten(-2),
            limit=limit,
            mask=tokens.mask,
            losses={"z": token_mean(log_total.square(), tokens.mask, self.process_group)},
        )

    def _compute_scores(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities `(b, n, e)` and the logsumexp of the logits `(b, n)`."""
        logits = router_logits(x, weight)
        return logits.softmax(dim=-1), logits.logsumexp(dim=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, causal=False"
