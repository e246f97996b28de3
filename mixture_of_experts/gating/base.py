"""Base classes for gates. They check the arguments, assign slots to choices, and construct the `Routing`.

Axes: b (groups, preceded by outer experts, `...`), n (tokens per group), d (model dimension), e (experts), k (choices).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixture_of_experts import losses
from mixture_of_experts.dispatch.capacity import Length, expert_capacity
from mixture_of_experts.dispatch.queues import PRIORITIES, Priority, Queues, find_positions_in_documents, queue_up
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.dispatch.segments import SEGMENT_IDS, Segments, check_segment_ids, find_segments
from mixture_of_experts.gating.balance_losses import (
    BALANCE_LOSSES,
    BALANCE_OVER,
    OF_EXPERT_GROUPS,
    BalanceInputs,
    BalanceOver,
    balance_loss_over,
    sum_probs,
)
from mixture_of_experts.gating.capacity_factor import CapacityFactor
from mixture_of_experts.gating.choices import Choices, both, check_choices, check_experts_of_tokens
from mixture_of_experts.gating.decoding import warn_about_decoding
from mixture_of_experts.gating.logits import router_logits
from mixture_of_experts.gating.overrides import (
    COUNTED,
    GIVEN,
    GIVEN_WEIGHTS,
    KEEP_ROUTER_CHOICE,
    Forced,
    check_forced,
    check_overrides,
    forced_experts,
    is_computed,
    merge_overrides,
    override_weights,
)
from mixture_of_experts.gating.ranks import Ranks
from mixture_of_experts.support.checked_module import FixedShapeModule, checked_setting
from mixture_of_experts.support.checks import (
    check_choice,
    check_importance,
    check_lengths,
    check_mask,
    check_process_group,
    check_size,
    check_sizes,
    check_tokens,
)
from mixture_of_experts.support.implementations import Implementation, run_first_supported
from mixture_of_experts.support.private_torch import statically_known_true, unsafe_view, unwrap_module
from mixture_of_experts.support.subclassing import is_unchanged


@dataclass(frozen=True)  # before torch 2.12, torch.compile cannot trace properties of named tuples
class Tokens:
    """The tokens that a gate routes. The mask and the importance determine how many choices each token makes.

    Attributes:
        x: `(..., b, n, d)`, in which masked tokens are set to zero.
        mask: `(..., b, n)` bool mask of the real tokens, or None if there is no padding.
        makes_all_choices: `(..., b, n)` bool mask of the tokens whose importance is 1, which make k choices, or None
            if all tokens make k choices.
        makes_any_choice: `(..., b, n)` bool mask of the tokens whose importance is above 0, which make at least
            their top choice, or None if all tokens make their top choice.
        length: `(..., b)` number of tokens used to compute the capacity and the balancing losses, or n if every group
            has n tokens.
        side: side inputs `(..., b, n)` or `(..., b, n, anything)`, keyed by name.
        losses: names of the losses requested in addition to the gate's own losses.
        segments: the documents in packed rows, or None if rows are not packed. If rows are packed, `length` contains
            the lengths of documents instead of groups.
    """

    x: Tensor
    mask: Tensor | None
    makes_all_choices: Tensor | None
    makes_any_choice: Tensor | None
    length: Length | int
    side: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Collection[str] = ()
    segments: Segments | None = None

    @property
    def num_tokens(self) -> int:
        return self.x.shape[-2]

    @property
    def loss_mask(self) -> Tensor | None:
        """A `(..., b, n)` bool mask of the tokens that contribute to losses because they make all k choices, or None if
        all tokens contribute."""
        return self.mask if self.makes_all_choices is None else self.makes_all_choices

    @property
    def computed_padding(self) -> Tensor | None:
        """A `(..., b, n, 1)` bool mask of padding tokens whose choices are computed but not counted, or None if there
        are no such tokens."""
        return None if self.mask is None or self.makes_all_choices is not None else ~self.mask.unsqueeze(-1)


class Gate(FixedShapeModule):
    """Base class for all gates. It stores the dimensions and checks the arguments.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e.
        outer_expert_dims: leading dimensions of the weights and inputs. Each outer expert has its own router.
        process_group: process group across which the batch is split. Losses are computed over the whole batch, or over
            only this rank's tokens if the process group is None.
    """

    dim: int
    num_experts: int
    outer_expert_dims: tuple[int, ...]

    shape_attributes: ClassVar[tuple[str, ...]] = ("dim", "num_experts", "outer_expert_dims")
    #: names of the side inputs that the gate reads; every gate accepts `router_input` `(..., n, d)`, which replaces x
    side_inputs: ClassVar[tuple[str, ...]] = ("router_input",)
    #: names of the losses that the gate computes only on request, as in `gate(x, losses=names)`
    optional_losses: ClassVar[tuple[str, ...]] = ()
    #: names of buffers that keep their dtype when the module is cast, such as a bias that is updated in small steps
    keep_dtype: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        outer_expert_dims: int | Sequence[int] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.num_experts = check_size("num_experts", num_experts)
        self.outer_expert_dims = check_sizes("outer_expert_dims", outer_expert_dims)
        self.process_group = process_group

    def _empty_matrix(self, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
        """Return an uninitialized router matrix `(*outer, d, e)`."""
        shape = (*self.outer_expert_dims, self.dim, self.num_experts)
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialize `w_gating`, if present, from a normal distribution with standard deviation 1 / sqrt(d)."""
        if isinstance(weight := getattr(self, "w_gating", None), Tensor):
            nn.init.normal_(weight, std=self.dim**-0.5)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group across which the batch is split. Copies of the gate keep the process group, and so do
        unpickled gates if the group still exists."""
        return self._ranks.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._ranks = Ranks(check_process_group("process_group", group))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.keep_dtype}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = getattr(self, name)
            if buffer is not None and cast.dtype != buffer.dtype:
                setattr(self, name, buffer.to(cast.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = {name: getattr(self, name) for name in self.keep_dtype}
        super()._load_from_state_dict(*args, **kwargs)
        for name, buffer in before.items():
            if buffer is not None:  # `assign=True` replaces buffers
                setattr(self, name, getattr(self, name).to(buffer.dtype))

    def variant_reason(self) -> str | None:
        """Return the reason why the choices or the exact bits of their weights may depend on the batch even under
        `ops.use("batch_invariant")`, or None if they are independent of the batch.

        Override this method if the class processes several tokens jointly or computes logits without `product`.
        """
        return f"{type(self).__name__} does not declare that it routes each token independently"

    def read(
        self,
        x: Tensor,
        importance: Tensor | None = None,
        mask: Tensor | None = None,
        length: Length | Tensor | None = None,
        side: Mapping[str, Tensor] | None = None,
        losses: Collection[str] = (),
    ) -> Tokens:
        """Check the arguments of `TokenChoiceGate.forward`, combine the mask with the importance, and return the
        `Tokens`."""
        outer, side = self.outer_expert_dims, dict(side or {})
        if unknown := sorted(side.keys() - set(self.side_inputs)):
            names = ", ".join(map(repr, unknown))
            raise TypeError(
                f"{type(self).__name__} does not support the side input {names}; it reads {', '.join(self.side_inputs)}"
            )
        check_tokens("x", x, self.dim, min_ndim=3)
        if (router_input := side.pop("router_input", None)) is not None:
            check_tokens("router_input", router_input, self.dim, min_ndim=3)
            x = router_input
        if x.ndim != 3 + len(outer) or tuple(x.shape[: len(outer)]) != outer:
            wanted = ", ".join([*map(str, outer), "b", "n", str(self.dim)])
            raise ValueError(f"x must have shape ({wanted}), got {tuple(x.shape)}; add or flatten leading dimensions")
        makes_all_choices = makes_any_choice = None
        if importance is not None:
            check_importance(importance, x.shape[:-1])
            makes_all_choices, makes_any_choice = importance == 1, importance > 0
        if (counted := side.pop(COUNTED, None)) is not None:  # padding is computed but not counted
            self._check_counted(counted, x, importance, mask)
            mask = counted
        elif mask is not None:
            check_mask(mask, x.shape[:-1])
            x = torch.where(mask.unsqueeze(-1), x, 0)  # NaN in padding would propagate to the gradient of the weights
            makes_all_choices, makes_any_choice = both(makes_all_choices, mask), both(makes_any_choice, mask)
        segments = None
        if (ids := side.pop(SEGMENT_IDS, None)) is not None:
            segments = self._find_segments(ids, x, mask, length)
            length = Length(segments.length)
        if length is None and mask is not None:
            length = mask.sum(dim=-1)
        if isinstance(length, Tensor):
            length = Length(check_lengths(length, x.shape[:-2]))
        known = x.shape[-2] if length is None else length
        return Tokens(x, mask, makes_all_choices, makes_any_choice, known, side, losses, segments)

    def _find_segments(self, ids: Tensor, x: Tensor, mask: Tensor | None, length: Length | Tensor | None) -> Segments:
        if self.outer_expert_dims or length is not None:
            what = f"outer_expert_dims={self.outer_expert_dims}" if self.outer_expert_dims else "length="
            raise ValueError(
                f"{SEGMENT_IDS} makes each document a group with its own length, so it cannot be combined with {what}. "
                "Pass each document as a separate row with mask= instead"
            )
        return find_segments(check_segment_ids(ids, x.shape[:-1]), mask)

    def _check_counted(self, counted: Tensor, x: Tensor, importance: Tensor | None, mask: Tensor | None) -> None:
        if importance is not None or mask is not None:
            raise ValueError(
                "`counted` cannot be combined with `mask` or `importance`; pass the mask as either `counted` or `mask`"
            )
        if (factor := getattr(self, "capacity_factor", None)) is not None:
            raise ValueError(
                f"`counted` requires a dropless gate, but the gate has a capacity factor of {factor}; pass the mask as "
                "`mask` instead, so that padding uses no slots"
            )
        check_mask(counted, x.shape[:-1], COUNTED)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply tokens `x` by a router matrix, and return logits `(..., b, n, e)` in float32 (float64 for float64
        weights), even under autocast. Custom gates should compute their logits with this method."""
        return router_logits(x, weight, bias)


