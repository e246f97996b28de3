"""Where the rows that experts compute lie: which row belongs to which assignment, for a whole call.

Axes: t tokens of the call, k choices, a assignments (t k for token choice), r rows, e experts.

Rows lie expert by expert: in slots (equally many for each expert), or, with `rows_per_expert`, without gaps or with
padding after each expert's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts.support.private_torch import statically_known_true


class Plan(NamedTuple):
    """Which row belongs to which assignment.

    Attributes:
        row: `(a,)` integers, row of each assignment; `num_rows` for an assignment without a row.
        assignment: `(r,)` integers, assignment of each row; a where the row is empty.
        weight: `(a,)` weight of each assignment, 0 where it has no row.
        token: `(r,)` integers, token of each row; t where the row is empty.
        rows_per_expert: `(e,)` int64 rows of each expert, padding among them; None for slots.
        k: assignment i belongs to token i // k; None for expert choice.
        num_tokens, num_rows: t and r.
        num_experts: e, as a tuple (two numbers for two levels).
        table: what else the products of an implementation read, see `ops/batched.py`; or None.
    """

    row: Tensor
    assignment: Tensor
    weight: Tensor
    token: Tensor
    rows_per_expert: Tensor | None
    k: int | None
    num_tokens: int
    num_rows: int
    num_experts: tuple[int, ...]
    table: Tensor | None = None

    def row_weight(self) -> Tensor:
        """`(r,)` the weight of each row, 0 where it is empty."""
        weight = self.weight.new_zeros(self.num_rows + 1).scatter(0, self.row, self.weight)
        return weight[: self.num_rows]  # those without a row all write to the last entry

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the plan, by the names of their attributes."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    def tensors_to_save(self) -> dict[str, Tensor]:
        """What a backward needs to make the plan again by `from_saved`, in fewer bytes than `tensors`.

        Tokens are left out if they follow from the assignments. Tables are int32, unless there are 2^31 assignments.
        """
        tensors = self.tensors()
        if statically_known_true(self.row.shape[0] < 1 << 31):
            tensors["assignment"] = self.assignment.to(torch.int32)
        if self.k is not None:
            del tensors["token"]
        return tensors

    def without_tensors(self) -> Plan:
        """The plan with its numbers, but without its tensors."""
        return self._replace(**dict.fromkeys(self.tensors()))

    def from_saved(self, tensors: Mapping[str, Tensor]) -> Plan:
        """Return the plan with the numbers of this one and the saved tensors."""
        plan = self._replace(**tensors)
        if plan.token is not None or plan.k is None:
            return plan
        return plan._replace(token=tokens_of(plan.assignment, plan.k))


def tokens_of(assignment: Tensor, k: int) -> Tensor:
    """The tokens of assignments, if every token has k of them."""
    return assignment if k == 1 else assignment // k


def append(values: Tensor, last: int) -> Tensor:
    """Return `values` with one more entry, which an index that means "none" reads."""
    return torch.cat([values, values.new_full((1, *values.shape[1:]), last)])
