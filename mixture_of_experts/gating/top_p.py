"""Top-p routing, in which each token chooses experts until their total probability reaches p.

Axes: b (groups), n (tokens per group), e (experts), k (maximum number of choices per token). `...` stands for the outer
expert dimensions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.choices import Choices, both
from mixture_of_experts.gating.topk import TopKGating
from mixture_of_experts.support.checked_module import checked_setting
from mixture_of_experts.support.checks import check_number


class TopPGating(TopKGating):
    """A router in which each token chooses the smallest set of experts whose probabilities sum to at least p, limited
    to k experts.

    See arXiv 2403.07652. A token chooses a single expert if the router is confident, and several experts otherwise. The
    weights are the probabilities, as in the paper; `normalize=True` divides them by their sum. The balancing loss is
    `e sum_e f_e P_e` (equation 8 in the paper). At perfect balance, it equals the mean number of choices.
    `loss_coefs={"entropy": 1e-4}` adds the paper's dynamic loss, the mean entropy of the probabilities, which makes the
    router more confident.

    Args:
        dim, num_experts: model dimension d and number of experts e.
        k: maximum number of choices per token, which determines all shapes. For tokens that make k choices, the sum of
            probabilities may be less than p.
        p: target for the sum of probabilities, greater than 0 and less than 1. The paper uses 0.4.
        normalize, settings: see `TopKGating`.

    Shape:
        The gate maps `x` `(*outer_expert_dims, b, n, d)` to a `Routing` with k choices per token. The routing's
        `chosen` mask marks the choices that are made.

    Example:
        >>> import torch
        >>> gate = TopPGating(dim=2, num_experts=4, k=3, p=0.6)
        >>> probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
        >>> gate.w_gating.data.copy_(probs.log()).shape
        torch.Size([2, 4])
        >>> gate(torch.eye(2).unsqueeze(0)).sent.view(2, 3)
        tensor([[ True, False, False],
                [ True,  True, False]])
    """

    optional_losses: ClassVar[tuple[str, ...]] = (*TopKGating.optional_losses, "entropy")
    load_beyond_scores: ClassVar[str | None] = "tokens may make fewer than k choices"
    p: float = checked_setting(check_number, above=0.0, below=1.0)

    def __init__(
        self, dim: int, num_experts: int, k: int, *, p: float = 0.4, normalize: Any = False, **settings: Any
    ) -> None:
        super().__init__(dim, num_experts, k, normalize=normalize, **settings)
        self.p = p

    @property
    def choices_at_balance(self) -> float:
        return 1

    @property
    def expected_choices(self) -> None:
        return None

    def own_choices(self, tokens: Tokens, ranked: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts with the largest scores. A choice is made if the probabilities of the previous choices sum
        to less than p."""
        expert, chosen = super().own_choices(tokens, ranked, probs)
        prob = probs.detach().gather(-1, expert)
        return expert, both(chosen, exclusive_sums(prob) < self.p)

    def named_losses(self, names: Collection[str], tokens: Tokens, choices: Choices) -> dict[str, Tensor]:
        found = super().named_losses(names, tokens, choices)
        if "entropy" in names:
            log = choices.probs.clamp(min=1e-30).log()
            found["entropy"] = self.token_mean(tokens, -(choices.probs * log).sum(dim=-1))
        return found


def exclusive_sums(values: Tensor) -> Tensor:
    """Return the exclusive cumulative sum along the last dimension.

    The implementation doubles the span of the sums in each step, because `cumsum` may be nondeterministic on a GPU.
    """
    total, span = F.pad(values[..., :-1], (1, 0)), 1
    while span < values.shape[-1]:
        total = total + F.pad(total[..., :-span], (span, 0))
        span *= 2
    return total
