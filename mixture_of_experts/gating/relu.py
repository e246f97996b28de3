"""ReLU routing, in which each token chooses the experts with positive logits. The task loss trains these logits
directly.

Axes: b (groups), n (tokens per group), e (experts), k (maximum number of choices per token). `...` stands for the outer
expert dimensions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mixture_of_experts import losses
from mixture_of_experts.gating.balance_losses import BalanceOver, balance_loss_over, sum_counts, sum_probs
from mixture_of_experts.gating.base import Tokens
from mixture_of_experts.gating.choices import Choices, both
from mixture_of_experts.gating.expert_bias import count_in_backward
from mixture_of_experts.gating.ranks import ranks_of_batch
from mixture_of_experts.gating.topk import TopKGating
from mixture_of_experts.support.checked_module import checked_setting
from mixture_of_experts.support.checks import check_number, check_process_group

INITIAL_L1_COEF = 1e-8
#: bounds of the coefficient. At a rate of 1.2, INITIAL_L1_COEF is 50 steps above the minimum. At the maximum, the L1
#: loss exceeds the mean loss of a task
MIN_L1_COEF, MAX_L1_COEF = 1e-12, 1e3


class ReLUGating(TopKGating):
    """A router in which each token chooses at most k experts with positive logits (ReMoE, arXiv 2412.14711). The logits
    serve as weights.

    The number of experts per token is learned. The balancing loss (equation 11 in the paper) is
    `l1_coef * e / mean_choices * sum_e f_e R_e`, where R is the mean weight. This is an L1 norm of the weights in which
    each weight is multiplied by its expert's load f. Set `loss_coef=1` in the layer. `l1_coef` is a buffer initialized
    to 1e-8. After each step, `control_sparsity(model, optimizer)` adjusts the coefficient so that tokens make
    `mean_choices` choices on average (equations 7 and 8). The coefficient is clamped between 1e-12 and 1000.

    A token whose logits are all negative is not routed to any expert. Initially, about half of the logits are positive.
    If a token has more than k positive logits, the norm and the load still include all of them.

    Args:
        dim, num_experts: model dimension d and number of experts e.
        k: maximum number of choices per token, which determines all shapes. The paper uses k = e.
        mean_choices: target mean number of choices per token, which must be at most k.
        balance_over, settings: see `TopKGating`.

    Shape:
        The gate maps `x` `(*outer_expert_dims, b, n, d)` to a `Routing` with k choices per token. The routing's
        `chosen` mask marks the choices that are made.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> moe = MoE(dim=8, gate=ReLUGating(8, 16, k=8, mean_choices=2), loss_coef=1.0)
        >>> out, aux_loss = moe(torch.randn(2, 10, 8))
        >>> out.square().mean().add(aux_loss).backward()
        >>> moe.gate.update_l1()  # too many choices: the coefficient grows
        >>> moe.gate.l1_coef
        tensor(1.2000e-08)
    """

    keep_dtype: ClassVar[tuple[str, ...]] = (*TopKGating.keep_dtype, "l1_coef", "choice_counts")
    load_beyond_scores: ClassVar[str | None] = "tokens may make fewer than k choices"
    mean_choices: float = checked_setting(check_number, above=0.0)
    l1_coef: Tensor
    choice_counts: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        mean_choices: float,
        balance_over: BalanceOver = "batch",
        device: Any = None,
        **settings: Any,
    ) -> None:
        fixed: Any = dict(score=F.relu, normalize=False)
        super().__init__(dim, num_experts, k, balance_over=balance_over, device=device, **fixed, **settings)
        self.mean_choices = mean_choices
        if mean_choices > k:
            raise ValueError(
                f"mean_choices must be at most k={k}, got {mean_choices}; decrease mean_choices or increase k"
            )
        self.register_buffer("l1_coef", torch.full((), INITIAL_L1_COEF, device=device, dtype=torch.float32))
        # counts of choices and tokens since the last update of the coefficient
        self.register_buffer("choice_counts", torch.zeros(2, dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "l1_coef" in self._buffers:
            self.l1_coef.fill_(INITIAL_L1_COEF)
            self.choice_counts.zero_()

    @property
    def choices_at_balance(self) -> float:
        return self.mean_choices

    @property
    def expected_choices(self) -> float:
        return self.mean_choices

    def decide(self, tokens: Tokens) -> Choices:
        """For each token, choose the experts with the largest positive logits, up to k experts."""
        decided = super().decide(tokens)
        if not self.training:
            return decided
        positive = decided.probs > 0
        is_number = ~decided.probs[..., 0].isnan()  # if one probability is NaN, all are
        if tokens.loss_mask is not None:
            positive, is_number = positive & tokens.loss_mask.unsqueeze(-1), is_number & tokens.loss_mask
        counts = torch.stack([positive.sum(), is_number.sum()])
        return decided._replace(weight=count_in_backward(decided.weight, counts, self.choice_counts))

    def own_choices(self, tokens: Tokens, ranked: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts with the largest logits. A choice is made only if its logit is positive."""
        expert, chosen = super().own_choices(tokens, ranked, probs)
        return expert, both(chosen, probs.detach().gather(-1, expert) > 0)

    def balance_of_scores(
        self, tokens: Tokens, score: Tensor, probs: Tensor, expert: Tensor, chosen: Tensor | None
    ) -> Tensor:
        chosen, score = self.select_counted(tokens, score > 0, score)
        assert chosen is not None
        load, proxy = sum_counts(chosen, tokens.segments), sum_probs(score, tokens.segments)
        settings = tokens.length, tokens.segments, self.mean_choices, self.process_group
        norm = balance_loss_over(self.balance_over, load, proxy, *settings)
        return self.l1_coef.to(norm.dtype) * norm

    @torch.no_grad()
    def update_l1(self, rate: float = 1.2, group: dist.ProcessGroup | None = None) -> None:
        """Multiply `l1_coef` by `rate` if tokens make more than `mean_choices` choices on average, or divide it if they
        make fewer.

        Call this method once per optimizer step. The method counts the positive logits of real tokens. Training forward
        passes since the last call are counted if they were followed by a backward pass. Counts are summed over the
        ranks in `group`, regardless of the gate's `process_group`, and all of these ranks must call this method. By
        default, the group contains all ranks if `torch.distributed` is initialized. If nothing was counted, the
        coefficient is not changed. Under `DistributedDataParallel`, each rank keeps its own counts, as in
        `TopKGating.update_bias`.
        """
        check_number("rate", rate, above=1.0)
        check_process_group("group", group)
        self.scale_l1(rate, self.excess(losses.global_sum(self.choice_counts, ranks_of_batch(group))))
        self.choice_counts.zero_()

    def excess(self, counts: Tensor) -> Tensor:
        """Return the number of choices minus `mean_choices` times the number of tokens, as a 0-dim float64 tensor.
        `counts` `(2,)` contains the number of choices and the number of tokens."""
        choices, tokens = counts.to(torch.float64)
        return choices - self.mean_choices * tokens

    def scale_l1(self, rate: float, excess: Tensor) -> None:
        """Multiply `l1_coef` by `rate` if `excess` is positive, or divide it if `excess` is negative. The result is
        clamped between `MIN_L1_COEF` and `MAX_L1_COEF`."""
        self.l1_coef.mul_((rate ** torch.sign(excess)).to(self.l1_coef)).clamp_(MIN_L1_COEF, MAX_L1_COEF)
