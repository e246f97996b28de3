"""Defines `Permutation`, which maps assignments to the rows that experts compute.

Axes: t (tokens per call), k (choices), a (assignments, t k for token choice), r (rows), e (experts), b (groups), c
(slots per expert and group).

A row is a token's input to an expert, or the expert's output for this token. Rows are sorted by expert. There are three
layouts. A separate function constructs the permutation for each layout::

    permute_to_slots        all slots (e, b, c), the same number for each expert, some of them empty. Used for experts
                            that read slots, for batched products if there are fewer slots than choices, and for level
                            one of two, whose slots are the tokens of level two
    permute_without_gaps    only the kept assignments. Used for grouped products, and for experts with `compute`
    permute_with_padding    a number of rows per expert that the caller chooses, some of them empty. Used for
                            `ops/cpu/chunked.py`, with or without a capacity, and for `BlockLayout` of `ops/batched.py`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.dispatch.assignments import Assignments, append
from mixture_of_experts.support.private_torch import statically_known_true


class Permutation(NamedTuple):
    """A mapping between rows and assignments.

    Attributes:
        row: `(a,)` integers, the row of each assignment, or `num_rows` for assignments without a row.
        assignment: `(r,)` integers, the assignment of each row. Empty rows have the value a, the number of assignments.
        weight: `(a,)`, the weight of each assignment, or 0 for assignments without a row.
        token: `(r,)` integers, the index of each row's token. Empty rows have the value t, the number of tokens.
        rows_per_expert: `(e,)` int64, the number of rows per expert, including padding, or None if the rows are slots.
        k: number of choices per token, or None for expert choice. Assignment i belongs to token i // k.
        num_tokens, num_rows: the number of tokens, t, and the number of rows, r.
        expert_dims: number of experts, or the numbers of outer and inner experts for two levels.
        table: an additional tensor for an implementation's matrix products (see `ops/batched.py`), or None.
    """

    row: Tensor
    assignment: Tensor
    weight: Tensor
    token: Tensor
    rows_per_expert: Tensor | None
    k: int | None
    num_tokens: int
    num_rows: int
    expert_dims: tuple[int, ...]
    table: Tensor | None = None

    def row_weight(self) -> Tensor:
        """Return the weight of each row, `(r,)`, or 0 for empty rows."""
        weight = self.weight.new_zeros(self.num_rows + 1).scatter(0, self.row, self.weight)
        return weight[: self.num_rows]  # assignments without a row write to the last entry

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the permutation, keyed by attribute name."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Return the tensors that `from_saved` needs to restore the permutation in a backward pass. These tensors need
        less memory than `tensors`.

        Tokens are omitted if they can be computed from the assignments. Indices are int32 if there are fewer than 2^31
        assignments.
        """
        tensors = self.tensors()
        if statically_known_true(self.row.shape[0] < 1 << 31):
            tensors["assignment"] = self.assignment.to(torch.int32)
        if self.k is not None:
            del tensors["token"]
        return tensors

    def without_tensors(self) -> Permutation:
        """Return the permutation without its tensors."""
        return self._replace(**dict.fromkeys(self.tensors()))

    def from_saved(self, tensors: Mapping[str, Tensor]) -> Permutation:
        """Restore a permutation from this permutation's non-tensor attributes and the saved tensors."""
        permutation = self._replace(**tensors)
        if permutation.token is not None or permutation.k is None:
            return permutation
        return permutation._replace(token=find_tokens(permutation.assignment, permutation.k))


def permute_to_slots(assignments: Assignments) -> Permutation:
    """Return a permutation with one row for each slot `(e, b, c)`."""
    return _permute(assignments, assignments.find_slots(), assignments.num_slots, None)


def permute_without_gaps(assignments: Assignments, spare: int = 0) -> Permutation:
    """Return a permutation with one row for each kept assignment.

    Unused rows may follow the kept assignments. The last `spare` rows are always unused, while all other rows may be
    filled.
    """
    queue, position, length = assignments.locate()
    row = (length.cumsum(0) - length).gather(0, queue) + position
    return _permute(assignments, row, assignments.max_rows + spare, _join_queues(assignments, length))


def permute_with_padding(assignments: Assignments, pad: Callable[[Tensor], tuple[Tensor, int]]) -> Permutation:
    """Return a permutation in which the caller chooses each expert's number of rows.

    Args:
        assignments: the assignments of a call.
        pad: a function of the number of rows that each expert needs, int64 `(e,)`. It returns the number of rows to
            allocate to each expert, int64 `(e,)`, and the total number of rows, which must be at least the sum over all
            experts.
    """
    queue, position, length = assignments.locate()
    rows_per_expert, num_rows = pad(_join_queues(assignments, length))
    start = rows_per_expert.cumsum(0) - rows_per_expert
    by_expert = length.view(start.shape[0], -1)
    if not statically_known_true(by_expert.shape[1] == 1):
        start = (start.unsqueeze(-1) + by_expert.cumsum(dim=-1) - by_expert).flatten()
    return _permute(assignments, start.gather(0, queue) + position, num_rows, rows_per_expert)


def _join_queues(assignments: Assignments, length: Tensor) -> Tensor:
    """Sum the lengths of each expert's queues `(e b,)`, and return the number of rows that each expert needs, as an
    int64 tensor `(e,)`."""
    if statically_known_true(assignments.queues_per_expert == 1):
        return length
    return length.view(math.prod(assignments.expert_dims), -1).sum(dim=-1)


def _permute(assignments: Assignments, row: Tensor, num_rows: int, rows_per_expert: Tensor | None) -> Permutation:
    """Return a permutation that maps kept assignments to the rows in `row`."""
    row = torch.where(assignments.kept, row, num_rows)
    number = row.shape[0]
    empty = row.new_full((num_rows + 1,), number)
    assignment = empty.scatter(0, row, torch.arange(number, device=row.device))[:num_rows]  # the last entry is unused
    if assignments.token is None:
        token = find_tokens(assignment, assignments.k or 1)
    else:
        token = append(assignments.token, assignments.num_tokens)[assignment]
    sizes = (assignments.k, assignments.num_tokens, num_rows, assignments.expert_dims)
    return Permutation(row, assignment, assignments.weight, token, rows_per_expert, *sizes)


def find_tokens(assignment: Tensor, k: int) -> Tensor:
    """Return the token of each assignment. Every token must have k assignments."""
    return assignment if k == 1 else assignment // k
