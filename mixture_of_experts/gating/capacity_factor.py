"""A descriptor that stores a gate's capacity factor and validates every assigned value."""

from __future__ import annotations

from typing import Any

from mixture_of_experts.dispatch.capacity import bounded_ratio
from mixture_of_experts.support.checks import check_number


class CapacityFactor:
    """A capacity factor: a finite positive number, or None (unless `dropless=False`) to disable token dropping.

    The factor is stored as a ratio of two integers, because `torch.compile` treats integer attributes of a module as
    constants. `bounded_ratio` computes these integers, and `expert_capacity` computes the capacity from them. A float
    may become symbolic if `dynamic=True` is set or if layers with different factors are compiled one after another.
    Sizes that depend on a symbolic float cannot be passed to an autograd function.
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
            hint = "use None for no token dropping" if self.dropless else "each expert chooses a fixed number of tokens"
            raise ValueError(f"{error}; {hint}") from None
