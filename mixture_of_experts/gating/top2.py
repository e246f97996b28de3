"""The top-2 router of GShard, as implemented in TensorFlow's mixture-of-experts code."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixture_of_experts import losses
from mixture_of_experts.dispatch.queues import Priority
from mixture_of_experts.gating import top2_by_kernel
from mixture_of_experts.gating.base import TokenChoiceGate, Tokens
from mixture_of_experts.gating.choices import Choices, both
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.gating.overrides import GIVEN, KEEP_ROUTER_CHOICE, is_computed
from mixture_of_experts.gating.recomputing import gather_chosen, recomputed_on_gpu
from mixture_of_experts.support.checked_module import checked_setting
from mixture_of_experts.support.checks import check_choice, check_flag, check_number, check_size

SecondPolicy = Literal["all", "none", "threshold", "random"]

POLICIES: tuple[SecondPolicy, ...] = get_args(SecondPolicy)


class Top2Gating(TokenChoiceGate):
    """Top-2 gating with a limited expert capacity (GShard, arXiv 2006.16668, algorithm 1).

    Args:
        dim: model dimension, d.
        num_gates: number of experts, e.
        eps: prevents division by zero when the two weights are normalized and when the "random" policy divides by its
            threshold.
        outer_expert_dims: leading dimensions of weights and inputs, used by level two of a two-level layer.
        second_policy_train, second_policy_eval: which second choices are used: "all", "none", "threshold" (if the
            weight exceeds the threshold) or "random" (with probability weight / threshold).
        second_threshold_train, second_threshold_eval: threshold for the policies "threshold" and "random".
        capacity_factor_train, capacity_factor_eval: number of slots per expert as a multiple of n / e (not k n / e), or
            None for a dropless gate.
        min_expert_capacity: minimum number of slots per expert, which takes precedence over all other limits.
        second_place_loss: whether to add half of the balancing loss over second choices. If True, both parts are also
            reported as `losses["first_place"]` and `losses["second_place"]`.
        priority: determines which choices keep their slots: "choice" (GShard), "token" (causal) or "score" (batch
            priority).
        process_group: process group across which the batch is split; see `Gate`.
        device, dtype: device and dtype of the weights, as in `torch.nn`.

    Shape:
        The gate maps `x` `(*outer_expert_dims, b, n, d)` to a `Routing` with 2 choices per token. `w_gating`
        `(*outer_expert_dims, d, e)` is initialized from a normal distribution with standard deviation 1 / sqrt(d).

    Example:
        >>> import torch
        >>> gate = Top2Gating(dim=8, num_gates=4, second_policy_train="all")
        >>> routing = gate(torch.randn(2, 16, 8))
        >>> routing.expert.shape, routing.capacity
        (torch.Size([2, 32]), 5)
    """

    side_inputs: ClassVar[tuple[str, ...]] = (*TokenChoiceGate.side_inputs, GIVEN)
    implementations: ClassVar[Mapping[str, Any]] = {"kernel": top2_by_kernel, **TokenChoiceGate.implementations}
    w_gating: nn.Parameter
    capacity_per_choice = False
    eps: float = checked_setting(check_number, above=0.0)
    second_policy_train: SecondPolicy = checked_setting(check_choice, allowed=POLICIES)
    second_policy_eval: SecondPolicy = checked_setting(check_choice, allowed=POLICIES)
    second_threshold_train: float = checked_setting(check_number, at_least=0.0)
    second_threshold_eval: float = checked_setting(check_number, at_least=0.0)
    second_place_loss: bool = checked_setting(check_flag)

    def __init__(
        self,
        dim: int,
        num_gates: int,
        eps: float = 1e-9,
        outer_expert_dims: int | Sequence[int] = (),
        second_policy_train: SecondPolicy = "random",
        second_policy_eval: SecondPolicy = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float | None = 1.25,
        capacity_factor_eval: float | None = 2.0,
        *,
        min_expert_capacity: int = 4,
        second_place_loss: bool = False,
        priority: Priority = "choice",
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            check_size("num_gates", num_gates),
            2,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            min_expert_capacity=min_expert_capacity,
            priority=priority,
            outer_expert_dims=outer_expert_dims,
            process_group=process_group,
        )
        self.eps = eps
        self.second_policy_train = second_policy_train
        self.second_policy_eval = second_policy_eval
        self.second_threshold_train = second_threshold_train
        self.second_threshold_eval = second_threshold_eval
        self.second_place_loss = second_place_loss
        self.w_gating = self._empty_matrix(device, dtype)
        self.reset_parameters()

    @property
    def num_gates(self) -> int:
        return self.num_experts

    @property
    def expected_choices(self) -> float | None:
        number = {"none": 1.0, "all": 2.0}
        train, eval_ = number.get(self.second_policy_train), number.get(self.second_policy_eval)
        return train if train == eval_ else None

    @property
    def second(self) -> tuple[SecondPolicy, float]:
        """The current mode's policy for second choices, and the threshold of this policy."""
        if self.training:
            return self.second_policy_train, self.second_threshold_train
        return self.second_policy_eval, self.second_threshold_eval

    def variant_reason(self) -> str | None:
        if self.second[0] == "random":
            return "policy 'random' draws which second choices are sent; use 'all', 'none' or 'threshold'"
        return super().variant_reason()

    def decide(self, tokens: Tokens) -> Choices:
        """Make two choices for each token according to algorithm 1 of GShard.

        Tokens with an importance between 0 and 1 make no first choice, and their second choice is their top expert.
        """
        logits, probs = recomputed_on_gpu(self._compute_scores, tokens.x, self.w_gating)

        # if the token has a first choice, its second choice excludes that expert
        fixed = probs.detach()
        expert_1 = fixed.argmax(dim=-1, keepdim=True)
        expert_2 = self._without_first(fixed, expert_1, tokens.makes_all_choices).argmax(dim=-1, keepdim=True)
        expert, chosen = self.apply_overrides(tokens, torch.cat([expert_1, expert_2], dim=-1))
        if chosen is not None:
            expert_1, expert_2 = expert.split(1, dim=-1)

        # losses are computed before weights so that the backward pass accumulates their gradient in place
        parts = self._losses(tokens, probs, expert_1, expert_2, chosen)
        p_1, p_2 = gather_chosen(probs, expert).chunk(2, dim=-1)
        if chosen is not None:
            p_1, p_2 = torch.where(chosen[..., :1], p_1, 0.0), torch.where(chosen[..., 1:], p_2, 0.0)
        weight = self._weights(p_1, p_2, expert_1 == expert_2, tokens.makes_all_choices)
        if self.second_place_loss:
            parts = {"balance": parts["first_place"] + parts["second_place"], **parts}
        if chosen is None:
            log_total = losses.logsumexp_from_expert(gather_chosen(logits, expert_1), p_1)
        else:  # a given expert may have probability 0
            log_total = logits.logsumexp(dim=-1)
        parts["z"] = self.token_mean(tokens, log_total.square())
        primary, sent = weight > 0.5, self._sent(weight)  # in an exact tie, neither choice is primary
        if (given := self.given(tokens)) is not None:  # all given choices are sent, and the first one is primary
            primary = torch.where(given == KEEP_ROUTER_CHOICE, primary, torch.arange(2, device=weight.device) == 0)
            sent = None if sent is None else sent | (given != KEEP_ROUTER_CHOICE)
        return Choices(expert, weight, probs, parts, chosen=chosen, sent=sent, primary=primary)

    def _compute_scores(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = router_logits(x, weight)
        return logits, logits.softmax(dim=-1)

    def allowed(self, tokens: Tokens) -> Tensor | None:
        """Return a `(..., b, n, 2)` bool mask of the choices that the importance allows: both choices if it is 1, only
        the second if it is between 0 and 1, and none if it is 0."""
        if tokens.makes_all_choices is None or tokens.makes_any_choice is None:
            return None
        return torch.stack([tokens.makes_all_choices, tokens.makes_any_choice], dim=-1)

    def _without_first(self, probs: Tensor, expert_1: Tensor, makes_both: Tensor | None) -> Tensor:
        """Return the probabilities with each token's first choice set to 0. Tokens without a first choice are
        unchanged."""
        if makes_both is None:
            return probs.scatter(-1, expert_1, 0.0)
        return torch.where(
            torch.zeros_like(probs, dtype=torch.bool).scatter(-1, expert_1, makes_both[..., None]), 0.0, probs
        )

    def _weights(self, p_1: Tensor, p_2: Tensor, same: Tensor, makes_both: Tensor | None) -> Tensor:
        """Return the normalized weights `(..., b, n, 2)`, which are 0 for first choices that are not made.

        `same` is True if both choices are the same expert because all other probabilities are exactly 0. In this case,
        the weight of the second choice is 0.
        """
        if makes_both is not None:
            makes_both = makes_both.unsqueeze(-1)
            p_1, same = torch.where(makes_both, p_1, 0.0), same & makes_both
        p_2 = p_2.masked_fill(same, 0.0)
        weight = torch.cat([p_1, p_2], dim=-1) / (p_1 + p_2 + self.eps)
        if self.num_experts > 1:  # both choices count, even if a weight is NaN
            return weight
        # 0 divided by a NaN sum is NaN, and a nonzero weight would count as a choice
        return weight.masked_fill(torch.cat([torch.zeros_like(same), same], dim=-1), 0.0)

    def _sent(self, weight: Tensor) -> Tensor | None:
        """Return a `(..., b, n, 2)` bool mask of the choices that are sent according to the current mode's policy, or
        None if all choices are sent."""
        (policy, threshold), second, sent = self.second, weight[..., 1].detach(), None
        if policy == "none":
            sent = torch.zeros_like(second, dtype=torch.bool)
        elif policy == "threshold":
            sent = second > threshold
        elif policy == "random":
            uniform = torch.rand(second.shape, device=second.device, dtype=torch.float32)
            sent = uniform < second / max(threshold, self.eps)
        sent = None if sent is None else torch.stack([torch.ones_like(sent), sent], dim=-1)
        return sent if self.num_experts > 1 else both(sent, weight != 0)  # a single expert allows no second choice

    def named_losses(self, names: Collection[str], tokens: Tokens, choices: Choices) -> dict[str, Tensor]:
        """Return the requested losses. They count the choices that are sent according to the policy.

        The policy also determines whether the losses count externally specified choices that are not computed. If the
        policy is "random", such second choices are not counted, because the outcome of the draw is unknown.
        """
        sent, given = choices.sent, tokens.side.get(GIVEN)
        if given is not None and sent is not None:
            if self.second[0] == "random":  # drawing again would advance the random number generator too far
                of_policy = torch.arange(2, device=given.device) == 0
            else:
                of_policy = self._sent(choices.weight)
            sent = sent if of_policy is None else sent & (is_computed(given) | of_policy)
        return super().named_losses(names, tokens, choices._replace(chosen=both(choices.chosen, sent)))

    def _losses(
        self, tokens: Tokens, probs: Tensor, expert_1: Tensor, expert_2: Tensor, chosen: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the balancing loss over first choices. If `second_place_loss` is set, return two parts: this loss, and
        half of the loss over second choices."""
        first, second = (None, None) if chosen is None else (chosen[..., :1], chosen[..., 1:])
        first_place = self.balance_loss(tokens, probs, expert_1, first)
        if not self.second_place_loss:
            return {"balance": first_place}
        rest = self._without_first(probs, expert_1, tokens.makes_all_choices)
        proxy = rest / (rest.sum(dim=-1, keepdim=True) + 1e-9)
        if tokens.mask is not None:
            proxy = torch.where(tokens.mask.unsqueeze(-1), proxy, 0.0)
        active = tokens.loss_mask if tokens.makes_any_choice is None else tokens.makes_any_choice
        active = None if active is None else active.unsqueeze(-1)
        if second is not None:
            active = second if active is None else second & active
        second_place = 0.5 * self._balance_of_tokens(tokens, expert_2, active, proxy)
        return {"first_place": first_place, "second_place": second_place}


#: layer arguments that configure the default `Top2Gating`, with their defaults
TOP2_SETTINGS: Mapping[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(Top2Gating.__init__).parameters.items()
    if name.startswith(("second_", "capacity_factor_", "min_", "priority"))
}
