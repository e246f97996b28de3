"""Wrappers for experts: latent experts, zero-computation experts, weighted inputs and normalized outputs.

Axes: t (tokens per call), k (choices), r (rows sorted by expert), e (experts), d (model dimension).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.assignments import Assignments, assign_experts, keep_first_experts
from mixture_of_experts.dispatch.permutation import permute_without_gaps
from mixture_of_experts.dispatch.rows import add_rows, combine, dispatch
from mixture_of_experts.experts import RoutedExperts, reads_assignments, run_experts
from mixture_of_experts.support.batch_invariance import (
    call_module_batch_invariant,
    find_variant_reason,
    not_tokenwise_reason,
    reject_batch_invariance,
)
from mixture_of_experts.support.checks import check_number, check_size
from mixture_of_experts.support.private_torch import get_wrapped_module, has_hooks, unwrap_module

WorksOn = Literal["tokens", "inputs", "outputs", "experts"]


class ExpertsWrapper(RoutedExperts):
    """Base class for experts that wrap other experts.

    Args:
        experts: the wrapped experts.

    Raises:
        ValueError: if the wrapper transforms rows but the wrapped experts transform tokens or rows outside `compute`.
    """

    #: what the wrapper works on: "tokens" (before and after all experts), "inputs" (rows that experts read), "outputs"
    #: (rows that experts return), or "experts" (the set of experts, to which it adds others)
    works_on: ClassVar[WorksOn]

    experts: Any
    num_experts: Any
    dim_out: int | None

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        on_rows = self.works_on in ("inputs", "outputs")
        if on_rows and any(getattr(each, "works_on", "outputs") != "outputs" for each in list_nested_experts(experts)):
            raise ValueError(
                f"{type(self).__name__} cannot wrap {type(experts).__name__}, which also transforms the rows or tokens "
                f"of its experts. Reverse the order so that {type(self).__name__} directly wraps the innermost "
                "experts, as in InputWeightedExperts(NormedExperts(experts, norm))"
            )
        self.experts = experts
        self.num_experts, self.dim_out = getattr(experts, "num_experts", None), getattr(experts, "dim_out", None)


def list_nested_experts(experts: nn.Module) -> list[Any]:
    """Return the experts and all experts nested in them, outermost first, after unwrapping adapters and FSDP2."""
    found: list[Any] = [unwrap_module(experts)]
    while isinstance(found[-1], ExpertsWrapper):
        found.append(unwrap_module(found[-1].experts))
    return found


def reads_slots(experts: nn.Module) -> bool:
    """Return whether the experts, or any experts nested in them, receive slots if the capacity is limited.

    Sharded experts receive assignments, but the class of their local experts determines whether they exchange rows or
    slots.
    """
    for each in [experts, *list_nested_experts(experts)]:
        local = getattr(each, "local_class", None)
        if not reads_assignments(each) or (local is not None and not getattr(local, "reads_assignments", False)):
            return True
    return False


class LatentExperts(ExpertsWrapper):
    """Latent experts, which compute `after(experts(before(x)) + beside(x))`.

    All experts operate in a shared space of lower dimension (arXiv 2601.18089).

    Args:
        experts: any experts whose input width matches the output width of `before`.
        before, after, beside: modules applied to tokens `(t, d)`, or None to skip the step.
        dim_out: width of the outputs. Default: `after.out_features` (an attribute of `nn.Linear`), or `experts.dim_out`
            if `after` is None. If this attribute is missing, the output width equals the input width.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixture_of_experts import Experts, MoE, TopKGating
        >>> latent = LatentExperts(Experts(4, 8), before=nn.Linear(16, 4), after=nn.Linear(4, 16))
        >>> moe = MoE(dim=16, gate=TopKGating(16, 8), experts=latent)
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """

    works_on: ClassVar[WorksOn] = "tokens"
    before: nn.Module | None
    after: nn.Module | None
    beside: nn.Module | None
    dim_out: int | None

    def __init__(
        self,
        experts: nn.Module,
        *,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        beside: nn.Module | None = None,
        dim_out: int | None = None,
    ) -> None:
        super().__init__(experts)
        self.before, self.after, self.beside = before, after, beside
        default = self.dim_out if after is None else getattr(after, "out_features", None)
        self.dim_out = default if dim_out is None else check_size("dim_out", dim_out)

    def variant_reason(self) -> str | None:
        parts = [part for part in (self.before, self.beside, self.after) if part is not None]
        reasons = (find_variant_reason(self.experts), *map(not_tokenwise_reason, parts))
        return next((reason for reason in reasons if reason is not None), None)

    def forward(self, x: Tensor, assignments: Assignments | None = None) -> Tensor:
        inner = x if self.before is None else call_module_batch_invariant(self.before, x)
        out = self.experts(inner) if assignments is None else run_experts(self.experts, inner, assignments)
        if self.beside is not None:
            out = out + call_module_batch_invariant(self.beside, x)
        if self.after is not None:
            out = call_module_batch_invariant(self.after, out)
        return out if assignments is None else torch.where(mask_routed_tokens(assignments).unsqueeze(-1), out, 0)


def mask_routed_tokens(assignments: Assignments) -> Tensor:
    """Return a bool mask `(t,)` of the tokens that are routed to experts, including tokens that exceed the capacity.
    Padding is not routed."""
    if assignments.k is not None:
        return assignments.sent.view(-1, assignments.k).any(dim=-1)
    assert assignments.token is not None
    counts = torch.zeros(assignments.num_tokens, dtype=torch.int64, device=assignments.token.device)
    return counts.scatter_add(0, assignments.token, assignments.sent.to(torch.int64)) > 0


class ZeroComputationExperts(ExpertsWrapper):
    """Extends experts with zero-computation experts, which return the token itself or zero.

    See LongCat-Flash (arXiv 2509.01322) and MoE++ (arXiv 2410.07348). To balance zero-computation and regular experts
    separately, update an expert bias with `SignRule(shares=...)`.

    Args:
        experts: `Experts`, `GatedExperts` or another `RoutedExperts`. These experts keep the ids 0 to e - 1.
        num_identity: number of experts that return the token. The ids of identity experts follow the ids of `experts`.
        num_zero: number of experts that return zero. Zero experts have the highest ids.

    Raises:
        ValueError: if there are identity experts but the output width of `experts` differs from the token width.

    Example:
        >>> import torch
        >>> from mixture_of_experts import Experts, MoE, TopKGating
        >>> experts = ZeroComputationExperts(Experts(dim=16, num_experts=4), num_identity=2)
        >>> moe = MoE(dim=16, gate=TopKGating(16, 6, k=2), experts=experts)
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """

    works_on: ClassVar[WorksOn] = "experts"
    num_identity: int
    num_zero: int
    num_inner_experts: int
    num_experts: Any

    def __init__(self, experts: RoutedExperts, *, num_identity: int = 0, num_zero: int = 0) -> None:
        super().__init__(experts)
        if not isinstance(experts, RoutedExperts) or not isinstance(getattr(experts, "num_experts", None), int):
            raise TypeError(
                "experts must be RoutedExperts with an integer num_experts, such as Experts(...), got "
                f"{type(experts).__name__}; the ids of the added experts follow the ids of these experts"
            )
        for name, number in {"num_identity": num_identity, "num_zero": num_zero}.items():
            if check_number(name, number, at_least=0) != int(number):
                raise ValueError(f"{name} must be an integer of at least 0, got {number!r}")
            setattr(self, name, int(number))
        self.num_inner_experts = self.num_experts
        self.num_experts = self.num_inner_experts + self.num_identity + self.num_zero
        self._check_widths(getattr(experts, "dim", None), self.dim_out)

    def _check_widths(self, dim: int | None, dim_out: int | None) -> None:
        """Raise ValueError if there are identity experts but the output width differs from the token width."""
        if self.num_identity and dim is not None and dim_out is not None and dim != dim_out:
            raise ValueError(
                f"the experts map width {dim} to {dim_out}, but the {self.num_identity} identity experts return tokens "
                f"of width {dim}; set num_identity=0, or use experts with equal input and output widths"
            )

    def variant_reason(self) -> str | None:
        return find_variant_reason(self.experts)

    def forward(self, x: Tensor, assignments: Assignments | None = None) -> Tensor:
        e, stop = self.num_inner_experts, self.num_inner_experts + self.num_identity
        if assignments is None:
            out = self.experts(x[:e])
            self._check_widths(x.shape[-1], out.shape[-1])
            zeros = out.new_zeros(self.num_zero, *out.shape[1:])
            return torch.cat([out, x[e:stop], zeros] if self.num_identity else [out, zeros])
        out = self.experts(x, keep_first_experts(assignments, e))
        self._check_widths(x.shape[-1], out.shape[-1])
        if self.num_identity:
            out = out + _sum_weights_of(assignments, (assignments.expert >= e) & (assignments.expert < stop)) * x
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_identity={self.num_identity}, num_zero={self.num_zero}"


def _sum_weights_of(assignments: Assignments, selected: Tensor) -> Tensor:
    """Sum the weights of each token's `selected` `(a,)` assignments, and return a tensor of shape `(t, 1)`."""
    weight = torch.where(assignments.kept & selected, assignments.weight, 0)
    if assignments.k is not None:
        return weight.view(-1, assignments.k).sum(dim=-1, keepdim=True)
    assert assignments.token is not None
    return add_rows(weight.new_zeros(assignments.num_tokens, 1), assignments.token, weight.unsqueeze(-1))