class TokenChoiceSettings(TypedDict, total=False):
    """Keyword arguments that all token-choice gates share; see `TokenChoiceGate`."""

    capacity_factor_train: float | None
    capacity_factor_eval: float | None
    min_expert_capacity: int
    priority: Priority
    outer_expert_dims: int | Sequence[int]
    process_group: dist.ProcessGroup | None


class TokenChoiceGate(Gate):
    """Base class for gates in which each token chooses its experts.

    Custom gates implement `decide`, which returns the choices of all tokens, their weights, and losses. The base class
    handles masks, expert capacity, priorities, two-level gating and statistics.

    Args:
        dim, num_experts, outer_expert_dims, process_group: see `Gate`.
        k: number of choices per token.
        capacity_factor_train, capacity_factor_eval: number of slots per expert as a multiple of k n / e (n / e if the
            class sets `capacity_per_choice = False`), or None for a dropless gate.
        min_expert_capacity: minimum number of slots per expert, which takes precedence over all other limits.
        priority: determines which choices keep their slots when an expert overflows; see `queues.queue_up`.
    """

    k: int

    #: `counted` `(..., n)` bool replaces the mask of a dropless gate. Tokens where it is False are padding: their
    #: choices are computed, without gradients for the router, but are excluded from all losses, statistics and counts.
    #: `given_weights` `(..., n, k)` replaces the weights of choices; NaN keeps a weight, and gradients flow to the
    #: gate's own weights. `segment_ids` `(..., n)` are the document ids of packed rows: tokens in the same row with
    #: equal ids form a document, which becomes a group
    side_inputs: ClassVar[tuple[str, ...]] = (*Gate.side_inputs, COUNTED, GIVEN_WEIGHTS, SEGMENT_IDS)
    optional_losses: ClassVar[tuple[str, ...]] = tuple(BALANCE_LOSSES)
    #: implementations, keyed by name, fastest first. Each has two functions: `unsupported_reason(gate, tokens)` returns
    #: why it does not support the call, or None, and must check `tokens.segments`; `run(gate, tokens)` returns the
    #: `Routing`. The last implementation, "operators", calls `decide`
    implementations: ClassVar[Mapping[str, Any]] = {
        "operators": Implementation(lambda gate, tokens: None, lambda gate, tokens: gate.decide_and_route(tokens))
    }
    balance_over: BalanceOver = "group"  #: the tokens over which the balancing loss of `decide` is averaged
    #: whether the capacity factor refers to choices (True) or to tokens (False, in `Top2Gating`)
    capacity_per_choice = True
    capacity_factor_train: CapacityFactor = CapacityFactor()
    capacity_factor_eval: CapacityFactor = CapacityFactor()
    _capacity_factor_train: tuple[int, int] | None
    _capacity_factor_eval: tuple[int, int] | None
    min_expert_capacity: int = checked_setting(check_size)
    priority: Priority = checked_setting(check_choice, allowed=PRIORITIES)
    #: "balanced" or "random" if experts are forced (see `force_routing`); None if the gate chooses the experts
    forced: Forced | None = checked_setting(check_forced)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        capacity_factor_train: float | None = None,
        capacity_factor_eval: float | None = None,
        min_expert_capacity: int = 4,
        priority: Priority = "choice",
        outer_expert_dims: int | Sequence[int] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(dim, num_experts, outer_expert_dims=outer_expert_dims, process_group=process_group)
        self.k = k
        self.capacity_factor_train = capacity_factor_train
        self.capacity_factor_eval = capacity_factor_eval
        self.min_expert_capacity = min_expert_capacity
        self.priority = priority
        self.forced = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.check_k(value) if name == "k" else value)

    def check_k(self, k: Any) -> int:
        """Return `k`, or raise ValueError if the gate does not support k choices per token."""
        return check_size("k", k)

    def variant_reason(self) -> str | None:
        if self.capacity_factor is not None:
            return "a limited capacity may drop choices because of other tokens; set the capacity factors to None"
        if self.outer_expert_dims:
            return "the first of two levels may drop tokens; use a layer with one level"
        if self.forced is not None:
            return f"{self.forced} experts are forced depending on a token's position in the batch; exit force_routing"
        return None

    @property
    def capacity_factor(self) -> float | None:
        """The capacity factor for the current mode (training or evaluation)."""
        return self.capacity_factor_train if self.training else self.capacity_factor_eval

    @property
    def choices_at_balance(self) -> float:
        """The intended number of choices per token, used to normalize balancing losses. The default is k."""
        return self.k

    @property
    def expected_choices(self) -> float | None:
        """The mean number of choices per token, or None if the scores determine how many of the k choices are made."""
        return self.k

    def apply_overrides(
        self, tokens: Tokens, expert: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Replace the gate's own choices with those specified by the side input "given_experts".

        Call this method in `decide` if the gate lists "given_experts" in its `side_inputs`. This input is an int64
        tensor `(..., b, n, k)`. Each element is an expert id, -1 for no choice, or another value described in
        `gating/overrides.py`.

        Args:
            tokens: the argument passed to `decide`.
            expert: `(..., b, n, k)` int64, the gate's own choices.
            chosen: `(..., b, n, k)` bool mask of the choices that the gate makes, or None if it makes all of them.

        Returns:
            The `expert` and `chosen` arguments for `Choices`. Chosen experts receive a share of the token's weight,
            even if the side input excludes them from computation.
        """
        return merge_overrides(self.given(tokens), expert, chosen)

    def given(self, tokens: Tokens) -> Tensor | None:
        """Check and return the externally specified choices `(..., b, n, k)`, or return None if there are none."""
        given = tokens.side.get(GIVEN)
        if given is None:
            return None
        wanted = (*tokens.x.shape[:-1], self.k)
        if given.shape != wanted or given.dtype != torch.int64:
            raise ValueError(
                f"{GIVEN} must be an int64 tensor of shape {wanted}, got {given.dtype} {tuple(given.shape)}"
            )
        if (padding := tokens.computed_padding) is not None:  # ignore choices passed for padding
            given = torch.where(padding, KEEP_ROUTER_CHOICE, given)
        if self.forced is None:
            check_overrides(
                given,
                self.num_experts,
                tokens.loss_mask if tokens.makes_any_choice is None else tokens.makes_any_choice,
            )
        return given

    def decide(self, tokens: Tokens) -> Choices:
        """Return the choices of all tokens. Custom gates must implement this method.

        Choices that the mask or the importance does not allow are removed afterwards. Losses must cover only the tokens
        in `tokens.loss_mask`; the methods `balance_loss`, `z_loss` and `token_mean` ensure this. Return losses even if
        the layer has no coefficient for them, because they are included in the statistics. The class attribute
        `side_inputs` must list the side inputs that the gate reads. Call `apply_overrides` to support externally
        specified choices.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decide(tokens), which returns Choices")

    def forward(
        self,
        x: Tensor,
        importance: Tensor | None = None,
        mask: Tensor | None = None,
        length: Length | Tensor | None = None,
        losses: Collection[str] = (),
        **side: Tensor,
    ) -> Routing:
        """Return the `Routing`, which assigns tokens to experts.

        Args:
            x: `(*outer, b, n, d)`.
            importance: `(*outer, b, n)`. Tokens with importance 1 make k choices, and tokens with importance 0 make
                none. All other tokens make only their top choice and are not counted in losses.
            mask: `(*outer, b, n)` bool, True for real tokens.
            length: number of tokens used to compute the capacity and means, as an integer tensor `(*outer, b)` with
                values up to n or as a `capacity.Length`. Default: the number of real tokens.
            losses: names of additional losses from `optional_losses` to report. Losses over expert groups are omitted
                if the gate has no expert groups.
            side: tensors `(*outer, b, n)` or `(*outer, b, n, anything)` whose names are listed in `side_inputs`. For
                example, `segment_ids` `(b, n)` makes each document in a packed row a group with its own length.
        """
        tokens = self.read(x, importance, mask, length, side, losses)
        if self.forced is not None:
            tokens = self._force(self.forced, tokens)
        if tokens.num_tokens == 1 and not self.training:
            warn_about_decoding(self)
        return run_first_supported("gate", self.implementations, self, tokens)

    def decide_and_route(self, tokens: Tokens) -> Routing:
        """Call `decide`, and return the `Routing` for its choices.

        Raises:
            TypeError: if `decide` does not return `Choices` or requires a side input that was not passed.
        """
        name = type(self).__name__
        try:
            choices = self.decide(tokens)
        except KeyError as error:
            missing = error.args[0] if error.args else None
            if missing not in self.side_inputs or missing in tokens.side:
                raise
            raise TypeError(
                f"{name} requires the side input {missing!r}; call the layer as moe(x, {missing}=...), with one entry "
                "per token"
            ) from None
        if not isinstance(choices, Choices):
            raise TypeError(
                f"{name}.decide must return Choices(expert, weight, probs, losses), got {type(choices).__name__}; "
                "import Choices from mixture_of_experts"
            )
        return self.route(tokens, choices)

    def _force(self, how: Forced, tokens: Tokens) -> Tokens:
        """Return a copy of `tokens` in which forced experts are passed as externally specified choices."""
        if GIVEN in tokens.side:
            raise ValueError(
                f"{GIVEN} cannot be passed while force_routing selects {how} experts; use only one of them"
            )
        x, shape = tokens.x, (*tokens.x.shape[:-1], self.k)
        chosen = self.allowed(tokens)
        if (padding := tokens.computed_padding) is not None:
            chosen = ~padding.expand(shape)
        forced = forced_experts(how, shape, self.num_experts, x.device, chosen, self.process_group)
        return replace(tokens, side={**tokens.side, GIVEN: forced})

    def named_losses(self, names: Collection[str], tokens: Tokens, choices: Choices) -> dict[str, Tensor]:
        """Compute the `BALANCE_LOSSES` in `names` that the gate supports. The losses count all choices that are made,
        including externally specified choices that are not computed."""
        groups, top_groups = getattr(self, "num_groups", None) or 0, getattr(self, "top_groups", None) or 0
        known = [name for name in names if name in BALANCE_LOSSES and (groups or name not in OF_EXPERT_GROUPS)]
        if not known:
            return {}
        chosen, probs = self.select_counted(tokens, choices.chosen, choices.probs)
        load = losses.count_expert_load(choices.expert, chosen, self.num_experts, tokens.segments)
        inputs = BalanceInputs(
            expert=choices.expert,
            chosen=chosen,
            probs=probs,
            load=load,
            proxy=sum_probs(probs, tokens.segments),
            length=tokens.length,
            k=self.choices_at_balance,
            num_groups=groups,
            top_groups=top_groups,
            process_group=self.process_group,
            segments=tokens.segments,
        )
        return {name: BALANCE_LOSSES[name](inputs) for name in known}

    def allowed(self, tokens: Tokens) -> Tensor | None:
        """Return a `(..., b, n, k)` bool mask of the choices that the importance allows, or None if all choices are
        allowed.

        Tokens with importance 1 make k choices, tokens with importance 0 make none, and all other tokens make only
        their top choice. The top choice is choice 0, except in `Top2Gating`, where it is choice 1.
        """
        if tokens.makes_all_choices is None or tokens.makes_any_choice is None:
            return None
        rest = tokens.makes_all_choices.unsqueeze(-1).expand(*tokens.makes_all_choices.shape, self.k - 1)
        return torch.cat([tokens.makes_any_choice.unsqueeze(-1), rest], dim=-1)

    def capacity(self, tokens: Tokens) -> tuple[int | None, Tensor | None]:
        """Return the number of slots per expert and the slot limit of each group `(..., b)`. Both are None if the gate
        is dropless, and the limit is also None if no tokens are masked."""
        factor = self._capacity_factor_train if self.training else self._capacity_factor_eval  # ratios
        if factor is None:
            return None, None
        choices = self.k if self.capacity_per_choice else 1
        sizes = (factor, self.num_experts, self.min_expert_capacity, choices)
        return expert_capacity(tokens.num_tokens, tokens.length, *sizes)

    def balance(
        self, expert: Tensor, counted: Tensor | None, proxy: Tensor, length: Length | int, k: float = 1
    ) -> Tensor:
        """Return the load-balancing loss of GShard and Switch over the tokens that `balance_over` selects. The loss is
        1.0 if choices and probabilities are uniform.

        Args:
            expert: `(..., b, n, k)` int64, the chosen experts.
            counted: `(..., b, n, k)` or `(..., b, n, 1)` bool mask of the choices to count, or None to count all.
            proxy, length, k: see `losses.load_balancing_loss`.
        """
        if torch.is_grad_enabled() or self.training or self.balance_over != "group":
            load = losses.count_expert_load(expert, counted, self.num_experts)
            return BALANCE_OVER[self.balance_over](load, proxy, length, k, self.process_group)
        # avoids creating a load tensor
        return losses.load_balancing_loss_from_choices(expert, counted, proxy, length, k, self.process_group)

    def balance_loss(
        self, tokens: Tokens, probs: Tensor, expert: Tensor, chosen: Tensor | None = None, k: float = 1
    ) -> Tensor:
        """Return the load-balancing loss, computed by `balance`, over the tokens that the mask and the importance
        select.

        Args:
            tokens: the argument passed to `decide`.
            probs: `(..., b, n, e)` router probabilities.
            expert: `(..., b, n, k)` int64, the chosen experts.
            chosen: `(..., b, n, k)` bool mask of the choices that are made, or None if all are made.
            k: number of choices per token. The loss is divided by k so that it is 1.0 at perfect balance.
        """
        chosen, probs = self.select_counted(tokens, chosen, probs)
        return self._balance_of_tokens(tokens, expert, chosen, probs, k)

    def _balance_of_tokens(
        self, tokens: Tokens, expert: Tensor, counted: Tensor | None, proxy: Tensor, k: float = 1
    ) -> Tensor:
        """Return the loss that `balance` computes. The proxy `(..., b, n, e)` must be 0 for uncounted tokens."""
        if tokens.segments is not None:
            if type(self).balance is not TokenChoiceGate.balance:
                raise ValueError(
                    f"{type(self).__name__} overrides `balance`, which does not support packed documents. Override "
                    "`balance_loss` instead, or pass each document as a separate row with mask= instead of segment_ids="
                )
            load = losses.count_expert_load(expert, counted, self.num_experts, tokens.segments)
            settings = tokens.length, tokens.segments, k, self.process_group
            return balance_loss_over(self.balance_over, load, sum_probs(proxy, tokens.segments), *settings)
        alone = statically_known_true(tokens.num_tokens == 1)  # saves a kernel launch during decoding
        return self.balance(expert, counted, proxy.squeeze(-2) if alone else proxy.sum(dim=-2), tokens.length, k)

    def select_counted(self, tokens: Tokens, chosen: Tensor | None, probs: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return a mask of the counted choices, and the probabilities, which are set to 0 for uncounted tokens. The
        mask is a bool tensor `(..., b, n, k)` or `(..., b, n, 1)`, or None if all choices are counted."""
        if tokens.loss_mask is None:
            return chosen, probs
        counted = tokens.loss_mask.unsqueeze(-1)
        return both(chosen, counted), torch.where(counted, probs, 0.0)

    def z_loss(self, tokens: Tokens, logits: Tensor) -> Tensor:
        """Return the router z-loss of logits `(..., b, n, e)`, averaged over the counted tokens."""
        return losses.z_loss(logits, tokens.loss_mask, self.process_group)

    def token_mean(self, tokens: Tokens, values: Tensor) -> Tensor:
        """Return the mean of `values` `(..., b, n)` over the counted tokens on all ranks. Use this method in custom
        losses."""
        return losses.token_mean(values, tokens.loss_mask, self.process_group)

    def route(self, tokens: Tokens, choices: Choices) -> Routing:
        """Convert choices to a `Routing`, and assign slots if the capacity is limited.

        Choices that the mask or the importance does not allow are removed. Shapes and dtypes are checked. For gates
        defined outside this package and for subclasses that override a method, the values of CPU tensors are also
        checked: all experts must exist, and no token may choose the same expert twice.

        Args:
            tokens: the result of `read`.
            choices: the result of `decide`.
        """
        if tokens.losses:
            named = self.named_losses(tokens.losses, tokens, choices)
            choices = choices._replace(losses={**choices.losses, **named})
        tracing, name, probs = torch.compiler.is_compiling(), type(self).__name__, choices.probs
        if not tracing:
            check_choices(name, choices, tokens.x.shape[:-1], self.k, self.num_experts)
        sent, weight, padding_weight = self._restrict_choices(tokens, choices)
        flat = (*probs.shape[:-2], tokens.num_tokens * self.k)
        weight = unsafe_view(weight.contiguous(), flat)
        sent = None if sent is None else sent.flatten(-2)
        has_weight = weight != 0  # choices with weight 0 are not computed
        kept = has_weight if sent is None else sent & has_weight
        if not (tracing or is_unchanged(self)):
            check_experts_of_tokens(name, choices.expert, kept.view_as(choices.expert), self.num_experts)
        expert, is_weight_final = choices.expert.flatten(-2), sent is None  # final weights are 0 unless kept
        queues = None
        capacity, limit = self.capacity(tokens)
        if capacity is None:  # choices with weight 0 are not sent
            sent = kept
        else:  # choices with weight 0 occupy slots
            queues, has_slot = self._apply_capacity(tokens, choices, expert, sent, capacity, limit)
            if has_slot is not None:
                kept, is_weight_final = kept & has_slot, False
            sent = torch.ones_like(kept) if sent is None else sent
        return Routing(
            expert=expert,
            kept=kept,
            weight=weight if is_weight_final else torch.where(kept, weight, 0.0),
            probs=probs,
            num_tokens=tokens.num_tokens,
            num_experts=self.num_experts,
            capacity=capacity,
            k=self.k,
            sent=sent,
            queues=queues,
            limit=limit,
            mask=tokens.mask,
            losses=choices.losses,
            primary=None if choices.primary is None else choices.primary.flatten(-2),
            chosen=None if choices.chosen is None else choices.chosen.flatten(-2),
            padding_weight=None if padding_weight is None else padding_weight.flatten(-2),
            state=choices.state,
            segments=tokens.segments,
        )

    def _apply_capacity(
        self,
        tokens: Tokens,
        choices: Choices,
        expert: Tensor,
        sent: Tensor | None,
        capacity: int,
        limit: Tensor | None,
    ) -> tuple[Queues | None, Tensor | None]:
        """Return the queues and a `(..., b, a)` bool mask of the assignments within the capacity. The queues are None
        for packed rows, and the mask is None if all assignments are within the capacity."""
        score = choices.priority_score
        if self.priority == "score" and score is None:
            score = choices.probs.detach().amax(dim=-1)
        order: Any = self.num_experts, self.k, self.priority, score
        if (segments := tokens.segments) is not None:
            limit = torch.full_like(segments.length, capacity) if limit is None else limit
            position = find_positions_in_documents(expert, sent, segments.document, *order)
            return None, position < segments.map_to_assignments(limit, self.k)
        queues = queue_up(expert, sent, *order)
        if limit is None and statically_known_true(expert.shape[-1] <= capacity):
            return queues, None
        return queues, queues.position < (capacity if limit is None else limit.unsqueeze(-1))

    def _restrict_choices(self, tokens: Tokens, choices: Choices) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return three tensors `(..., b, n, k)`: a mask of the choices that are sent, the weights, and the detached
        weights of computed padding. The mask is None if all choices are sent, and the detached weights are None if no
        padding is computed."""
        sent = both(choices.chosen, choices.sent)
        if not choices.is_masked:
            sent = both(sent, self.allowed(tokens))
        weight, padding_weight, padding = choices.weight, None, tokens.computed_padding
        if (given := tokens.side.get(GIVEN)) is not None:  # ignore choices passed for padding
            computed = is_computed(given)
            sent = both(sent, computed if padding is None else computed | padding)
        if (weights := tokens.side.get(GIVEN_WEIGHTS)) is not None:
            weight = override_weights(weights, weight, padding)
        if padding is not None:
            padding_weight = torch.where(both(sent, padding), weight.detach(), 0.0)  # type: ignore[arg-type]
            sent = both(sent, ~padding.expand_as(weight))
        return sent, weight, padding_weight


def get_side_inputs(gate: nn.Module) -> tuple[str, ...]:
    """Return the names of the side inputs that a gate reads. The gate may be wrapped."""
    return tuple(getattr(unwrap_module(gate), "side_inputs", ()))


def get_optional_losses(gate: nn.Module) -> tuple[str, ...]:
    """Return the names of the losses that a gate computes on request. The gate may be wrapped."""
    return tuple(getattr(unwrap_module(gate), "optional_losses", ()))
