"""The noisy top-k router from the original paper on sparsely gated mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import losses
from mixture_of_experts.gating.base import TokenChoiceGate, TokenChoiceSettings, Tokens
from mixture_of_experts.gating.choices import Choices, both, top_choices
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.gating.overrides import GIVEN

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NoisyTopKGating(TokenChoiceGate):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, section 2.1 and appendix A).

    The scores are `H = x w_gating + eps * softplus(x w_noise)` during training, where eps is standard normal noise, and
    `H = x w_gating` during evaluation. The weights are the softmax over the k largest scores. Both matrices are
    initialized to zero, so initially only the noise determines the choices, and the load is balanced. `balance_loss` is
    the sum of `losses["importance"]` and `losses["load"]`, which are squared coefficients of variation.

    If k = 1, the weight is always 1, so the router is trained only by the losses.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e.
        k: number of choices per token, which must be less than e because the load loss requires the (k + 1)-th largest
            score.
        device, dtype, settings: as in `TopKGating`. The gate is dropless by default.

    Example:
        >>> import torch
        >>> gate = NoisyTopKGating(dim=8, num_experts=4, k=2)
        >>> sorted(gate(torch.randn(2, 16, 8)).losses)
        ['balance', 'importance', 'load', 'z']
    """

    side_inputs: ClassVar[tuple[str, ...]] = (*TokenChoiceGate.side_inputs, GIVEN)
    w_gating: nn.Parameter
    w_noise: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[TokenChoiceSettings],
    ) -> None:
        super().__init__(dim, num_experts, k, **settings)
        self.w_gating, self.w_noise = self._empty_matrix(device, dtype), self._empty_matrix(device, dtype)
        self.reset_parameters()

    def check_k(self, k: Any) -> int:
        k = super().check_k(k)
        if k >= self.num_experts:
            raise ValueError(
                f"k must be less than num_experts={self.num_experts}, but got {k}, because the load loss reads the (k "
                "+ 1)-th largest score. Use TopKGating to choose all experts"
            )
        return k

    def reset_parameters(self) -> None:
        """Set both matrices to zero, as in the paper."""
        nn.init.zeros_(self.w_gating)
        nn.init.zeros_(self.w_noise)

    def variant_reason(self) -> str | None:
        return "the router draws noise in training; call eval()" if self.training else super().variant_reason()

    def decide(self, tokens: Tokens) -> Choices:
        """Choose the experts with the k largest noisy scores for each token."""
        clean = router_logits(tokens.x, self.w_gating)
        spread = F.softplus(router_logits(tokens.x, self.w_noise))
        noisy = clean + torch.randn_like(clean) * spread if self.training else clean

        best = top_choices(noisy, self.k + 1)
        expert, chosen = self.apply_overrides(tokens, best[..., : self.k])
        allowed = both(chosen, self.allowed(tokens))
        top = noisy.gather(-1, expert)
        # for priority "score": the weight of the first choice; if k = 1, its probability, because the weight is 1
        score = (noisy if self.k == 1 else top).detach().softmax(dim=-1).amax(dim=-1)
        if allowed is not None:
            top = torch.where(allowed | ~allowed.any(dim=-1, keepdim=True), top, -torch.inf)
        weight = top.softmax(dim=-1)
        if chosen is None:
            probs = torch.zeros_like(noisy).scatter(-1, expert, weight)
        else:  # choices that are not made have arbitrary ids, so scatter them to an extra column
            column = torch.where(chosen, expert, self.num_experts)
            probs = F.pad(torch.zeros_like(noisy), (0, 1)).scatter(-1, column, weight)[..., :-1]

        parts = self._losses(tokens, probs, load_probability(clean, noisy, spread, best))
        found = {"balance": parts["importance"] + parts["load"], **parts, "z": self.z_loss(tokens, clean)}
        return Choices(expert, weight, probs, found, chosen=chosen, priority_score=score)

    def _losses(self, tokens: Tokens, probs: Tensor, load: Tensor) -> dict[str, Tensor]:
        """Return the squared coefficients of variation of the importance and the load. Both are first summed over all
        tokens."""
        parts = {}
        for name, value in (("importance", probs), ("load", load)):
            _, value = self.select_counted(tokens, None, value)
            parts[name] = losses.cv_squared(value.sum(dim=(-3, -2)), self.process_group)
        return parts


def load_probability(clean: Tensor, noisy: Tensor, spread: Tensor, best: Tensor) -> Tensor:
    """Return P(x, i) `(..., e)`, the probability of choosing expert i if only its own noise is resampled (appendix A,
    equation 9).

    Args:
        clean, noisy, spread: `(..., e)`, the scores without noise, the scores with noise, and the noise standard
            deviation.
        best: `(..., k + 1)`, the experts with the largest noisy scores.
    """
    within = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, best[..., :-1], True)
    last, following = noisy.gather(-1, best[..., -2:]).split(1, dim=-1)
    threshold = torch.where(within, following, last)  # k-th largest score of the other experts
    # a spread of 0 would make the quotient infinite and its gradient NaN; beyond 100 deviations, P is exactly 0 or 1
    deviations = (clean - threshold) / spread.clamp(min=1e-6)
    return torch.special.ndtr(deviations.clamp(-100.0, 100.0))