def _compute_inner_rows(experts: nn.Module, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """Apply experts to rows `(r, d)` sorted by expert.

    If the experts are wrapped, or have hooks or their own `forward`, they are called with each row as a token, because
    adapters, parametrizations, FSDP2 and offloading change or gather the weights only in such a call.
    """
    if get_wrapped_module(experts) is None and not has_hooks(experts) and "forward" not in experts.__dict__:
        return experts.compute(rows, num_tokens_per_expert)  # type: ignore[operator]
    row = torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1)
    expert = torch.bucketize(row, num_tokens_per_expert.cumsum(0), right=True)
    weight = torch.ones(expert.shape, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    return experts(rows, assign_experts(expert, weight, num_tokens_per_expert.shape[0]))


class InputWeightedExperts(ExpertsWrapper):
    """Experts whose inputs, rather than outputs, are multiplied by the routing weights, as in Llama 4.

    Args:
        experts: experts with a `compute` method, such as `GatedExperts`.

    Example:
        >>> import torch
        >>> from mixture_of_experts import GatedExperts, MoE, TopKGating
        >>> gate = TopKGating(16, 4, k=1, score="sigmoid")
        >>> moe = MoE(dim=16, gate=gate, experts=InputWeightedExperts(GatedExperts(16, 4)))
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """

    works_on: ClassVar[WorksOn] = "inputs"

    def forward(self, x: Tensor, assignments: Assignments | None = None) -> Tensor:
        if assignments is None:
            return super().forward(x, assignments)
        reject_batch_invariance(f"{type(self).__name__} implements its own computation of rows")
        permutation = permute_without_gaps(assignments)
        assert permutation.rows_per_expert is not None
        rows = dispatch(x, permutation) * permutation.row_weight().unsqueeze(-1)
        out = self.compute(rows.to(x.dtype), permutation.rows_per_expert)
        return combine(out, permutation._replace(weight=(permutation.weight != 0).to(permutation.weight.dtype)))

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return _compute_inner_rows(self.experts, rows, num_tokens_per_expert)


class NormedExperts(ExpertsWrapper):
    """Experts whose outputs are normalized before they are multiplied by the routing weights.

    Args:
        experts: experts with a `compute` method, such as `GatedExperts`. To combine both wrappers, wrap `NormedExperts`
            in `InputWeightedExperts`, not vice versa.
        norm: a module that normalizes rows `(r, d)`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mixture_of_experts import Experts, MoE, TopKGating
        >>> moe = MoE(dim=16, gate=TopKGating(16, 4), experts=NormedExperts(Experts(16, 4), nn.RMSNorm(16)))
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """

    works_on: ClassVar[WorksOn] = "outputs"
    norm: nn.Module

    def __init__(self, experts: RoutedExperts, norm: nn.Module) -> None:
        super().__init__(experts)
        self.norm = norm

    def compute(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return self.norm(_compute_inner_rows(self.experts, rows, num_tokens_per_expert))


class Scale(nn.Module):
    """Multiplies inputs by a constant factor."""

    is_tokenwise: ClassVar[bool] = True
    factor: float

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = check_number("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


class Shift(nn.Module):
    """Adds a learned vector `bias (d,)`."""

    is_tokenwise: ClassVar[bool] = True
    bias: nn.Parameter

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the vector to 0."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class GatedSharedExpert(nn.Module):
    """A shared expert with a gate, `sigmoid(gate(x)) * module(x)`, as in Qwen2-MoE (arXiv 2407.10671).

    Args:
        module: a module that maps `(..., d)` to the same shape.
        gate: a module that maps `(..., d)` to `(..., 1)`.
    """

    is_tokenwise: ClassVar[bool] = True
    module: nn.Module
    gate: nn.Module

    def __init__(self, module: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.module, self.gate = module, gate

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * self.module(x)
