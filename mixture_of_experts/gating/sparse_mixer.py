"""SparseMixer, a router that samples experts during training and estimates the gradient of the expected output.

Axes: b (groups), n (tokens per group), d (model dimension), e (experts), k (choices per token). `...` stands for the
outer expert dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mixture_of_experts.gating.base import TokenChoiceGate, TokenChoiceSettings, Tokens
from mixture_of_experts.gating.choices import Choices, check_k_of_experts
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.gating.overrides import GIVEN, merge_overrides
from mixture_of_experts.support.checked_module import checked_setting
from mixture_of_experts.support.checks import check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SparseMixerGating(TokenChoiceGate):
    """SparseMixer routing (Liu, Gao and Chen 2023, arXiv 2310.00811), as in GRIN and Phi-3.5-MoE (arXiv 2409.12136).

    Each token chooses experts one at a time. The candidates are the best remaining expert and all experts that are
    nearly as good. During training, an expert is sampled from the softmax over the candidates' logits. During
    evaluation, the best expert is chosen. The weight is the expert's probability in this softmax. If a sampled expert
    is not the best one, its weight is divided by 3 with a probability of 0.75, while its gradient remains unchanged.
    This is Heun's third-order estimate of the gradient of the expectation.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e.
        k: number of choices per token.
        tolerance: an expert is considered nearly as good as the best if `best - logit <= 2 * tolerance *
            max(abs(logit), best)`.
        device, dtype: device and dtype of the weights, as in `torch.nn`.
        settings: see `TopKGating`.

    Shape:
        The gate maps `x` `(*outer_expert_dims, b, n, d)` to a `Routing` with k choices per token. `w_gating` has the
        shape `(*outer_expert_dims, d, e)`.

    Example:
        >>> import torch
        >>> gate = SparseMixerGating(dim=8, num_experts=4)
        >>> routing = gate(torch.randn(2, 16, 8))
        >>> routing.k
        2
    """

    side_inputs: ClassVar[tuple[str, ...]] = (*TokenChoiceGate.side_inputs, GIVEN)
    w_gating: nn.Parameter
    tolerance: float = checked_setting(check_number, at_least=0.0)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        tolerance: float = 0.01,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[TokenChoiceSettings],
    ) -> None:
        super().__init__(dim, num_experts, k, **settings)
        self.tolerance = tolerance
        self.w_gating = self._empty_matrix(device, dtype)
        self.reset_parameters()

    def check_k(self, k: Any) -> int:
        return check_k_of_experts(super().check_k(k), self.num_experts)

    def variant_reason(self) -> str | None:
        return "the router samples experts in training; call eval()" if self.training else super().variant_reason()

    def decide(self, tokens: Tokens) -> Choices:
        """Choose k experts for each token, one after another."""
        logits = router_logits(tokens.x, self.w_gating)
        left, given, columns = logits, self.given(tokens), []
        for i in range(self.k):
            expert, chosen, weight = self._choose(logits, left, None if given is None else given[..., i : i + 1])
            columns.append((expert, weight) if chosen is None else (expert, weight, chosen))
            rest = left.scatter(-1, expert, -torch.inf)
            left = rest if chosen is None else torch.where(chosen, rest, left)
        expert, weight, *made = (torch.cat(parts, dim=-1) for parts in zip(*columns, strict=True))
        chosen = made[0] if made else None
        probs = logits.softmax(dim=-1)
        losses = {
            "balance": self.balance_loss(tokens, probs, expert, chosen, k=self.k),
            "z": self.z_loss(tokens, logits),
        }
        return Choices(expert, weight, probs, losses, chosen=chosen)

    def _choose(self, logits: Tensor, left: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Choose one expert per token. `left` is -inf for experts that are already chosen.

        Returns:
            Three tensors `(..., b, n, 1)`: the expert, a mask that is True if the expert is chosen (None if all are
            chosen), and the expert's weight.
        """
        with torch.no_grad():
            best, likeliest = left.max(dim=-1, keepdim=True)
            far = (best - logits) / logits.abs().maximum(best) > 2 * self.tolerance
        near = left.masked_fill(far, -torch.inf)
        expert = likeliest
        if self.training:  # sample with Gumbel noise
            expert = (near.detach() - torch.empty_like(near).exponential_().log()).argmax(dim=-1, keepdim=True)
        expert, chosen = merge_overrides(given, expert)
        if given is not None:  # an expert that was passed in is always a candidate
            near = near.scatter(-1, expert, logits.gather(-1, expert))
        weight = near.softmax(dim=-1).gather(-1, expert)
        if not self.training:
            return expert, chosen, weight
        whole = (expert == likeliest) | (torch.rand_like(best) > 0.75)
        return expert, chosen, weight - torch.where(whole, 0.0, weight.detach() * (2 / 3))
