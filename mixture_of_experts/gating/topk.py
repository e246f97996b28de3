"""Top-k gating, which computes the logits and scores of all experts, chooses k experts, and weights the choices.

Axes: b (groups), n (tokens per group), d (model dimension), e (experts), k (choices per token). `...` stands for the
outer expert dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import losses
from mixture_of_experts.gating import topk_by_kernel, topk_by_numbers
from mixture_of_experts.gating.balance_losses import BALANCE_OVER, BalanceOver
from mixture_of_experts.gating.base import TokenChoiceGate, TokenChoiceSettings, Tokens
from mixture_of_experts.gating.bias_rules import (
    BiasRule,
    ForwardChoices,
    RuleName,
    check_rule_supports_router,
    compute_bias_step,
    resolve_rule,
    scores_insufficient_reason,
)
from mixture_of_experts.gating.choices import Choices, both, check_k_of_experts, top_choices
from mixture_of_experts.gating.expert_bias import StepsWithoutUpdate, count_in_backward
from mixture_of_experts.gating.logits import RouterLogits, module_logits, router_logits
from mixture_of_experts.gating.overrides import GIVEN
from mixture_of_experts.gating.ranks import ranks_of_batch
from mixture_of_experts.gating.recomputing import gather_chosen, recomputed_on_gpu
from mixture_of_experts.gating.steps import (
    GROUP_SCORES,
    KNOWN_STEPS,
    NO_EPSILON,
    SCORES,
    STEPS,
    AlwaysChosen,
    GroupScore,
    LearnedScale,
    Normalize,
    OpenGroups,
    Score,
    Select,
    Weigh,
    check_step,
)
from mixture_of_experts.support.checked_module import checked_setting
from mixture_of_experts.support.checks import check_choice, check_flag, check_number, check_process_group, check_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

NO_BIAS = "this gate has no expert bias; construct it with TopKGating(..., expert_bias=True)"


class TopKGating(TokenChoiceGate):
    """Top-k gating, in which each token is routed to the k experts with the largest scores.

    This is the router of Switch, Mixtral, OLMoE, Qwen and DeepSeek.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e.
        k: number of choices per token.
        score: function that computes scores from logits: "softmax" over all experts, "sigmoid", "sqrt_softplus"
            (`sqrt(log(1 + exp(logit)))`), or a function of the logits `(..., b, n, e)`.
        normalize: whether to divide the k weights by their sum, or a function of the weights `(..., b, n, k)`. Default:
            True if k > 1. A single normalized weight would always be 1, so the router would receive no gradient.
        scale: factor by which the weights are multiplied.
        bias: whether to add a bias, `b_gating`, to the logits.
        jitter: during training, the router's input is multiplied by noise from U(1 - jitter, 1 + jitter) (Switch, arXiv
            2101.03961).
        num_groups, top_groups: the experts are split into `num_groups` expert groups of equal size. Each token chooses
            only from the `top_groups` groups with the largest `group_score` (DeepSeek-V3, arXiv 2412.19437).
        expert_bias: whether to add a bias to the scores that affects only the choice of experts and is updated by
            `update_bias` (auxiliary-loss-free balancing, arXiv 2408.15664).
        balance_over: "group" computes the balancing loss for each group and averages it, and "batch" computes it over
            the whole batch. The loss equals "balance_group" or "balance_batch" in `BALANCE_LOSSES`, which are computed
            on request.
        logits: a module that replaces the matrix `w_gating` and maps `(..., b, n, d)` to logits `(..., b, n, e)`. It
            can be any network, or `RouterLogits`, which supports normalization, a multiplier and soft-capping.
        select: whether experts are ranked by "score" or by "logits", after adding the expert bias. A custom function
            `(logits, scores, expert_bias)` must return the ranking values `(..., b, n, e)` and handle the bias and
            expert groups itself. Experts with the value -inf are not chosen, so a token with fewer than k other experts
            makes fewer choices.
        group_score: score of an expert group. "two_best" is the sum of the group's two largest scores, and "best" is
            the group's largest score. A custom function receives scores `(..., b, n, num_groups, e / num_groups)`.
            Groups with a score of -inf are closed.
        weigh: whether the weight of a choice is its "score" or the "softmax" over the logits of the chosen experts. A
            custom function `(logits, scores, expert)` must return the weights `(..., b, n, k)`. In this case,
            `normalize` defaults to False.
        eps: value added to the sum of the weights when they are normalized.
        device, dtype: device and dtype of the weights, as in `torch.nn`.
        settings: `capacity_factor_train`, `capacity_factor_eval` (slots per expert as a multiple of k n / e; the
            default None is dropless), `min_expert_capacity=4` (minimum number of slots), `priority` ("choice", "token",
            which is causal, or "score"), `outer_expert_dims` (leading dimensions of weights and inputs) and
            `process_group` (process group across which the batch is split). See `TokenChoiceGate`.

    Shape:
        The gate maps `x` `(*outer_expert_dims, b, n, d)` to a `Routing` with k choices per token. `w_gating` has the
        shape `(*outer_expert_dims, d, e)`, or is None if `logits` is passed.

    Example:
        >>> import torch
        >>> gate = TopKGating(dim=8, num_experts=4, k=2)
        >>> routing = gate(torch.randn(2, 16, 8))
        >>> routing.capacity is None, bool(routing.kept.all())
        (True, True)
    """

    num_groups: int | None
    top_groups: int | None
    logits: nn.Module | None
    w_gating: nn.Parameter | None
    b_gating: nn.Parameter | None

    #: `given_experts` `(..., n, k)` int64 contains the experts of each token, or -1 for no expert; the gate then
    #: computes only their weights. A token's experts must be distinct; this is not checked on a GPU, where values are
    #: not read
    side_inputs: ClassVar[tuple[str, ...]] = (*TokenChoiceGate.side_inputs, GIVEN)
    implementations: ClassVar[Mapping[str, Any]] = {
        "numbers": topk_by_numbers,  # for inference with a single token
        "kernel": topk_by_kernel,  # for inference with a few tokens on an NVIDIA GPU
        **TokenChoiceGate.implementations,
    }
    expert_bias: Tensor | None
    expert_counts: Tensor | None
    expert_histogram: Tensor | None
    score: Score
    select: Select
    group_score: GroupScore
    weigh: Weigh
    normalize: bool | Callable[[Tensor], Tensor]
    keep_dtype: ClassVar[tuple[str, ...]] = ("expert_bias", "expert_counts", "expert_histogram")
    eps: float = checked_setting(check_number, at_least=0.0)
    scale: float = checked_setting(check_number, above=0.0)
    jitter: float = checked_setting(check_number, at_least=0.0, below=1.0)
    #: why scores do not determine the experts' load, for bias rules that read scores; None if they do
    load_beyond_scores: ClassVar[str | None] = None
    balanced_by: Any = None  #: set by `balance_experts` if it updates the bias; None otherwise
    balance_over: BalanceOver = checked_setting(check_choice, allowed=BALANCE_OVER)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        score: Score = "softmax",
        normalize: Normalize = None,
        scale: float = 1.0,
        bias: bool = False,
        jitter: float = 0.0,
        num_groups: int | None = None,
        top_groups: int | None = None,
        expert_bias: bool = False,
        balance_over: BalanceOver = "group",
        logits: nn.Module | None = None,
        select: Select = "score",
        group_score: GroupScore = "two_best",
        weigh: Weigh = "score",
        eps: float = NO_EPSILON,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[TokenChoiceSettings],
    ) -> None:
        super().__init__(dim, num_experts, k, **settings)
        k = self.k
        self.score, self.select, self.group_score, self.weigh = score, select, group_score, weigh
        self.normalize = k > 1 and not callable(weigh) if normalize is None else normalize
        self.eps = eps
        self.scale = scale
        self.jitter = jitter
        self.balance_over = balance_over
        self.num_groups, self.top_groups = check_expert_groups(num_experts, k, num_groups, top_groups)
        bias_of_each = (*self.outer_expert_dims, self.num_experts)
        has_bias = check_flag("bias", bias)
        self.logits = check_logits(logits, has_bias)
        self.w_gating = self._empty_matrix(device, dtype) if logits is None else None
        self.b_gating = nn.Parameter(torch.empty(bias_of_each, device=device, dtype=dtype)) if has_bias else None
        has_expert_bias = check_flag("expert_bias", expert_bias)
        for name, kind in (("expert_bias", torch.float32), ("expert_counts", torch.int64)):
            zeros = torch.zeros(bias_of_each, device=device, dtype=kind) if has_expert_bias else None
            self.register_buffer(name, zeros)
        self.register_buffer("expert_histogram", None, persistent=False)
        self._bias_rule = resolve_rule("bias_rule", "sign")
        self._steps_without_update = StepsWithoutUpdate()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize `w_gating` from a normal distribution with standard deviation 1 / sqrt(d), and set biases and
        counts to 0. A `logits` module is not reset."""
        super().reset_parameters()
        for start_at_zero in (self.b_gating, self.expert_bias, self.expert_counts, self.expert_histogram):
            if start_at_zero is not None:
                nn.init.zeros_(start_at_zero)

    def variant_reason(self) -> str | None:
        if self.training and self.jitter:
            return f"jitter={self.jitter} draws random numbers in training; set it to 0, or call eval()"
        if type(self.logits) not in (type(None), RouterLogits):
            return f"the logits are computed by {type(self.logits).__name__}; use RouterLogits"
        steps = {name: getattr(self, name) for name in (*STEPS, "normalize")}
        for name, step in steps.items():
            if not (isinstance(step, (str, bool)) or step is F.relu or type(step) in KNOWN_STEPS):
                return f"{name} is {step!r}, an unknown function; use one of this package"
        return super().variant_reason()

    def decide(self, tokens: Tokens) -> Choices:
        """Choose the experts with the k largest scores for each token."""
        x = self._apply_jitter(tokens.x) if self.training and self.jitter else tokens.x
        logits, score, probs, log_total = recomputed_on_gpu(self._compute_scores, x, self.w_gating, self.b_gating)
        ranked = self._rank_experts(logits, score)
        expert, chosen = self.own_choices(tokens, ranked, probs)
        top = self.compute_priority(ranked, score.detach(), expert) if self.priority == "score" else None
        if GIVEN in tokens.side:
            expert, chosen = self.apply_overrides(tokens, expert, chosen)
            log_total = logits.logsumexp(dim=-1)  # a given expert may have a low probability
        allowed = both(chosen, self.allowed(tokens))

        # the loss is computed before the weights so that the backward pass accumulates its gradient in place
        balance = self.balance_of_scores(tokens, score, probs, expert, chosen)

        weight = self._compute_weights(logits, score, expert, chosen)
        prob = weight[..., :1]
        if allowed is not None:
            weight = torch.where(allowed, weight, 0.0)
        if self.normalize:
            weight = self._normalize_weights(weight, allowed)
        if self.scale != 1:
            weight = weight * self.scale
        if self.training and self.expert_bias is not None:
            weight = self._count_in_backward(tokens, weight, logits, score, expert, allowed)
        if log_total is None:  # `log_total` is computed from the first choice
            logit = gather_chosen(logits, expert[..., :1])
            z_loss = losses.z_loss_from_expert(logit, prob, tokens.loss_mask, self.process_group)
        else:
            z_loss = self.token_mean(tokens, log_total.square())
        parts = {"balance": balance, "z": z_loss}
        return Choices(expert, weight, probs, parts, chosen=chosen, priority_score=top)

    def own_choices(self, tokens: Tokens, ranked: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose experts based on their biased scores `(..., b, n, e)`.

        Returns:
            The chosen experts as an int64 tensor `(..., b, n, k)`, best first, and a bool mask of the choices that are
            made, or None if all are made. Choices with a score of -inf are not made. Only custom functions and modules
            can produce such scores, so scores from other sources are not checked.
        """
        of_select = not isinstance(self.select, (str, AlwaysChosen, OpenGroups))
        of_logits = self.select == "logits" and not isinstance(self.logits, (RouterLogits, type(None)))
        of_groups = self.num_groups is not None and not isinstance(self.group_score, str)
        if not (of_select or of_logits or of_groups):
            return top_choices(ranked, self.k), None
        # `top_choices` uses -inf to mark experts that are already chosen
        expert = top_choices(ranked.clamp(min=torch.finfo(ranked.dtype).min), self.k)
        return expert, ranked.gather(-1, expert) != -torch.inf

    def compute_priority(self, ranked: Tensor, score: Tensor, expert: Tensor) -> Tensor:
        """Return each token's largest unbiased score `(..., b, n)` among the experts that it may choose."""
        return torch.where(ranked == -torch.inf, 0.0, score).amax(dim=-1)

    def balance_of_scores(
        self, tokens: Tokens, score: Tensor, probs: Tensor, expert: Tensor, chosen: Tensor | None
    ) -> Tensor:
        """Return the balancing loss for the `chosen` choices, given scores and probabilities `(..., b, n, e)`."""
        return self.balance_loss(tokens, probs, expert, chosen, k=self.choices_at_balance)

    def compute_logits(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute logits `(..., b, n, e)` from tokens `(..., b, n, d)`, using either the matrix and its bias or the
        module."""
        if weight is not None:
            return router_logits(x, weight, bias)
        assert self.logits is not None
        return module_logits(self.logits, x, self.num_experts)

    @property
    def first_is_likeliest(self) -> bool:
        """Whether the scores are softmax probabilities and each token's first choice is always its most likely expert.
        If so, the z-loss can be computed from this choice. Subclasses that choose experts differently must return
        False."""
        by_score = self.score == "softmax" and self.select == self.weigh == "score"
        return by_score and self.expert_bias is None and self.num_groups is None

    def _compute_scores(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the logits, scores and probabilities `(..., b, n, e)`, and the logsumexp of the logits `(..., b, n)`.
        The logsumexp is None if it is computed from the first choice."""
        logits = self.compute_logits(x, weight, bias)
        score = SCORES[self.score](logits) if isinstance(self.score, str) else self.score(logits)
        log_total = None if self.first_is_likeliest else logits.logsumexp(dim=-1)
        probs = score if self.score == "softmax" else score / (score.sum(dim=-1, keepdim=True) + NO_EPSILON)
        return logits, score, probs, log_total

    def _apply_jitter(self, x: Tensor) -> Tensor:
        """Multiply `x` by noise from U(1 - jitter, 1 + jitter). The product is computed in at least float32, because
        bfloat16 cannot represent values such as 1.005."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x * torch.empty_like(x, dtype=dtype).uniform_(1 - self.jitter, 1 + self.jitter)

    def _rank_experts(self, logits: Tensor, score: Tensor) -> Tensor:
        """Return the biased scores `(..., b, n, e)` by which experts are chosen. Scores outside the best expert groups
        are -inf."""
        bias = None if self.expert_bias is None else self.expert_bias[..., None, None, :].to(score.dtype)
        if not isinstance(self.select, str):
            return self.select(logits.detach(), score.detach(), bias).detach()
        score = (score if self.select == "score" else logits).detach()
        if bias is not None:
            score = score + bias
        if self.num_groups is None or self.top_groups is None:
            return score
        grouped, of_group = score.unflatten(-1, (self.num_groups, -1)), self.group_score
        totals = GROUP_SCORES[of_group](grouped) if isinstance(of_group, str) else of_group(grouped)
        best = torch.zeros_like(totals, dtype=torch.bool).scatter(-1, top_choices(totals, self.top_groups), True)
        if not isinstance(of_group, str):  # functions may exclude a group with -inf
            best = best & (totals != -torch.inf)
        return torch.where(best.unsqueeze(-1), grouped, -torch.inf).flatten(-2)

    def _compute_weights(self, logits: Tensor, score: Tensor, expert: Tensor, chosen: Tensor | None) -> Tensor:
        """Return the weights `(..., b, n, k)` of the choices before normalization. A softmax is computed only over the
        `chosen` choices."""
        if self.weigh == "score":
            return gather_chosen(score, expert)
        if self.weigh == "softmax":
            logits = gather_chosen(logits, expert)
            if chosen is not None:  # tokens without choices keep their logits, so that no weight is NaN
                logits = torch.where(chosen | ~chosen.any(dim=-1, keepdim=True), logits, -torch.inf)
            return logits.softmax(dim=-1)
        if isinstance(self.weigh, LearnedScale):
            return self.weigh(logits, score, expert, chosen)
        assert callable(self.weigh)
        return self.weigh(logits, score, expert)

    def _normalize_weights(self, weight: Tensor, allowed: Tensor | None) -> Tensor:
        if callable(self.normalize):
            return self.normalize(weight)
        total = weight.sum(dim=-1, keepdim=True)
        # the k largest softmax probabilities are never all 0
        needless = self.first_is_likeliest and allowed is None and self.eps <= NO_EPSILON
        return weight / (total if needless else total + self.eps)

    # The expert bias

    @property
    def bias_rule(self) -> BiasRule:
        """The update rule of the expert bias, which determines what is counted during training. Set this attribute to a
        rule or its name, or use `balance_experts`."""
        return self._bias_rule

    @bias_rule.setter
    def bias_rule(self, rule: RuleName | BiasRule) -> None:
        rule = resolve_rule("bias_rule", rule)
        if self.expert_bias is None or self.expert_counts is None:
            raise RuntimeError(NO_BIAS)
        reason = scores_insufficient_reason(self.k, self.num_experts, self.select, self.num_groups)
        check_rule_supports_router(rule, type(self).__name__, self.load_beyond_scores or reason)
        self._bias_rule, histogram = rule, None
        if rule.bins:
            shape = (*self.expert_bias.shape, rule.bins)
            histogram = torch.zeros(shape, dtype=torch.int32, device=self.expert_bias.device)
            self.expert_counts.zero_()
        self.register_buffer("expert_histogram", histogram, persistent=False)

    @property
    def bias_counts(self) -> Tensor | None:
        """The rule's counts since the last update of the expert bias, or None if there is no expert bias."""
        return self.expert_histogram if self._bias_rule.bins else self.expert_counts

    @property
    def always_chosen(self) -> int:
        """The number of trailing experts that `AlwaysChosen` assigns to every token. Their bias is not updated."""
        return self.select.num if isinstance(self.select, AlwaysChosen) else 0

    def _count_in_backward(
        self,
        tokens: Tokens,
        weight: Tensor,
        logits: Tensor,
        score: Tensor,
        expert: Tensor,
        allowed: Tensor | None,
    ) -> Tensor:
        """Return the weights `(..., b, n, k)` as a tensor whose backward pass adds this forward pass to
        `bias_counts`."""
        bias, counts = self.expert_bias, self.bias_counts
        assert bias is not None
        assert counts is not None
        first = weight.detach()[..., :1]
        known = (first == first).expand_as(weight)  # exclude NaN, which sorts first; gradient scalers skip such steps
        if (padding := tokens.computed_padding) is not None:
            known = known & ~padding
        chosen = (known if allowed is None else allowed & known).flatten(-3, -2)
        counted, scores = None if tokens.loss_mask is None else tokens.loss_mask.flatten(-2), None
        if self._bias_rule.reads_scores:
            scores = (logits if self.select == "logits" else score).flatten(-3, -2)
        made = ForwardChoices(expert.flatten(-3, -2), chosen, scores, counted, bias)
        weight = count_in_backward(weight, self._bias_rule.count(made), counts)
        if torch.is_grad_enabled():
            self._steps_without_update.count_forward(
                next((weight for weight in self.parameters() if weight.requires_grad), None)
            )
        return weight

    @torch.no_grad()
    def update_bias(self, rate: float, group: dist.ProcessGroup | None = None) -> None:
        """Update the expert bias according to its rule, and reset the counts. The default rule adds
        `rate * sign(mean load - load)`.

        Call this method once per optimizer step (`optimizer.register_step_post_hook`). An expert's load is the number
        of real tokens that chose it, before the capacity limit is applied. Training forward passes since the last call
        are counted if they were followed by a backward pass. Loads are summed over the ranks in `group`, and all of
        these ranks must call this method. By default, the group contains all ranks if `torch.distributed` is
        initialized. The gate's `process_group` applies only to losses. All ranks that hold this gate need the same
        bias, so `group` must contain exactly these ranks if other ranks hold other layers. A rate of 0 leaves the bias
        unchanged. Under `DistributedDataParallel`, each rank keeps its own counts. If `find_unused_parameters=True`, a
        warning explains what to call before wrapping the model.
        """
        check_number("rate", rate, at_least=0.0)
        check_process_group("group", group)
        if self.expert_bias is None or (counts := self.bias_counts) is None:
            raise RuntimeError(NO_BIAS)
        total = losses.global_sum(counts, ranks_of_batch(group))
        self.move_bias(compute_bias_step(self._bias_rule, total, self.expert_bias, self.k, rate, self.always_chosen))
        counts.zero_()

    @torch.no_grad()
    def move_bias(self, step: Tensor) -> None:
        """Add `step` `(*outer, e)` to the bias."""
        if self.expert_bias is None:
            raise RuntimeError(NO_BIAS)
        self.expert_bias += step
        self._steps_without_update.reset()

    def check_k(self, k: Any) -> int:
        k = check_k_of_experts(super().check_k(k), self.num_experts)
        check_expert_groups(self.num_experts, k, getattr(self, "num_groups", None), getattr(self, "top_groups", None))
        return k

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STEPS:
            check_step(name, value)
        elif name == "normalize" and not callable(value):
            value = check_flag(name, value)
        if name in STEPS or name == "normalize":
            self.__dict__.get("_modules", {}).pop(name, None)  # remove a previously set module
        super().__setattr__(name, value)


def check_logits(logits: Any, bias: bool) -> nn.Module | None:
    """Check that `logits` is a module or None, and that `bias` is False if it is a module, because only the matrix has
    a bias."""
    if logits is None:
        return None
    if not isinstance(logits, nn.Module):
        got = f"the class {logits.__name__}; instantiate it first" if isinstance(logits, type) else repr(logits)
        raise TypeError(f"`logits` must be a module that maps tokens (..., d) to logits (..., e), or None, got {got}")
    if bias:
        raise ValueError(
            "bias=True cannot be combined with `logits`, which replaces `w_gating`; add the bias to `logits` instead"
        )
    return logits


def check_expert_groups(
    num_experts: int, k: int, num_groups: int | None, top_groups: int | None
) -> tuple[int | None, int | None]:
    """Check that the expert groups have equal sizes, and that the groups open to each token contain at least k
    experts."""
    if num_groups is None and top_groups is None:
        return None, None
    if num_groups is None or top_groups is None:
        raise ValueError(
            f"num_groups and top_groups must be passed together, got num_groups={num_groups!r} and "
            f"top_groups={top_groups!r}; pass both or neither"
        )
    check_size("num_groups", num_groups)
    check_size("top_groups", top_groups)
    if num_experts % num_groups:
        raise ValueError(
            f"num_groups={num_groups} must divide num_experts={num_experts}; pass a different num_groups, or set "
            "num_groups and top_groups to None"
        )
    if top_groups > num_groups or top_groups * (num_experts // num_groups) < k:
        raise ValueError(
            f"top_groups={top_groups} must be at most num_groups={num_groups}, and the chosen groups must contain at "
            f"least k={k} of the {num_experts} experts; change these settings, or set num_groups and top_groups to None"
        )
    return num_groups, top_groups
