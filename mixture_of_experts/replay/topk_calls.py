"""Records or replaces the choices of blocks of `transformers`: their calls of `torch.topk`.

So the block's own code computes weights from live scores. Nothing of `transformers` is imported.

Axes: t tokens, e experts, g expert groups, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixture_of_experts.gating.given import LIVE
from mixture_of_experts.replay.sequences import ChoiceSite
from mixture_of_experts.support.private_torch import function_modes
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch


class Choosing(TorchFunctionMode):
    """Watches calls of `torch.topk` while a block runs.

    Args:
        site: the site of the block.
        given: `(t, k)` int64, the choices that the block is to make; None: it chooses, and `expert` holds its choices.
    """

    site: ChoiceSite
    given: Tensor | None
    groups: tuple[Any, Any] | None

    def __init__(self, site: ChoiceSite, given: Tensor | None = None) -> None:
        super().__init__()
        self.site, self.given = site, given
        self.expert: Tensor | None = None
        self.over = False  # whether the forward has ended; another mode may still stand on this one
        block: Any = site.site.block
        groups, best = (None, None) if block is None else (block.attribute("num_groups"), block.attribute("top_groups"))
        self.groups = (groups, best) if groups and best else None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.over or func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        return self.topk(*args, **kwargs)

    def topk(
        self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **kwargs: Any
    ) -> Any:
        size, given, last = input.shape[-1], self.given, dim in (-1, input.ndim - 1)
        if last and given is not None and (size, k) == self.groups and input.numel() == len(given) * size:
            input = input.masked_fill(self.groups_of(given, size).view_as(input), torch.inf)
        found = torch.topk(input, k, dim, largest, sorted, **kwargs)
        if not last or (size, k) != (self.site.num_experts, self.site.k):
            return found
        self.expert = found.indices
        if given is None:
            return found
        if given.shape[0] * size != input.numel():
            raise ValueError(
                f"{self.site.name!r} chooses for {input.numel() // size} tokens, but the model got {given.shape[0]}"
            )
        given = given.view_as(self.expert)
        self.expert = torch.where(given == LIVE, self.expert, given)
        return torch.return_types.topk((input.gather(-1, self.expert), self.expert))

    def groups_of(self, given: Tensor, groups: int) -> Tensor:
        """`(t, g)` bool, the expert groups of the given experts: these groups are open, whatever their scores are."""
        group = torch.where(given == LIVE, groups, given // (self.site.num_experts // groups))
        is_open = torch.zeros(len(given), groups + 1, dtype=torch.bool, device=given.device)
        return is_open.scatter(-1, group, True)[:, :groups]


class ChoosingCall(ForwardCall):
    """A forward, under way, of a block."""

    def __init__(self, mode: Choosing) -> None:
        self.mode = mode


class BlockWatch(Watch):
    """Has a mode watch each forward of a block.

    Args:
        make: makes the mode from the arguments of the block; None: the forward is left alone.
        chosen: gets the mode and the output, when the forward has ended well.
    """

    make: Callable[[tuple[Any, ...]], Choosing | None]
    chosen: Callable[[Choosing, Any], None]

    def __init__(
        self, make: Callable[[tuple[Any, ...]], Choosing | None], chosen: Callable[[Choosing, Any], None]
    ) -> None:
        super().__init__()
        self.make, self.chosen = make, chosen

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: object) -> ChoosingCall | None:
        mode = self.make(args)
        if mode is None:
            return None
        mode.__enter__()
        return ChoosingCall(mode)

    def ended(self, call: ChoosingCall, output: Any) -> None:
        self.lost(call)
        self.chosen(call.mode, output)

    def lost(self, call: ChoosingCall) -> None:
        call.mode.over = True
        modes = function_modes()
        while modes and isinstance(modes[-1], Choosing) and modes[-1].over:
            modes.pop().__exit__(None, None, None)


def refuse_other_ways(site: ChoiceSite, mode: Choosing) -> Tensor:
    """The choices `(..., k)` of a block; TypeError if it did not choose by `torch.topk`."""
    if mode.expert is None:
        raise TypeError(
            f"{type(site.called).__name__} at {site.name!r} does not choose its {site.k} of {site.num_experts} experts "
            "by torch.topk, so its choices can be neither recorded nor replayed: convert it by from_transformers"
        )
    return mode.expert


def refuse_one_graph(site: ChoiceSite) -> None:
    """Refuse one graph of the whole model: here it needs a break."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"choices of {site.name!r} cannot be part of a graph: compile without fullgraph=True")
