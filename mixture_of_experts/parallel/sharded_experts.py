"""Defines experts that are sharded over ranks. Their class is derived from the original class and keeps its interfaces.

An `ExpertSharding` describes which experts are local to a rank. In the forward pass, tokens are sent to the ranks that
own their experts (see `exchange.py`). The experts' own code then runs as if the module contained only this rank's
experts.

Axes: e (experts on all ranks; `*e` has one or two dimensions, and the first is sharded), l (experts per rank), s (slots
per expert), r (rows).
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mixture_of_experts.dispatch.assignments import Assignments
from mixture_of_experts.dispatch.permutation import permute_to_slots, permute_without_gaps
from mixture_of_experts.dispatch.rows import combine, dispatch
from mixture_of_experts.experts import RoutedExperts, StackedExperts
from mixture_of_experts.ops.network import get_operand_dtype
from mixture_of_experts.parallel.exchange import exchange_rows, exchange_slots
from mixture_of_experts.parallel.local_experts import use_local_experts
from mixture_of_experts.parallel.sharding import ExpertSharding
from mixture_of_experts.support.batch_invariance import reject_batch_invariance
from mixture_of_experts.support.checks import describe_shape

SEVERAL_BATCHES = "sharded experts compute the rows of several batches together"


class ShardedExperts(nn.Module):
    """Base class that `make_sharded_class` combines with an expert class to shard experts over ranks."""

    sharding: ExpertSharding
    local_class: type[nn.Module]

    def variant_reason(self) -> str:
        return SEVERAL_BATCHES

    def forward(self, x: Tensor, assignments: Assignments | None = None) -> Tensor:
        """Map tokens `(t, d)` to `(t, o)` if `assignments` is passed, and otherwise map slots `(*e, s, d)` to
        `(*e, s, o)`.

        This is a collective operation, so all ranks of the mesh must call it. Rows are exchanged if routing is dropless
        and the experts accept rows. Otherwise, slots are exchanged. This decision does not depend on the batch, which
        differs between ranks.
        """
        reject_batch_invariance(SEVERAL_BATCHES)
        if assignments is None:
            return self._exchange_slots(x)
        ragged = assignments.dropless and getattr(self.local_class, "reads_assignments", False)
        permutation = permute_without_gaps(assignments) if ragged else permute_to_slots(assignments)
        rows, sharding = dispatch(x, permutation), self.sharding
        if permutation.rows_per_expert is not None:
            rows = rows.to(self._dtype_of_tokens(x))
            out = exchange_rows(rows, permutation.rows_per_expert, self._compute, sharding.channel, self.training)
        else:
            slots = permutation.num_rows // math.prod(sharding.expert_dims)
            out = self._exchange_slots(rows.view(*sharding.expert_dims, slots, rows.shape[-1]))
            out = out.flatten().view(permutation.num_rows, out.shape[-1])
        return combine(out, permutation).to(x.dtype)

    def _exchange_slots(self, x: Tensor) -> Tensor:
        sharding = self.sharding
        dims = sharding.expert_dims
        if x.ndim != len(dims) + 2 or tuple(x.shape[: len(dims)]) != dims:
            raise ValueError(
                f"{type(self).__name__} expects the slots of all experts, with shape (*{dims}, s, d), but got "
                f"{tuple(x.shape)}"
            )
        x = x.to(self._dtype_of_tokens(x))
        return exchange_slots(x, dims, self._compute, sharding.channel, self.training, sharding.static_shapes)

    def _dtype_of_tokens(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which tokens and results are exchanged.

        For stacked experts, this is the dtype of their matrix products, which halves the transferred bytes under
        autocast. For other experts, it is the dtype of `x`, because their output dtype may differ between ranks.
        """
        return get_operand_dtype(x.device.type, self.w2.dtype) if isinstance(self, StackedExperts) else x.dtype

    def _compute(self, x: Tensor, *counts: Tensor) -> Tensor:
        """Apply this rank's experts to slots `(*l, s, d)`, or to rows with their counts. The experts' hooks are not
        called here, because they apply to the whole forward pass."""
        local: Any = self.local_class
        with use_local_experts(self) as local_experts:
            out = (local.compute if counts else local.forward)(local_experts, x, *counts)
        wanted = (*x.shape[:-1], getattr(self, "dim_out", None) or x.shape[-1])
        if not isinstance(out, Tensor) or out.shape != wanted:
            raise ValueError(
                f"experts must return a tensor of shape {wanted} for x of shape {tuple(x.shape)}, got "
                f"{describe_shape(out)}"
            )
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, because each rank holds only some of its experts. Save a "
            "checkpoint with torch.distributed.checkpoint, or save the full state with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) on all ranks"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedExperts:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict. Unsharded tensors saved by a single process are reduced to this rank's part."""
        for name, parameter in self.named_parameters(remove_duplicate=False):
            whole: Any = state_dict.get(prefix + name)
            if not isinstance(parameter, DTensor) or type(whole) not in (Tensor, nn.Parameter):
                continue
            if whole.shape == parameter.shape:  # super() would report a mismatched shape
                mesh, placements = parameter.device_mesh, parameter.placements
                state_dict[prefix + name] = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        ids = self.sharding.local_expert_ids
        local = f"experts {ids.start} to {ids.stop - 1} of {math.prod(self.sharding.expert_dims)} on this rank"
        return ", ".join(part for part in (super().extra_repr(), local) if part)


@cache
def make_sharded_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` whose experts are sharded over ranks."""
    members: dict[str, Any] = {"local_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    base = () if issubclass(cls, RoutedExperts) else (RoutedExperts,)
    return type(f"Sharded{cls.__name__}", (ShardedExperts, cls, *base), members)  # type: ignore[return-value]
