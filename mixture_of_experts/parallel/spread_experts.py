"""Experts that are spread over ranks: a class made from the experts' own class, with the same two contracts.

An `ExpertSharding` says which experts are here. In a forward tokens travel to their experts' ranks (`exchange.py`).
There the experts' own, unchanged code computes them, as if the module held only this rank's experts.

Axes: e experts of all ranks (`*e`, one or two dimensions; the first is divided), l experts of one rank, s slots of an
expert, r rows.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mixture_of_experts.dispatch.decision import Decision
from mixture_of_experts.dispatch.moving import combine, dispatch
from mixture_of_experts.experts import RoutedExperts, StackedExperts
from mixture_of_experts.parallel.exchange import exchange_rows, exchange_slots
from mixture_of_experts.parallel.on_this_rank import on_this_rank
from mixture_of_experts.parallel.sharding import ExpertSharding
from mixture_of_experts.support.checks import shape_of
from mixture_of_experts.support.same_bits import refuse_same_bits


class ExpertParallelExperts(nn.Module):
    """The base that `parallel_class` puts before a class of experts, to spread them over ranks."""

    expert_parallel: ExpertSharding
    local_class: type[nn.Module]

    def forward(self, x: Tensor, decision: Decision | None = None) -> Tensor:
        """Map tokens `(t, d)` with a decision to tokens `(t, o)`; without one, slots `(*e, s, d)` to `(*e, s, o)`.

        All ranks of the mesh must call it together. Rows travel if the call is dropless and the experts take rows, else
        slots. This does not depend on the batch, which differs between ranks.
        """
        refuse_same_bits("experts that are spread over ranks compute the rows of several batches together")
        if decision is None:
            return self._exchange_slots(x)
        local: Any = self.local_class
        ragged = decision.dropless and issubclass(local, RoutedExperts) and local.reads_decisions
        plan = decision.without_gaps() if ragged else decision.in_slots()
        rows = dispatch(x, plan)
        if plan.rows_per_expert is not None:
            channel = self.expert_parallel.channel
            rows = rows.to(self._dtype_of_tokens(x))
            out = exchange_rows(rows, plan.rows_per_expert, self._compute, channel, self.training)
        else:
            dims = self.expert_parallel.dims
            out = self._exchange_slots(rows.view(*dims, plan.num_rows // math.prod(dims), rows.shape[-1]))
            out = out.flatten().view(plan.num_rows, out.shape[-1])
        return combine(out, plan).to(x.dtype)

    def _exchange_slots(self, x: Tensor) -> Tensor:
        sharding = self.expert_parallel
        dims = sharding.dims
        if x.ndim != len(dims) + 2 or tuple(x.shape[: len(dims)]) != dims:
            wanted = ", ".join(map(str, (*dims, "s", "d")))
            raise ValueError(f"{type(self).__name__} reads x of shape ({wanted}), got {x.shape}")
        x = x.to(self._dtype_of_tokens(x))
        return exchange_slots(x, dims, self._compute, sharding.channel, self.training, sharding.static_shapes)

    def _dtype_of_tokens(self, x: Tensor) -> torch.dtype:
        """The dtype in which tokens x and results travel.

        Stacked experts cast first: under autocast that halves the bytes. What others return may differ between ranks.
        """
        if not isinstance(self, StackedExperts):
            return x.dtype
        device, dtype = x.device.type, self.w2.dtype
        autocast = torch.is_autocast_enabled(device) and dtype != torch.float64
        return torch.get_autocast_dtype(device) if autocast else dtype

    def _compute(self, x: Tensor, *counts: Tensor) -> Tensor:
        """Compute slots `(*l, s, d)`, or rows with their counts, by this rank's experts. Hooks on the experts run
        around the whole forward, not here."""
        local: Any = self.local_class
        with on_this_rank(self, self.expert_parallel, self.local_class) as here:
            out = (local.compute if counts else local.forward)(here, x, *counts)
        wanted = (*x.shape[:-1], getattr(self, "dim_out", None) or x.shape[-1])
        if not isinstance(out, Tensor) or out.shape != wanted:
            raise ValueError(f"experts must return shape {wanted} for {tuple(x.shape)}, got {shape_of(out)}")
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: its experts are spread over ranks, and each has a part. Save a "
            "checkpoint by torch.distributed.checkpoint, or the whole state by "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) on every rank"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallelExperts:
        make, arguments, state, *_ = tuple(super().__reduce_ex__(4))
        twin = memo[id(self)] = make(*arguments)  # type: ignore[operator]
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; of whole stacks, saved by one process, take this rank's part."""
        for name, parameter in self.named_parameters(remove_duplicate=False):
            whole = state_dict.get(prefix + name)
            if not isinstance(parameter, DTensor) or not isinstance(whole, Tensor) or isinstance(whole, DTensor):
                continue
            if whole.shape == parameter.shape:  # super() reports a wrong shape
                mesh, placements = parameter.device_mesh, parameter.placements
                state_dict[prefix + name] = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        here = self.expert_parallel.experts
        place = f"experts {here.start} to {here.stop - 1} of {math.prod(self.expert_parallel.dims)} here"
        return ", ".join(part for part in (super().extra_repr(), place) if part)


@cache
def parallel_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` whose experts are spread over ranks."""
    members: dict[str, Any] = {"local_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    base = () if issubclass(cls, RoutedExperts) else (RoutedExperts,)
    return type(f"Parallel{cls.__name__}", (ExpertParallelExperts, cls, *base), members)  # type: ignore[return-value]
