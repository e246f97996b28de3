"""Defines the mixture-of-experts layers `MoE` and `HeirarchicalMoE`. The latter has two levels of gating.

Axes: b (groups), n (tokens per group), t (tokens per call, b n), d (model dimension), e (experts), c (capacity), s
(slots), r (rows).

A gate decides which experts process each token and returns a `Routing`. Experts receive the tokens and the call's
`Assignments`. Stacked experts run an implementation from `ops` that chooses its own row layout, while other experts
receive rows or slots from `dispatch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mixture_of_experts.arguments import (
    as_experts,
    check_experts,
    check_gate,
    check_packed_call,
    check_same_priority,
    check_shared_expert,
    reject_expert_arguments,
    reject_gate_arguments,
    reject_router_arguments,
    resolve_expert_grid,
    resolve_num_experts,
)
from mixture_of_experts.dispatch.assignments import join_groups
from mixture_of_experts.dispatch.groups import group_side_inputs, mask_and_group, ungroup_and_add_shared, ungroup_state
from mixture_of_experts.dispatch.permutation import permute_to_slots
from mixture_of_experts.dispatch.queues import Priority
from mixture_of_experts.dispatch.routing import Routing, check_routing
from mixture_of_experts.experts import Experts, run_experts
from mixture_of_experts.gating import BALANCE_LOSSES, Top2Gating, get_optional_losses, get_side_inputs
from mixture_of_experts.gating.balance_losses import OF_EXPERT_GROUPS
from mixture_of_experts.gating.levels import (
    check_slots_have_tokens,
    dispatch_to_inner_gate,
    join_levels,
    split_side_inputs_by_level,
)
from mixture_of_experts.gating.overrides import STATE
from mixture_of_experts.gating.top2 import TOP2_SETTINGS, SecondPolicy
from mixture_of_experts.ops.activations import ActivationLike
from mixture_of_experts.support.batch_invariance import check_batch_invariant
from mixture_of_experts.support.checked_module import CheckedModule, checked_setting
from mixture_of_experts.support.checks import check_coefs, check_dtype, check_number, check_optional_size, check_size

if TYPE_CHECKING:
    from typing_extensions import Self

#: losses whose coefficients have dedicated arguments
LOSS_COEF_ARGUMENTS = {"balance": "loss_coef", "z": "z_loss_coef"}


class MoEBase(CheckedModule):
    """Base class for both layers. It stores settings, checks gates and experts, and computes the auxiliary loss."""

    dim: int
    shared_expert: nn.Module | None

    shape_attributes: ClassVar[tuple[str, ...]] = ("dim", "num_experts")
    gate_names: ClassVar[tuple[str, ...]]

    num_experts: Any
    loss_coef: float = checked_setting(check_number, at_least=0.0)
    z_loss_coef: float = checked_setting(check_number, at_least=0.0)
    loss_coefs: Mapping[str, float] = checked_setting(check_coefs, dedicated=LOSS_COEF_ARGUMENTS)
    group_size: int | None = checked_setting(check_optional_size)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        reject_router_arguments(cls, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        dim: int,
        loss_coef: float,
        z_loss_coef: float,
        loss_coefs: Mapping[str, float] | None,
        group_size: int | None,
        shared_expert: nn.Module | None,
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim)
        self.loss_coef = loss_coef
        self.z_loss_coef = z_loss_coef
        self.loss_coefs = {} if loss_coefs is None else loss_coefs
        self.group_size = group_size
        self.shared_expert = shared_expert

    def check_part(self, name: str, part: Any) -> None:
        """Check that a gate or the experts match the layer's dimensions."""
        sizes = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        if name == "experts":
            check_experts(part, self.dim, sizes)
        else:
            level = self.gate_names.index(name)
            check_gate(name, part, self.dim, sizes[level], sizes[:level], is_level=len(sizes) > 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "shared_expert":
            check_shared_expert(value)
        elif name == "experts" or name in self.gate_names:
            self.check_part(name, value)
        super().__setattr__(name, value)

    def aux_loss(self, levels: Sequence[Routing]) -> Tensor:
        """Return the weighted sum of all levels' losses as a 0-dimensional tensor. Losses without a coefficient are
        ignored.

        Raises:
            ValueError: if no gate reports a loss that has a coefficient.
        """
        loss = self.loss_coef * sum((routing.balance_loss for routing in levels[1:]), levels[0].balance_loss)
        for name, coef in (("z", self.z_loss_coef), *self.loss_coefs.items()):
            if coef:
                found = [routing.losses[name] for routing in levels if name in routing.losses]
                if not found:
                    reported = sorted({key for routing in levels for key in routing.losses})
                    raise ValueError(
                        f"loss_coefs contains {name!r}, but this layer's gates report only {reported}. Token-choice "
                        f"gates can also compute {list(BALANCE_LOSSES)}; to compute {' and '.join(OF_EXPERT_GROUPS)}, "
                        "set num_groups on the gate"
                    )
                loss = loss + coef * sum(found[1:], found[0])
        return loss

    def loss_arguments(self, gate: nn.Module) -> dict[str, Any]:
        """Return the keyword argument that requests optional losses from the gate, or an empty dict if no optional
        losses are needed."""
        if not self.loss_coefs:
            return {}
        supported = get_optional_losses(gate)
        names = tuple(name for name, coef in self.loss_coefs.items() if coef and name in supported)
        return {"losses": names} if names else {}

    def reset_parameters(self) -> None:
        """Reinitialize the gates, experts and shared expert by calling `reset_parameters` on each submodule."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def extra_repr(self) -> str:
        parts = [f"{self.dim}, {self.num_experts}", f"loss_coef={self.loss_coef}", f"z_loss_coef={self.z_loss_coef}"]
        parts += [f"loss_coefs={dict(self.loss_coefs)}"] if self.loss_coefs else []
        parts += [f"group_size={self.group_size}"] if self.group_size is not None else []
        return ", ".join(parts)


class MoE(MoEBase):
    """Sparsely gated mixture of experts (Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv 2006.16668).

    This layer replaces the feed-forward layer of a transformer. Each token is processed by only a few experts, so the
    number of parameters grows with the number of experts while the computation per token does not.

    Args:
        dim: model dimension, d.
        num_experts: number of experts, e. Default: inferred from `gate` or `experts`, otherwise 16.
        hidden_dim: hidden dimension of each expert. Default: 4 d.
        activation: activation of the default experts: a class such as `nn.GELU`, a module or a function.
        second_policy_train, second_policy_eval, second_threshold_train, second_threshold_eval: conditions under which a
            token uses its second choice; see `Top2Gating`.
        capacity_factor_train, capacity_factor_eval: expert capacity (slots per expert) as a multiple of n / e, or None
            to disable token dropping. These arguments apply only to the default gate; a custom `gate` has its own
            capacity factors.
        loss_coef: coefficient of the load-balancing loss in `aux_loss`.
        experts: a module that maps `(e, s, d)` to the same shape, or a list of modules that each map `(s, d)` to the
            same shape.
        min_expert_capacity: minimum number of slots per expert and group.
        second_place_loss: whether the load-balancing loss also covers second choices.
        priority: which choices keep their slots when an expert overflows: "choice", "token" (causal) or "score".
        gate: a gate such as `TopKGating(...)`, used instead of the default `Top2Gating` and the arguments that
            configure it.
        group_size: number of tokens per group. Tokens in the same group share the expert capacity. Default: each
            sequence is a group.
        z_loss_coef: coefficient of the router z-loss in `aux_loss`.
        loss_coefs: coefficients of additional losses in `aux_loss`, keyed by their names in `Routing.losses`, as in
            `{"balance_batch": 1e-2}`. Valid names are the losses that the gate reports, the parts of the load-balancing
            loss, and `gating.BALANCE_LOSSES`, which are computed only if they are listed here. For "balance" and "z",
            use `loss_coef` and `z_loss_coef` instead.
        shared_expert: a module that maps `(..., n, d)` to the same shape. It processes every token, and its output is
            added to that of the routed experts. It receives the inputs themselves, not a copy, so an in-place operation
            such as `nn.ReLU(inplace=True)` overwrites the inputs.
        device, dtype: device and dtype of the weights that the layer creates, as in `torch.nn`.

    Shape:
        The inputs have the shape `(..., n, d)`, and the optional bool mask has the shape `(..., n)`. The layer returns
        `out`, which has the same shape and dtype as the inputs, and the 0-dimensional `aux_loss`. This loss is
        `loss_coef * balance_loss + z_loss_coef * z_loss` plus the weighted losses from `loss_coefs`.

        Side inputs `(..., n)` or `(..., n, anything)` contain one entry per token. Pass them as keyword arguments that
        the gate accepts. None values are ignored. `router_input` `(..., n, d)` is passed to the gate in place of the
        inputs. `segment_ids` `(..., n)` are integers that describe packed sequences: tokens in the same row with equal
        ids form a document, and each document is a separate group. They require a token-choice gate and cannot be
        combined with `group_size`. If `router_state` is passed (None in the first layer), the layer also returns its
        router's state `(..., n, anything)`, as in `out, aux_loss, state = moe(x, router_state=state)`. See
        `gating.DepthAveragedGating`.

    Raises:
        ValueError, TypeError: if an argument is invalid. The error is raised before any state changes, and its message
            lists the allowed values.

    Example:
        >>> import torch
        >>> moe = MoE(dim=32, num_experts=4)
        >>> out, aux_loss = moe(torch.randn(2, 10, 32))
        >>> out.shape, aux_loss.shape
        (torch.Size([2, 10, 32]), torch.Size([]))
    """

    gate_names: ClassVar[tuple[str, ...]] = ("gate",)
    num_experts: int

    def __init__(
        self,
        dim: int,
        num_experts: int | None = None,
        hidden_dim: int | None = None,
        activation: ActivationLike = nn.GELU,
        second_policy_train: SecondPolicy = "random",
        second_policy_eval: SecondPolicy = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float | None = 1.25,
        capacity_factor_eval: float | None = 2.0,
        loss_coef: float = 1e-2,
        experts: nn.Module | Sequence[nn.Module] | None = None,
        *,
        min_expert_capacity: int = 4,
        second_place_loss: bool = False,
        priority: Priority = "choice",
        gate: nn.Module | None = None,
        group_size: int | None = None,
        z_loss_coef: float = 0.0,
        loss_coefs: Mapping[str, float] | None = None,
        shared_expert: nn.Module | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("dtype", dtype)
        super().__init__(dim, loss_coef, z_loss_coef, loss_coefs, group_size, shared_expert)
        # the arguments of this constructor that configure the default gate
        settings = {name: value for name, value in locals().items() if name in TOP2_SETTINGS}
        experts = as_experts(experts)
        self.num_experts = resolve_num_experts(num_experts, gate, experts)
        if gate is None:
            gate = Top2Gating(dim, self.num_experts, **settings, device=device, dtype=dtype)
        else:
            reject_gate_arguments("gate", settings)
        if experts is None:
            experts = Experts(dim, self.num_experts, hidden_dim, activation, device=device, dtype=dtype)
        else:
            reject_expert_arguments(hidden_dim, activation)
        self.gate = gate
        self.experts = experts

    def forward(self, inputs: Tensor, mask: Tensor | None = None, **side: Tensor) -> tuple[Tensor, ...]:
        check_batch_invariant(inputs, gate=self.gate, experts=self.experts, shared_expert=self.shared_expert)
        if side:
            check_packed_call(side, self.group_size, [self.gate], self.experts)
        x, groups, group_mask = mask_and_group(inputs, mask, self.dim, self.group_size)
        read = group_side_inputs(side, get_side_inputs(self.gate), mask, inputs.shape[:-1], groups) if side else {}
        routing = check_routing("gate", self.gate(groups, mask=group_mask, **self.loss_arguments(self.gate), **read))
        out = run_experts(self.experts, groups.flatten(0, 1), join_groups(routing))
        results = ungroup_and_add_shared(out, x, mask, self.shared_expert), self.aux_loss([routing])
        return (*results, ungroup_state(routing.state, x)) if STATE in side else results


class HeirarchicalMoE(MoEBase):
    """Mixture of experts with two levels of gating over a grid of experts (Shazeer et al. 2017, appendix B; GShard).

    Level one routes each token to outer experts. Each outer expert is a row of inner experts. Level two then routes the
    token to inner experts, using separate router weights for each outer expert. A token's combine weight is the product
    of the weights from both levels. The level-two gate reads tokens from the level-one slots, while the experts read
    tokens from the inputs.

    Args:
        num_experts: `(eo, ei)`, the numbers of outer and inner experts. Default: inferred from the gates or `experts`,
            otherwise (4, 4).
        gate_outer, gate_inner: token-choice gates for levels one and two that replace the default `Top2Gating`.
            `gate_inner` must have `outer_expert_dims=(eo,)`.
        capacity_factor_second_level: capacity factor of level two during training and evaluation. Default: same as
            level one.
        other arguments: see `MoE`. Gating arguments apply to both levels. `experts` maps `(eo, ei, s, d)` to the same
            shape, or is a list of eo * ei modules in outer-major order.

    Shape:
        See `MoE`. The load-balancing loss is the sum of both levels' losses. Side inputs are passed to the gates that
        accept them. `given_experts` `(..., n, k)` specifies the level-one choices, and `given_experts_inner`
        `(..., n, k, k2)` specifies the level-two choices for each level-one choice.

    Example:
        >>> import torch
        >>> moe = HeirarchicalMoE(dim=32, num_experts=(2, 4))
        >>> out, aux_loss = moe(torch.randn(2, 10, 32))
        >>> out.shape
        torch.Size([2, 10, 32])
    """

    shape_attributes: ClassVar[tuple[str, ...]] = (*MoEBase.shape_attributes, "num_experts_outer", "num_experts_inner")
    gate_names: ClassVar[tuple[str, ...]] = ("gate_outer", "gate_inner")
    num_experts_outer: int
    num_experts_inner: int

    num_experts: tuple[int, int]
    gate_outer: Any  # a token-choice gate, or a module that wraps one

    def __init__(
        self,
        dim: int,
        num_experts: tuple[int, int] | None = None,
        hidden_dim: int | None = None,
        activation: ActivationLike = nn.GELU,
        second_policy_train: SecondPolicy = "random",
        second_policy_eval: SecondPolicy = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float | None = 1.25,
        capacity_factor_eval: float | None = 2.0,
        loss_coef: float = 1e-2,
        experts: nn.Module | Sequence[nn.Module] | None = None,
        *,
        min_expert_capacity: int = 4,
        second_place_loss: bool = False,
        priority: Priority = "choice",
        gate_outer: nn.Module | None = None,
        gate_inner: nn.Module | None = None,
        capacity_factor_second_level: float | None = None,
        group_size: int | None = None,
        z_loss_coef: float = 0.0,
        loss_coefs: Mapping[str, float] | None = None,
        shared_expert: nn.Module | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("dtype", dtype)
        super().__init__(dim, loss_coef, z_loss_coef, loss_coefs, group_size, shared_expert)
        # the arguments of this constructor that configure the default gate
        settings = {name: value for name, value in locals().items() if name in TOP2_SETTINGS}
        experts = as_experts(experts)
        outer, inner = self.num_experts = resolve_expert_grid(num_experts, gate_outer, gate_inner, experts)
        self.num_experts_outer, self.num_experts_inner = outer, inner
        if gate_outer is not None and gate_inner is not None:
            reject_gate_arguments("gate_outer and gate_inner", settings)
        check_same_priority("gate_outer", gate_outer, priority)
        check_same_priority("gate_inner", gate_inner, priority)
        if gate_inner is not None and capacity_factor_second_level is not None:
            raise ValueError(
                f"capacity_factor_second_level={capacity_factor_second_level!r} configures the default second gate, "
                "but gate_inner was passed; set the capacity factors of gate_inner instead"
            )
        factory: Any = dict(device=device, dtype=dtype)
        if gate_outer is None:
            gate_outer = Top2Gating(dim, outer, **settings, **factory)
        if gate_inner is None:
            factor = capacity_factor_second_level
            if factor is not None:
                settings |= dict(capacity_factor_train=factor, capacity_factor_eval=factor)
            gate_inner = Top2Gating(dim, inner, outer_expert_dims=(outer,), **settings, **factory)
        if experts is None:
            experts = Experts(dim, (outer, inner), hidden_dim, activation, **factory)
        else:
            reject_expert_arguments(hidden_dim, activation)
        self.gate_outer = gate_outer
        self.gate_inner = gate_inner
        self.experts = experts

    def forward(self, inputs: Tensor, mask: Tensor | None = None, **side: Tensor) -> tuple[Tensor, ...]:
        check_batch_invariant(inputs, gate_outer=self.gate_outer, gate_inner=self.gate_inner, experts=self.experts)
        if side:
            check_packed_call(side, self.group_size, [self.gate_outer, self.gate_inner], self.experts)
        x, groups, group_mask = mask_and_group(inputs, mask, self.dim, self.group_size)
        outer_side, inner_side = {}, {}
        if side:
            outer_names, inner_names = split_side_inputs_by_level(
                *map(get_side_inputs, (self.gate_outer, self.gate_inner))
            )
            grouped = group_side_inputs(side, outer_names | inner_names, mask, inputs.shape[:-1], groups)
            outer_side = {name: value for name, value in grouped.items() if name in outer_names}
            inner_side = {name: value for name, value in grouped.items() if name in inner_names}
        outer_losses = self.loss_arguments(self.gate_outer)
        outer = check_routing("gate_outer", self.gate_outer(groups, mask=group_mask, **outer_side, **outer_losses))
        outer_permutation = permute_to_slots(join_groups(outer, in_slots=True))
        level_two = dispatch_to_inner_gate(groups, outer, outer_permutation, self.group_size, inner_side)
        inner = check_routing("gate_inner", self.gate_inner(**level_two, **self.loss_arguments(self.gate_inner)))
        check_slots_have_tokens(self.gate_inner, inner, outer_permutation)
        out = run_experts(self.experts, groups.flatten(0, 1), join_levels(outer, outer_permutation, inner))
        results = ungroup_and_add_shared(out, x, mask, self.shared_expert), self.aux_loss([outer, inner])
        return (*results, ungroup_state(outer.state, x)) if STATE in side else results


HierarchicalMoE = HeirarchicalMoE  # 0.2.3 published the class under the misspelled name


class OutputOnly(nn.Module):
    """Wraps a layer so that it returns only its output, for use in `nn.Sequential` or lists of experts.

    Use `collect_aux` to obtain the auxiliary loss. Without this loss, the expert load is not balanced unless the
    layer's gate has an expert bias.

    Args:
        moe: an `MoE` or `HeirarchicalMoE` layer.

    Shape:
        Same as `MoE`, but the loss is not returned. The mask and side inputs are passed to the layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixture_of_experts import MoE, OutputOnly, collect_aux
        >>> model = nn.Sequential(nn.Linear(8, 8), OutputOnly(MoE(dim=8, num_experts=4)))
        >>> with collect_aux(model) as aux:
        ...     loss = model(torch.randn(2, 16, 8)).square().mean() + aux.take()
    """

    moe: nn.Module

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        if not isinstance(moe, nn.Module):
            raise TypeError(f"moe must be a layer such as MoE(...), got {moe!r}")
        self.moe = moe

    def forward(self, inputs: Tensor, mask: Tensor | None = None, **side: Tensor) -> Tensor:
        return self.moe(inputs, mask, **side)[0]
