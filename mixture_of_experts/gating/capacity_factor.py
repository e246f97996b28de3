"""The capacity factor of a gate, an attribute that is checked whenever it is set."""

from __future__ import annotations

from typing import Any

from mixture_of_experts.dispatch.queues import bounded_ratio
from mixture_of_experts.support.checks import check_number


class CapacityFactor:
    """An attribute of gates: a finite number above 0, or (unless `dropless=False`) None to drop no token.

    It is stored as a ratio of two integers, from which capacity is computed (`queues.bounded_ratio`). Integers of a
    module are constants to `torch.compile`. A float may become a symbol (`dynamic=True`, or layers of different factors
    compiled one after the other), and torch cannot pass sizes that depend on it to an autograd function.
    """

    def __init__(self, dropless: bool = True) -> None:
        self.dropless = dropless

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, gate: Any, owner: type | None = None) -> Any:
        if gate is None:
            return self
        ratio = getattr(gate, f"_{self.name}")
        return None if ratio is None else ratio[0] / ratio[1]

    def __set__(self, gate: Any, value: float | None) -> None:
        setattr(gate, f"_{self.name}", None if value is None and self.dropless else self._as_ratio(value))

    def _as_ratio(self, value: object) -> tuple[int, int]:
        try:
            return bounded_ratio(float(check_number(self.name, value, above=0.0)))
        except ValueError as error:
            hint = "use None to drop no token (dropless)" if self.dropless else "experts take a fixed number of tokens"
            raise ValueError(f"{error}; {hint}") from None
