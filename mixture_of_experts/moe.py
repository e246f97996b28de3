"""The layers: `MoE`, and `HeirarchicalMoE` with two levels of gating.

Axes: b groups, n tokens of a group, t = b n tokens of the call, d model dim, e experts, c capacity, s slots or r rows.

A gate decides (`Routing`), tokens are dispatched to rows, experts compute, and the results are combined.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.checks import check_mask, check_number, check_size, check_tokens
from mixture_of_experts.dispatch import Plan, combine, compose, dispatch, plan
from mixture_of_experts.experts import Activation, ExpertList, Experts, StackedExperts
from mixture_of_experts.gating import ExpertChoiceGating, Top2Gating
from mixture_of_experts.gating.top2 import SecondPolicy
from mixture_of_experts.routing import Priority, Routing, split_groups


class Layer(nn.Module):
    """What both layers share."""

    dim: int
    num_experts: int | tuple[int, int]
    loss_coef: float
    z_loss_coef: float
    group_size: int | None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):  # noqa: ANN201
        """As `nn.Module.load_state_dict`, but a state that does not fit changes nothing: torch fills what fits and
        only then complains."""
        own = self.state_dict()
        problems = [
            f"{name} has shape {tuple(state_dict[name].shape)} in the state and {tuple(value.shape)} here"
            for name, value in own.items()
            if name in state_dict and state_dict[name].shape != value.shape
        ]
        if strict:
            problems += [f"{name} is missing" for name in sorted(own.keys() - state_dict.keys())]
            problems += [f"{name} is not of this layer" for name in sorted(state_dict.keys() - own.keys())]
        if problems:
            raise RuntimeError(f"cannot load into {type(self).__name__}, nothing was changed: " + "; ".join(problems))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{self.dim}, {self.num_experts}, loss_coef={self.loss_coef}, z_loss_coef={self.z_loss_coef}{group}"


class MoE(Layer):
    """Sparsely gated mixture of experts (Shazeer et al. 2017, arXiv 1701.06538; GShard, arXiv 2006.16668).

    A drop-in for a transformer's feed-forward layer: every token is computed by a few of the experts, so that
    parameters grow with the number of experts and the computation does not.

    Args:
        dim: d, model dimension.
        num_experts: e; by default what `gate` or `experts` has, else 16.
        hidden_dim: hidden dimension of an expert; 4 d by default.
        activation: of the experts: a class such as `nn.GELU`, a module or a function.
        second_policy_train, second_policy_eval, second_threshold_train, second_threshold_eval: which second choices
            are sent; see `Top2Gating`.
        capacity_factor_train, capacity_factor_eval: slots of an expert in units of n / e; None drops no token.
        loss_coef: coefficient of the balancing loss in `aux_loss`.
        experts: a module that maps `(e, s, d)` to the same shape, or a list of modules that map `(s, d)` so.
        min_expert_capacity: least number of slots of an expert for each group.
        second_place_loss: balances second choices too.
        priority: who gets the slots when an expert overflows: "choice", "token" (causal) or "score".
        gate: a gate (`TopKGating(...)`, one's own) instead of the `Top2Gating` that the arguments above describe.
        group_size: tokens that share an expert's capacity; by default a group is one sequence.
        z_loss_coef: coefficient of the router z-loss in `aux_loss`.
        shared_expert: a module `(..., n, d)` to the same shape whose output is added for every token.

    Shape:
        inputs `(..., n, d)`, mask `(..., n)` bool; returns `out` of the inputs' shape and dtype and a 0-dim
        `aux_loss = loss_coef * balance_loss + z_loss_coef * z_loss`.

    Raises:
        ValueError, TypeError: naming the value, what is allowed and what to do, before anything is changed.

    Example:
        >>> import torch
        >>> moe = MoE(dim=32, num_experts=4)
        >>> out, aux_loss = moe(torch.randn(2, 10, 32))
        >>> out.shape, aux_loss.shape
        (torch.Size([2, 10, 32]), torch.Size([]))
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | None = None,
        hidden_dim: int | None = None,
        activation: Activation = nn.GELU,
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
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        gating = dict(
            second_policy_train=second_policy_train,
            second_policy_eval=second_policy_eval,
            second_threshold_train=second_threshold_train,
            second_threshold_eval=second_threshold_eval,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            min_expert_capacity=min_expert_capacity,
            second_place_loss=second_place_loss,
            priority=priority,
        )
        experts = as_experts(experts)
        self.dim = check_size("dim", dim)
        self.num_experts = settle_num_experts(num_experts, gate, experts)
        if gate is None:
            gate = Top2Gating(dim, self.num_experts, **gating)
        else:
            refuse_gating_arguments("gate", gating)
            check_gate("gate", gate, dim, self.num_experts)
        check_experts(experts, dim, (self.num_experts,))
        self.gate = gate
        self.experts = Experts(dim, self.num_experts, hidden_dim, activation) if experts is None else experts
        self.loss_coef = check_number("loss_coef", loss_coef, at_least=0.0)
        self.z_loss_coef = check_number("z_loss_coef", z_loss_coef, at_least=0.0)
        self.group_size = None if group_size is None else check_size("group_size", group_size)
        self.shared_expert = shared_expert

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, groups, group_mask = enter(inputs, mask, self.dim, self.group_size)
        routing = self.gate(groups, mask=group_mask)
        out = compute(self.experts, groups, [routing])
        aux_loss = self.loss_coef * routing.balance_loss + self.z_loss_coef * routing.z_loss
        return leave(out, x, mask, self.shared_expert), aux_loss


class HeirarchicalMoE(Layer):
    """Mixture of experts with two levels of gating over a grid of experts (Shazeer et al. 2017, appendix B; GShard).

    Level one sends a token to groups of experts, level two, with its own weights for each group, to the experts in
    them; a token's weight is the product of both. Tokens move once.

    Args:
        num_experts: `(eo, ei)`, outer and inner; by default what the gates or `experts` have, else (4, 4).
        gate_outer, gate_inner: token-choice gates of one's own for either level; `gate_inner` has
            `outer_expert_dims=(eo,)`.
        capacity_factor_second_level: capacity factor of level two, in training and eval; by default level one's.
        the others: as `MoE`; gating arguments hold for both levels. `experts` maps `(eo, ei, s, d)` to the same shape,
            or is a list of eo * ei modules, outer-major.

    Shape:
        as `MoE`; the balancing loss is the sum of both levels'.

    Example:
        >>> import torch
        >>> moe = HeirarchicalMoE(dim=32, num_experts=(2, 4))
        >>> out, aux_loss = moe(torch.randn(2, 10, 32))
        >>> out.shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        num_experts: tuple[int, int] | None = None,
        hidden_dim: int | None = None,
        activation: Activation = nn.GELU,
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
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        gating = dict(
            second_policy_train=second_policy_train,
            second_policy_eval=second_policy_eval,
            second_threshold_train=second_threshold_train,
            second_threshold_eval=second_threshold_eval,
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            min_expert_capacity=min_expert_capacity,
            second_place_loss=second_place_loss,
            priority=priority,
        )
        experts = as_experts(experts)
        self.dim = check_size("dim", dim)
        outer, inner = self.num_experts = settle_grid(num_experts, gate_outer, gate_inner, experts)
        self.num_experts_outer, self.num_experts_inner = outer, inner
        if gate_outer is not None and gate_inner is not None:
            refuse_gating_arguments("gate_outer and gate_inner", gating)
        if gate_inner is not None and capacity_factor_second_level is not None:
            raise ValueError(
                f"capacity_factor_second_level={capacity_factor_second_level!r} describes the default second gate; "
                "give it to gate_inner instead"
            )
        self.gate_outer = Top2Gating(dim, outer, **gating) if gate_outer is None else gate_outer
        if capacity_factor_second_level is not None:
            gating.update(
                dict.fromkeys(("capacity_factor_train", "capacity_factor_eval"), capacity_factor_second_level)
            )
        gate_inner = Top2Gating(dim, inner, outer_expert_dims=(outer,), **gating) if gate_inner is None else gate_inner
        self.gate_inner = gate_inner
        check_gate("gate_outer", self.gate_outer, dim, outer, level=True)
        check_gate("gate_inner", self.gate_inner, dim, inner, (outer,), level=True)
        check_experts(experts, dim, (outer, inner))
        self.experts = Experts(dim, (outer, inner), hidden_dim, activation) if experts is None else experts
        self.loss_coef = check_number("loss_coef", loss_coef, at_least=0.0)
        self.z_loss_coef = check_number("z_loss_coef", z_loss_coef, at_least=0.0)
        self.group_size = None if group_size is None else check_size("group_size", group_size)
        self.shared_expert = shared_expert

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, groups, group_mask = enter(inputs, mask, self.dim, self.group_size)
        outer = self.gate_outer(groups, mask=group_mask)
        inner = self.gate_inner(**second_level(groups, outer, self.group_size))
        out = compute(self.experts, groups, [outer, inner])
        balance_loss, z_loss = outer.balance_loss + inner.balance_loss, outer.z_loss + inner.z_loss
        aux_loss = self.loss_coef * balance_loss + self.z_loss_coef * z_loss
        return leave(out, x, mask, self.shared_expert), aux_loss


HierarchicalMoE = HeirarchicalMoE


def enter(
    inputs: Tensor, mask: Tensor | None, dim: int, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the arguments; give the inputs with masked tokens zeroed, the same as groups `(b, n, d)`, and their mask."""
    check_tokens("inputs", inputs, dim, min_ndim=2)
    x = inputs
    if mask is not None:
        check_mask(mask, inputs.shape[:-1])
        x = torch.where(mask.unsqueeze(-1), inputs, 0)  # NaN in the padding would survive a product with 0
    lead = inputs.shape[:-1] if inputs.ndim > 2 else (1, *inputs.shape[:-1])
    shape = (lead[:-1].numel() if isinstance(lead, torch.Size) else 1, lead[-1])
    if group_size is not None:
        shape = group_shape(shape[0] * shape[1], group_size)
    return x, x.reshape(*shape, dim), None if mask is None else mask.reshape(shape)


def group_shape(num_positions: int, group_size: int) -> tuple[int, int]:
    """`(m, n)` of the groups that `group_size` makes; warns when they come out much shorter than asked for."""
    groups = split_groups(num_positions, group_size)
    length = num_positions // groups
    if 0 < length < group_size / 2 and groups > 1:
        warnings.warn(
            f"group_size={group_size} splits {num_positions} positions into {groups} groups of {length}: no number "
            "nearer to it divides them. Pad the input or choose a group_size that divides it",
            stacklevel=3,
        )
    return groups, length


def second_level(groups: Tensor, outer: Routing, group_size: int | None) -> dict[str, Tensor | None]:
    """The slots of level one as the arguments of level two's gate: one group for each (outer expert, group).

    If level one is dropless it hands on what a capacity without overflow would: only occupied slots are tokens, and
    the length that capacity and means reckon with is each expert's fair share of the choices.
    """
    b, n, d = groups.shape
    eo, c = outer.num_experts, outer.slots
    if outer.primary is None or outer.choices is None:
        raise ValueError("gate_outer must be a router of token choice: its Routing has no list of choices")
    slots = plan(outer)
    x = dispatch(groups.flatten(0, 1), slots).view(eo, b, c, d)
    importance = torch.cat([outer.primary.flatten(), outer.primary.new_zeros(1)])[slots.assignment].view(eo, b, c)
    mask = length = None
    if outer.capacity is None:
        mask = importance > 0
        real = groups.new_full((b,), n, dtype=torch.float64) if outer.real is None else outer.real.sum(dim=-1)
        length = (real.to(torch.float64) * outer.choices / eo).expand(eo, b)
    elif outer.limit is not None:
        mask = (torch.arange(c, device=x.device) < outer.limit.unsqueeze(-1)).expand(eo, b, c)
    if group_size is not None and outer.capacity is not None:
        shape = (eo, *group_shape(b * c, group_size))
        x, importance = x.reshape(*shape, d), importance.reshape(shape)
        mask = None if mask is None else mask.reshape(shape)
    arguments = {"x": x, "importance": importance, "mask": mask}
    return arguments if length is None else {**arguments, "length": length}


def compute(experts: nn.Module, groups: Tensor, levels: Sequence[Routing]) -> Tensor:
    """Dispatch the tokens `(b, n, d)` to the experts' rows, run the experts, and combine: `(t, d)`."""
    x = groups.flatten(0, 1)
    if takes_tokens(experts, x):
        return experts(x, plan=make_plan(levels, ragged=True))
    where = make_plan(levels, ragged=prefers_rows(experts, x, levels))
    return combine(run(experts, dispatch(x, where), where), where)


def make_plan(levels: Sequence[Routing], ragged: bool) -> Plan:
    """Plan of one level or two."""
    return compose(*levels, ragged=ragged) if len(levels) == 2 else plan(*levels, ragged=ragged)


def takes_tokens(experts: nn.Module, x: Tensor) -> bool:
    """Whether the experts do dispatch and combine themselves."""
    method = getattr(experts, "takes_tokens", None)
    return method is not None and method(x)


def prefers_rows(experts: nn.Module, x: Tensor, levels: Sequence[Routing]) -> bool:
    """Whether the experts would rather have rows without gaps than slots."""
    method = getattr(experts, "prefers_rows", None)
    if method is None:
        return False
    last = levels[-1]
    num_slots = last.expert.shape[:-1].numel() * last.num_experts * last.slots
    num_rows = num_slots if last.choices is None else x.shape[0]
    for routing in levels:
        num_rows = num_rows * (routing.choices or 1)
    return method(num_rows, num_slots, last.capacity is None)


def run(experts: nn.Module, rows: Tensor, where: Plan) -> Tensor:
    """Experts on rows `(r, d)`: as slots `(*e, s, d)`, or as rows with counts."""
    if where.counts is not None:
        return experts(rows, where.counts)
    each = where.num_rows // math.prod(where.num_experts)
    slots = rows.view(*where.num_experts, each, rows.shape[-1])
    result = experts(slots)
    if not isinstance(result, Tensor) or result.shape != slots.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"experts must return the shape they are given, {tuple(slots.shape)}, got {got}")
    return result.flatten(0, -2)


