"""Expert networks: stacked weights for all experts, or a list of plain modules.

Axes: e experts (one or two dimensions, `*e`), s slots of an expert, r rows sorted by expert, d model dim, h hidden dim.

Every kind of experts maps slots `(*e, s, d)` to the same shape. Those that also take `(rows, counts)`, rows sorted by
expert and the number of each expert's, say so by a method `prefers_rows`; those that take the tokens of a whole call
and what its gates decided, `(x, decision=decision)`, by a method `takes_tokens`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mixture_of_experts.checks import check_size, check_sizes
from mixture_of_experts.dispatch import Decision, combine, dispatch
from mixture_of_experts.few import few_rows, is_few
from mixture_of_experts.fused import fused_experts, takes
from mixture_of_experts.grouped import bias_of_rows, expert_matmul, matching
from mixture_of_experts.groups import own
from mixture_of_experts.tracing import is_wrapped

Activation = Callable[..., Any]  # a class or factory of modules, a module, or a function of a tensor


class StackedExperts(nn.Module):
    """Base of experts whose weights are stacked: checks of shapes, initialisation, and the choice of slots or rows."""

    def __init__(self, dim: int, num_experts: int | tuple[int, ...], hidden_dim: int | None, activation: Activation):
        super().__init__()
        self.dim = check_size("dim", dim)
        self.num_experts = num_experts
        self.expert_dims = check_sizes("num_experts", num_experts)
        self.hidden_dim = check_size("hidden_dim", 4 * dim if hidden_dim is None else hidden_dim)
        self.act = make_activation(activation)

    def prefers_rows(self, num_rows: int, num_slots: int, dropless: bool) -> bool:
        """Whether `num_rows` rows without gaps beat `num_slots` slots."""
        if dropless:
            return True
        if torch.compiler.is_exporting():
            return False
        # while a graph is traced the answer must not depend on a length that the graph leaves open
        return statically_known_true(num_rows < num_slots)

    def takes_tokens(self, x: Tensor) -> bool:
        """Whether tokens `(t, d)` of a whole call can be computed at once, from dispatch to combine (`fused.py`).

        Weights are not looked at: FSDP2 has them whole only within a call, and a recomputation must go the same way.
        """
        return self.b1 is None and takes(x, self.act)

    def _whole_call(self, x: Tensor, decision: Decision, first: list[Tensor], last: Tensor) -> Tensor:
        if not all(type(weight) in (Tensor, nn.Parameter) for weight in (*first, last)):
            plan = decision.plan(ragged=True)
            return combine(self.forward(dispatch(x, plan), plan.counts), plan)
        x, *first, last = matching(x, *(weight.flatten(0, -3) for weight in (*first, last)))
        if not self.training and is_few(decision.levels, x, (*first, last)):
            return few_rows(x, decision.levels[0], self.act, first, last)
        return fused_experts(x, decision.plan(ragged=True), self.act, first, last, self.training)

    def _stack(self, *sizes: int) -> nn.Parameter:
        """A parameter for all experts. Zeros touch new pages on all threads; the draw that follows has but one."""
        return nn.Parameter(torch.zeros(*self.expert_dims, *sizes))

    def reset_parameters(self) -> None:
        """Draw the weights anew: uniform of standard deviation 1 / sqrt(fan in) for each expert; biases 0."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("b"):
                nn.init.zeros_(parameter)
            else:
                bound = math.sqrt(3 / parameter.shape[-2])
                nn.init.uniform_(parameter, -bound, bound)

    def _enter(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """Slots `(*e, s, d)` or rows, their shape checked."""
        wanted = (*self.expert_dims, "s", self.dim) if counts is None else ("r", self.dim)
        fits = x.ndim == len(wanted) and all(isinstance(w, str) or w == s for w, s in zip(wanted, x.shape, strict=True))
        if not fits:
            raise ValueError(
                f"{type(self).__name__} of {self.num_experts} experts reads x of shape "
                f"({', '.join(map(str, wanted))}), got {tuple(x.shape)}"
            )
        return x

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor | None) -> Tensor:
        """Every expert's rows times its weight `(*e, p, q)`, plus its bias `(*e, q)`."""
        if counts is not None:
            weight, bias = weight.flatten(0, -3), None if bias is None else bias.flatten(0, -2)
        x, weight = matching(x, weight)
        product = expert_matmul(x, weight, counts)
        if bias is None:
            return product
        return product + bias_of_rows(bias, counts, x.shape[-2]).to(product.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, hidden_dim={self.hidden_dim}"


class Experts(StackedExperts):
    """Two-layer feed-forward experts, `act(x w1) w2`, all computed by batched products.

    Args:
        dim: d, model dimension.
        num_experts: e, or a tuple for a grid of experts.
        hidden_dim: h; 4 d by default.
        activation: a class such as `nn.GELU`, a module, or a function of a tensor.
        bias: adds `b1 (*e, h)` and `b2 (*e, d)`.

    Shape:
        slots `(*e, s, d)` to the same, or rows `(r, d)` with counts `(e,)` to `(r, d)`. `w1` is `(*e, d, h)`, `w2`
        `(*e, h, d)`.

    Example:
        >>> import torch
        >>> experts = Experts(dim=8, num_experts=4)
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
        >>> experts(torch.randn(6, 8), torch.tensor([3, 0, 2, 1])).shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, ...] = 16,
        hidden_dim: int | None = None,
        activation: Activation = nn.GELU,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, activation)
        self.w1 = self._stack(dim, self.hidden_dim)
        self.w2 = self._stack(self.hidden_dim, dim)
        self.b1 = self._stack(self.hidden_dim) if bias else None
        self.b2 = self._stack(dim) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor, counts: Tensor | None = None, *, decision: Decision | None = None) -> Tensor:
        if decision is not None:
            return self._whole_call(x, decision, [self.w1], self.w2)
        x = self._enter(x, counts)
        hidden = self.act(self._product(x, self.w1, self.b1, counts))
        return self._product(hidden, self.w2, self.b2, counts)


class GatedExperts(StackedExperts):
    """Gated feed-forward experts, `(act(x w1) * (x w3)) w2`: SwiGLU, or GEGLU with `activation=nn.GELU`
    (arXiv 2002.05202).

    Args:
        dim: d, model dimension.
        num_experts: e, or a tuple for a grid of experts.
        hidden_dim: h; 4 d by default.
        activation: a class such as `nn.SiLU`, a module, or a function of a tensor.
        bias: adds `b1, b3 (*e, h)` and `b2 (*e, d)`.

    Shape:
        as `Experts`; `w1` and `w3` are `(*e, d, h)`, `w2` is `(*e, h, d)`.

    Example:
        >>> import torch
        >>> experts = GatedExperts(dim=8, num_experts=4, hidden_dim=16)
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, ...] = 16,
        hidden_dim: int | None = None,
        activation: Activation = nn.SiLU,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, activation)
        self.w1 = self._stack(dim, self.hidden_dim)
        self.w3 = self._stack(dim, self.hidden_dim)
        self.w2 = self._stack(self.hidden_dim, dim)
        self.b1 = self._stack(self.hidden_dim) if bias else None
        self.b3 = self._stack(self.hidden_dim) if bias else None
        self.b2 = self._stack(dim) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor, counts: Tensor | None = None, *, decision: Decision | None = None) -> Tensor:
        if decision is not None:
            return self._whole_call(x, decision, [self.w1, self.w3], self.w2)
        x = self._enter(x, counts)
        gate = self.act(self._product(x, self.w1, self.b1, counts))
        hidden = gate * self._product(x, self.w3, self.b3, counts)
        return self._product(hidden, self.w2, self.b2, counts)


