"""Top-p: a token takes as many experts as together reach a probability p.

Axes: b groups, n tokens of a group, e experts, k the most choices of a token; outer experts stand before: `...`.
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
    """A token takes the fewest experts whose probabilities together reach p, at most k (arXiv 2403.07652).

    A token whose router is sure takes one expert, others take several. The weights are the probabilities, as in the
    paper; `normalize=True` divides them by their sum. The balancing loss is `e sum_e f_e P_e` (equation 8 there), at
    balance the mean number of choices. `loss_coefs={"entropy": 1e-4}` adds the paper's dynamic loss, the mean entropy
    of the probabilities, which makes the router surer.

    Args:
        dim, num_experts: d and e.
        k: most choices of a token, the bound of every shape. A token that meets it may stay below p.
        p: the sum that the probabilities reach, above 0 and below 1; 0.4 in the paper.
        normalize, settings: as in `TopKGating`.

    Shape:
        x `(*outer_expert_dims, b, n, d)` to a `Routing` with k choices of a token; `chosen` says which are made.

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
    load_beyond_scores: ClassVar[str | None] = "tokens make fewer than k choices there"
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
        """The experts of the largest scores; a choice is made if those before it have not reached p."""
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
    """The sum of the values before each one, along the last dimension.

    Doubles the span that is summed at each step, since `cumsum` on a GPU does not promise equal bits on every run.
    """
    total, span = F.pad(values[..., :-1], (1, 0)), 1
    while span < values.shape[-1]:
        total = total + F.pad(total[..., :-span], (span, 0))
        span *= 2
    return total
