"""Computes the expert capacity, which is the number of slots per expert and group.

Axes: b (groups, preceded by outer experts, `...`), n (tokens per group), e (experts), k (choices per token).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from mixture_of_experts.support.private_torch import statically_known_true
from mixture_of_experts.support.tracing import symbolic_max

MAX_DENOMINATOR = 1 << 20  # maximum denominator of a capacity factor


def bounded_ratio(factor: float) -> tuple[int, int]:
    """Convert a capacity factor to a ratio of two integers with a denominator of at most 2^20. The ratio is exact for
    common factors."""
    ratio = Fraction(factor).limit_denominator(MAX_DENOMINATOR) or Fraction(1, MAX_DENOMINATOR)
    return ratio.numerator, ratio.denominator


def expert_capacity(
    num_tokens: int, length: Length | int, factor: tuple[int, int], num_experts: int, minimum: int, k: int = 1
) -> tuple[int, Tensor | None]:
    """Compute the number of slots per expert for a group of n tokens, `max(min(n, int(k n factor / e)), minimum)`. If n
    is 0, the result is 0.

    Args:
        num_tokens: number of tokens per group, n.
        length: number of real tokens in each group, `(..., b)`, or n if every group has n tokens.
        factor: the capacity factor, as returned by `bounded_ratio`.
        num_experts, minimum: number of experts, e, and minimum number of slots.
        k: number of choices per token.

    Returns:
        The number of slots for n tokens, and the number of slots for each group's real tokens, int64 `(..., b)`, or
        None if every group has n tokens.
    """
    slots, tokens = k * factor[0], num_experts * factor[1]
    if slots >= tokens:  # use at most 1 slot per token, so that products cannot overflow int64
        slots = tokens = 1
    # without tokens, there must be no slots, because a second level would count slots as tokens
    empty = statically_known_true(num_tokens == 0)
    capacity = 0 if empty else symbolic_max(num_tokens * slots // tokens, minimum)
    if not isinstance(length, Length):
        return capacity, None
    wanted = length.parts * slots // (tokens * length.parts_per_token)
    return capacity, torch.where(length.parts > 0, wanted.clamp(min=minimum), 0)


@dataclass(frozen=True, eq=False)
class Length:
    """The number of real tokens in each group, stored as a ratio of integers because this number may be fractional at
    level two.

    Attributes:
        parts: `(..., b)` int64, the number of tokens in each group, in units of `1 / parts_per_token`.
        parts_per_token: the number of parts that make up a token.
    """

    parts: Tensor
    parts_per_token: int = 1

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """Return the number of tokens, `(..., b)`, in a floating-point dtype."""
        parts = self.parts.to(dtype)
        return parts if self.parts_per_token == 1 else parts / self.parts_per_token

    def sum(self) -> Length:
        """Return the total number of tokens in all groups for each outer expert (`...`)."""
        return Length(self.parts.sum(dim=-1), self.parts_per_token)