class ExpertList(nn.ModuleList):
    """Any modules that map `(n, d)` to `(n, d)` as experts; of a grid of experts the list is outer-major.

    With slots (limited capacity) empty slots reach the modules as zeros. Dropless, every module gets just its own
    rows, at the price of one host sync to learn their numbers. Where those cannot be read (transforms of `torch.func`,
    the meta device) it gets all rows, and while a graph is traced slots again.

    Args:
        experts: the modules, one for each expert.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> experts = ExpertList(nn.Linear(8, 8) for _ in range(4))
        >>> experts(torch.randn(4, 5, 8)).shape
        torch.Size([4, 5, 8])
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        if len(self) == 0:
            raise ValueError("ExpertList needs at least one module, got none")

    @property
    def num_experts(self) -> int:
        return len(self)

    def prefers_rows(self, num_rows: int, num_slots: int, dropless: bool) -> bool:
        """Rows are used only where slots would be n for each expert, and not while a graph is traced."""
        return dropless and not torch.compiler.is_compiling()

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        if counts is not None:
            return self._on_all_rows(x, counts) if counts.is_meta or is_wrapped(counts) else self._on_rows(x, counts)
        slots = x.flatten(0, -3)
        if slots.shape[0] != len(self):
            raise ValueError(f"ExpertList of {len(self)} modules reads x of shape ({len(self)}, s, d), got {x.shape}")
        results = torch.stack([self._run(i, part) for i, part in enumerate(slots.unbind(0))])
        return own(results, x.shape)

    def _on_rows(self, x: Tensor, counts: Tensor) -> Tensor:
        """Every module on its own rows."""
        parts = x.split([*counts.tolist(), x.shape[0] - int(counts.sum())])
        results = [self._run(i, part) for i, part in enumerate(parts[:-1])]
        return torch.cat([*results, torch.zeros_like(parts[-1], dtype=results[0].dtype)])

    def _on_all_rows(self, x: Tensor, counts: Tensor) -> Tensor:
        """Every module on all rows, of which its own are kept: where numbers cannot be read."""
        row, stop = torch.arange(x.shape[0], device=x.device), counts.cumsum(0)
        mine = (row >= (stop - counts).unsqueeze(-1)) & (row < stop.unsqueeze(-1))  # (e, r)
        results = [torch.where(its.unsqueeze(-1), self._run(i, x), 0) for i, its in enumerate(mine.unbind(0))]
        return sum(results[1:], results[0])

    def _run(self, index: int, x: Tensor) -> Tensor:
        result = self[index](x)
        if result.shape != x.shape:
            raise ValueError(
                f"expert {index} ({type(self[index]).__name__}) returned shape {tuple(result.shape)} for tokens of "
                f"shape {tuple(x.shape)}: an expert must keep the shape"
            )
        return result


def make_activation(activation: Activation) -> nn.Module:
    """A module from a class (or other factory of no arguments), a module, or a function of a tensor."""
    if isinstance(activation, nn.Module):
        return activation
    if not callable(activation):
        raise TypeError(f"activation must be a class such as nn.GELU, a module or a function, got {activation!r}")
    made = activation() if _takes_nothing(activation) else FunctionActivation(activation)
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation {activation!r} must make an nn.Module, it made {type(made).__name__}")
    return made


def _takes_nothing(function: Callable) -> bool:
    if isinstance(function, type):
        return True
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # it wants a tensor, or is built in and has no signature
        return False
    return True


class FunctionActivation(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))
