"""`Permutation`, which maps assignments to the rows that experts compute.

Axes: t tokens per call, k choices, a assignments (t k for token choice), r rows, e experts, b groups, c slots per
expert and group.

A row is the vector of a token as the input or output of one expert. Rows are sorted by expert, in one of three layouts.
Each of them has a function that constructs the permutation:

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
    """The mapping between rows and assignments.

    Attributes:
        row: `(a,)` integers, row of each assignment, or `num_rows` for an assignment without a row.
        assignment: `(r,)` integers, assignment of each row, or a for an empty row.
        weight: `(a,)` weight of each assignment, or 0 for an assignment without a row.
        token: `(r,)` integers, token of each row, or t for an empty row.
        rows_per_expert: `(e,)` int64 number of rows of each expert, including padding; None for slots.
        k: number of choices per token, where assignment i belongs to token i // k; None for expert choice.
        num_tokens, num_rows: t and r.
        expert_dims: e, or for two levels the numbers of outer and inner experts.
        table: another tensor that the products of an implementation read (see `ops/batched.py`), or None.
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
        """Return `(r,)`, the weight of each row, or 0 for empty rows."""
        weight = self.weight.new_zeros(self.num_rows + 1).scatter(0, self.row, self.weight)
        return weight[: self.num_rows]  # assignments without a row write to the last entry

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the permutation by attribute name."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Return the tensors from which `from_saved` restores the permutation in a backward, smaller than `tensors`.

        Tokens are omitted if they can be computed from the assignments. Indices are int32 for fewer than 2^31
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
        """Return the permutation with the sizes of this one and the saved tensors."""
        permutation = self._replace(**tensors)
        if permutation.token is not None or permutation.k is None:
            return permutation
        return permutation._replace(token=find_tokens(permutation.assignment, permutation.k))


def permute_to_slots(assignments: Assignments) -> Permutation:
    """Return the permutation whose rows are all slots `(e, b, c)`, for experts that read slots."""
    return _permute(assignments, assignments.find_slots(), assignments.num_slots, None)


def permute_without_gaps(assignments: Assignments, spare: int = 0) -> Permutation:
    """Return the permutation whose rows are the kept assignments, for grouped products.

    Unused rows may follow them. The last `spare` rows are always unused, while the others may all be filled.
    """
    queue, position, length = assignments.locate()
    row = (length.cumsum(0) - length).gather(0, queue) + position
    return _permute(assignments, row, assignments.max_rows + spare, _join_queues(assignments, length))


def permute_with_padding(assignments: Assignments, pad: Callable[[Tensor], tuple[Tensor, int]]) -> Permutation:
    """Return the permutation in which the caller chooses the number of rows of each expert, for batched products.

    Args:
        assignments: the assignments of a call.
        pad: a function that maps the number of rows that each expert needs, `(e,)` int64, to the number of rows that it
            gets, `(e,)` int64, and the total number of rows, which must be at least their sum.
    """
    queue, position, length = assignments.locate()
    rows_per_expert, num_rows = pad(_join_queues(assignments, length))
    start = rows_per_expert.cumsum(0) - rows_per_expert
    by_expert = length.view(start.shape[0], -1)
    if not statically_known_true(by_expert.shape[1] == 1):
        start = (start.unsqueeze(-1) + by_expert.cumsum(dim=-1) - by_expert).flatten()
    return _permute(assignments, start.gather(0, queue) + position, num_rows, rows_per_expert)


def _join_queues(assignments: Assignments, length: Tensor) -> Tensor:
    """Return `(e,)` int64, the number of rows that each expert needs, given the numbers for its queues `(e b,)`."""
    if statically_known_true(assignments.queues_per_expert == 1):
        return length
    return length.view(math.prod(assignments.expert_dims), -1).sum(dim=-1)


def _permute(assignments: Assignments, row: Tensor, num_rows: int, rows_per_expert: Tensor | None) -> Permutation:
    """Return the permutation that maps kept assignments to the given rows."""
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
    """Return the tokens of assignments if each token has k assignments."""
    return assignment if k == 1 else assignment // k