def leave(out: Tensor, x: Tensor, mask: Tensor | None, shared_expert: nn.Module | None) -> Tensor:
    """The result in the inputs' shape and dtype, with the shared expert's added; masked tokens are exactly 0."""
    out = out.view(x.shape).to(x.dtype)
    if shared_expert is None:
        return out
    shared = shared_expert(x)
    if shared.shape != x.shape:
        raise ValueError(f"shared_expert must keep the shape {tuple(x.shape)}, it returned {tuple(shared.shape)}")
    out = (out + shared).to(x.dtype)
    return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)


def as_experts(experts: object) -> nn.Module | None:
    """A module of all experts, from such a module or a list of single ones."""
    if experts is None:
        return None
    if isinstance(experts, list | tuple | nn.ModuleList) and not isinstance(experts, ExpertList):
        return ExpertList(experts)
    if not isinstance(experts, nn.Module):
        raise TypeError(f"experts must be a module or a list of modules, got {type(experts).__name__}")
    return experts


def settle_num_experts(num_experts: int | None, gate: nn.Module | None, experts: nn.Module | None) -> int:
    """The number asked for, else the gate's, else the experts', else 16; the parts are checked against it later."""
    if num_experts is None:
        num_experts = getattr(gate, "num_experts", None) or getattr(experts, "num_experts", None) or 16
    return check_size("num_experts", num_experts)


