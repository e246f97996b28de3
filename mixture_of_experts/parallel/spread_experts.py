"""Experts that are spread over ranks: a class made from the experts' own class, with the same two contracts.

An `ExpertSharding` says which experts are here. In a forward tokens travel to their experts' ranks (`exchange.py`).
There the experts' own, unchanged code computes them, as if the module held only this rank's experts.

Axes: e experts of all ranks (`*e`, one or two dimensions; the first is divided), l experts of one rank, s slots of an
expert, r rows.
"""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mixture_of_experts.dispatch.decision import Decision
from mixture_of_experts.dispatch.moving import combine, dispatch
from mixture_of_experts.experts import ExpertList, RoutedExperts, StackedExperts
from mixture_of_experts.parallel.exchange import (
    DTYPES,
    ROWS,
    SLOTS,
    CallHeader,
    exchange_rows,
    exchange_slots,
    scale_gradient,
    with_backward_to,
)
from mixture_of_experts.parallel.on_this_rank import on_this_rank
from mixture_of_experts.parallel.sharding import ExpertSharding
from mixture_of_experts.support.checks import shape_of
from mixture_of_experts.support.same_bits import refuse_same_bits

SAVED_ELSEWHERE = (
    "{name} is what one of {ranks} ranks saved of its experts, but here they are spread over {here}: write checkpoints "
    "by torch.distributed.checkpoint, which reads them on any number of ranks, or load the state of all experts."
)


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
            rows, header = self._announce(rows, ROWS)
            out = exchange_rows(rows, plan.rows_per_expert, self._compute, self.expert_parallel.channel, header)
        else:
            dims = self.expert_parallel.dims
            slots = rows.view(*dims, plan.num_rows // math.prod(dims), rows.shape[-1])
            out = self._exchange_slots(slots)
            out = out.flatten().view(plan.num_rows, out.shape[-1])
        return combine(out, plan).to(x.dtype)

    def _exchange_slots(self, x: Tensor) -> Tensor:
        sharding = self.expert_parallel
        if x.ndim != len(sharding.dims) + 2 or tuple(x.shape[: len(sharding.dims)]) != sharding.dims:
            wanted = (*sharding.dims, "s", "d")
            raise ValueError(f"{type(self).__name__} reads x of shape ({', '.join(map(str, wanted))}), got {x.shape}")
        x, header = self._announce(x, SLOTS)
        return exchange_slots(x, sharding.dims, self._compute, sharding.channel, header, sharding.static_shapes)

    def _announce(self, x: Tensor, form: int) -> tuple[Tensor, CallHeader]:
        """Tokens in the dtype in which they travel, and the header of the call."""
        sent, returned = self._travelling_dtypes(x)
        return x.to(sent), CallHeader(
            form=form,
            mode=int(self.training),
            gradients=int(torch.is_grad_enabled()),
            dtype=DTYPES.index(sent),
            dim=x.shape[-1],
            returned=DTYPES.index(returned),
            size=x.shape[-2] if form == SLOTS else 0,
        )

    def _travelling_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The dtype in which tokens x travel to the other ranks, and the widest dtype that this rank's experts return.

        Ranks must agree on dtypes before experts compute: what modules return depends on their weights and on autocast,
        which may differ between ranks.
        """
        weights = [parameter.dtype for parameter in self.parameters() if parameter.dtype in DTYPES]
        widest = reduce(torch.promote_types, weights, x.dtype)
        if not isinstance(self, StackedExperts):
            return x.dtype, widest
        device = x.device.type
        if torch.is_autocast_enabled(device) and widest != torch.float64:
            # stacked experts cast first: a cast before the exchange halves the bytes that travel
            return torch.get_autocast_dtype(device), torch.get_autocast_dtype(device)
        return x.dtype, reduce(torch.promote_types, weights)

    def _compute(self, x: Tensor, *counts: Tensor) -> Tensor:
        """Compute slots `(*l, s, d)`, or rows with their counts, by this rank's experts. Hooks on the experts run
        around the whole forward, not here."""
        local: Any = self.local_class
        with self._on_this_rank() as here:
            out = (local.compute if counts else local.forward)(here, x, *counts)
        wanted = (*x.shape[:-1], getattr(self, "dim_out", None) or x.shape[-1])
        if not isinstance(out, Tensor) or out.shape != wanted:
            raise ValueError(f"experts must return shape {wanted} for {tuple(x.shape)}, got {shape_of(out)}")
        return out

    def _on_this_rank(self) -> AbstractContextManager[nn.Module]:
        return on_this_rank(self, self.expert_parallel, self.local_class)

    def own_parameter_names(self) -> set[str]:
        """Names of the parameters of which every rank has its own part."""
        return set(self.expert_parallel.stacked)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: its experts are spread over ranks, and each has a part. Save a "
            "checkpoint by torch.distributed.checkpoint; or, of stacked experts, save the whole state by "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) on every rank"
        )

    def __copy__(self) -> ExpertParallelExperts:
        twin, state = self._empty_twin()
        twin.__setstate__({**state})
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallelExperts:
        twin, state = self._empty_twin()
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def _empty_twin(self) -> tuple[ExpertParallelExperts, dict[str, Any]]:
        """An empty object of this class, and the state of a copy, as `copy` gets them from `__reduce_ex__`."""
        make, arguments, state, *_ = tuple(super().__reduce_ex__(4))
        return make(*arguments), state  # type: ignore[operator]

    def mark_parameters(self) -> None:
        """Mark parameters that are a rank's own but are no DTensors. `SpreadList` has such ones."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; of whole weights, saved by one process, take this rank's part."""
        errors: list[str] = args[-1]
        for name, parameter in self.named_parameters(remove_duplicate=False):
            whole = state_dict.get(prefix + name)
            if not isinstance(parameter, DTensor) or not isinstance(whole, Tensor):
                continue
            if ranks := ranks_of_part(whole, parameter):
                errors.append(SAVED_ELSEWHERE.format(name=prefix + name, ranks=ranks, here=self.expert_parallel.ranks))
            if not isinstance(whole, DTensor) and whole.shape == parameter.shape:  # super() reports a wrong shape
                mesh, placements = parameter.device_mesh, parameter.placements
                state_dict[prefix + name] = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        here = self.expert_parallel.experts
        place = f"experts {here.start} to {here.stop - 1} of {math.prod(self.expert_parallel.dims)} here"
        return ", ".join(part for part in (super().extra_repr(), place) if part)


def ranks_of_part(saved: Tensor, parameter: DTensor) -> int:
    """The number of ranks that saved a tensor which is only a part of the parameter; 0 if it is whole or fits here."""
    if isinstance(saved, DTensor):
        return saved.device_mesh.size() if saved.device_mesh.size() != parameter.device_mesh.size() else 0
    whole, part = parameter.shape, saved.shape
    stack = part and part[1:] == whole[1:] and 0 < part[0] < whole[0] and whole[0] % part[0] == 0
    return whole[0] // part[0] if stack else 0


class SpreadList(ExpertParallelExperts):
    """The base that `parallel_class` puts before a list of experts. A rank keeps its own modules, under the keys of the
    whole list."""

    @property
    def num_experts(self) -> int:
        return math.prod(self.expert_parallel.dims)

    def _travelling_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        sent, widest = super()._travelling_dtypes(x)
        # modules of other ranks may have weights of other dtypes: without an exchange, x's dtype is the one all know
        return sent, x.dtype if self.expert_parallel.static_shapes else widest

    def _compute(self, x: Tensor, *counts: Tensor) -> Tensor:
        # scaling the gradients of inputs and outputs scales the parameters' gradients, without a change of the modules
        factor = self.expert_parallel.factor
        result = scale_gradient(super()._compute(scale_gradient(x, 1 / factor), *counts), factor)
        # if this rank's modules are all frozen or constant, other ranks still wait for its backward
        return with_backward_to(result, x)

    def _on_this_rank(self) -> AbstractContextManager[nn.Module]:
        view = object.__new__(self.local_class)
        own = {str(i): module for i, module in enumerate(self._modules.values())}
        view.__dict__.update(self.__dict__, _modules=own)
        return nullcontext(view)

    def own_parameter_names(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def mark_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.expert_mesh = self.expert_parallel.mesh  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.mark_parameters()  # a conversion may have made new parameters
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark_parameters()  # a copy has new parameters

    def __getitem__(self, index: int) -> nn.Module:  # type: ignore[override]
        here = self.expert_parallel.experts
        if index not in here:
            raise IndexError(f"expert {index} is on another rank: here are {here.start} to {here.stop - 1}")
        return self._modules[str(index)]  # type: ignore[return-value]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict; of all modules, saved by one process, leave out those of other ranks."""
        of_key = {key: key.removeprefix(prefix).partition(".")[0] for key in state_dict if key.startswith(prefix)}
        expert = {key: int(index) for key, index in of_key.items() if index.isdigit()}
        (_, strict, *_, errors), saved, here = args, {*expert.values()}, self.expert_parallel.experts
        if strict and saved and not saved.issuperset(here):
            ranks = f"{self.num_experts / len(saved):g}"
            errors.append(SAVED_ELSEWHERE.format(name=prefix + "*", ranks=ranks, here=self.expert_parallel.ranks))
        for key, index in expert.items():
            if index not in here and index < self.num_experts:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def parallel_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` whose experts are spread over ranks."""
    kind = SpreadList if issubclass(cls, ExpertList) else ExpertParallelExperts
    members: dict[str, Any] = {"local_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if hasattr(cls, "reset_parameters"):
        members["reset_parameters"] = reset_parameters
    bases = (kind, cls) if issubclass(cls, RoutedExperts) else (kind, cls, RoutedExperts)
    return type(f"Parallel{cls.__name__}", bases, members)  # type: ignore[return-value]


def reset_parameters(experts: ExpertParallelExperts) -> None:
    """Draw the weights; every rank draws other numbers, even with equal seeds."""
    reset: Any = experts.local_class.reset_parameters  # type: ignore[attr-defined]
    parameter = next(experts.parameters())
    if not isinstance(parameter, DTensor) or parameter.device.type != "cpu":
        return reset(experts)  # on CUDA, DTensor draws other numbers on every rank
    seed = int(torch.randint(2**40, ()))
    for size, place in zip(parameter.device_mesh.shape, parameter.device_mesh.get_coordinate() or (), strict=True):
        seed = seed * size + place
    with torch.random.fork_rng([]), warnings.catch_warnings():
        # on a CPU mesh it would draw the same numbers on every rank with equal seeds
        warnings.filterwarnings("ignore", message="DTensor random operators")
        torch.manual_seed(seed)
        return reset(experts)