def settle_grid(
    num_experts: object, gate_outer: nn.Module | None, gate_inner: nn.Module | None, experts: nn.Module | None
) -> tuple[int, int]:
    """The pair asked for, else the gates', else the experts', else (4, 4)."""
    if num_experts is None:
        default = getattr(experts, "num_experts", None)
        default = default if isinstance(default, tuple) and len(default) == 2 else (4, 4)
        num_experts = tuple(
            getattr(gate, "num_experts", None) or size
            for gate, size in zip((gate_outer, gate_inner), default, strict=True)
        )
    if not isinstance(num_experts, tuple | list) or len(num_experts) != 2:
        raise ValueError(f"num_experts must be a pair (outer, inner) for two levels, got {num_experts!r}")
    return check_size("num_experts[0]", num_experts[0]), check_size("num_experts[1]", num_experts[1])


def refuse_gating_arguments(name: str, gating: dict[str, object]) -> None:
    """A gate that is given has its own settings: arguments for the default one would be ignored."""
    defaults = inspect.signature(MoE.__init__).parameters
    given = [f"{key}={value!r}" for key, value in gating.items() if value != defaults[key].default]
    if given:
        raise ValueError(f"{name} is given, so {', '.join(given)} would do nothing: set it on that gate instead")


def check_gate(
    name: str, gate: nn.Module, dim: int, num_experts: int, outer: tuple[int, ...] = (), level: bool = False
) -> None:
    """Sizes of a gate agree with the layer's, and a level of a hierarchy is a router of token choice."""
    if not isinstance(gate, nn.Module):
        raise TypeError(f"{name} must be a gate such as TopKGating(...), got {type(gate).__name__}")
    if level and isinstance(gate, ExpertChoiceGating):
        raise ValueError(f"{name} must be a router of token choice, got {type(gate).__name__}")
    for what, wanted in (("dim", dim), ("num_experts", num_experts), ("outer_expert_dims", outer)):
        got = getattr(gate, what, wanted)
        if got != wanted:
            raise ValueError(f"{name} has {what}={got}, the layer {what}={wanted}: give both the same")


def check_experts(experts: nn.Module | None, dim: int, num_experts: tuple[int, ...]) -> None:
    """Sizes of the experts, where they tell them, agree with the layer's."""
    if experts is None:
        return
    got = getattr(experts, "num_experts", None)
    count = num_experts[0] if len(num_experts) == 1 else num_experts
    allowed = (None, count, num_experts)
    if isinstance(experts, ExpertList):
        allowed = (torch.Size(num_experts).numel(),)
    if got not in allowed:
        raise ValueError(f"experts has num_experts={got}, the layer num_experts={count}: give both the same")
    if isinstance(experts, StackedExperts) and experts.dim != dim:
        raise ValueError(f"experts has dim={experts.dim}, the layer dim={dim}: give both the same")
