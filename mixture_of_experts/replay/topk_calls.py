"""Records or replaces the choices of blocks of `transformers`: their calls of `torch.topk`.

So the block's own code computes weights from live scores. Nothing of `transformers` is imported.

Axes: t tokens, e experts, g expert groups, k choices of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixture_of_experts.gating.given import LIVE
from mixture_of_experts.replay.sequences import ChoiceSite
from mixture_of_experts.whole_model.call_stack import ForwardCall


class Choosing(TorchFunctionMode, ForwardCall):
    """Watches calls of `torch.topk` in a forward of a block.

    Args:
        site: the site of the block.
        given: `(t, k)` int64, the choices that the block is to make; None: it chooses, and `expert` holds its choices.
    """

    site: ChoiceSite
    prescribed: Tensor | None
    groups: Any

    def __init__(self, site: ChoiceSite, given: Tensor | None = None) -> None:
        super().__init__()
        self.site, self.prescribed = site, given
        self.expert: Tensor | None = None
        self.over = False  # whether the forward has ended; another mode may still stand on this one
        block: Any = site.site.block
        self.groups = None if block is None else (block.attribute("num_groups"), block.attribute("top_groups"))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.over or func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        return self.topk(*args, **kwargs)

    def topk(
        self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **kwargs: Any
    ) -> Any:
        size, given, last = input.shape[-1], self.prescribed, dim in (-1, input.ndim - 1)
        if last and given is not None and (size, k) == self.groups and input.numel() == len(given) * size:
            input = input.masked_fill(self.groups_of(given, size).view_as(input), torch.inf)
        found = torch.topk(input, k, dim, largest, sorted, **kwargs)
        if not last or (size, k) != (self.site.num_experts, self.site.k):
            return found
        self.expert = found.indices
        if given is None:
            return found
        given = given.view_as(self.expert)
        self.expert = torch.where(given == LIVE, self.expert, given)
        return torch.return_types.topk((input.gather(-1, self.expert), self.expert))

    def groups_of(self, given: Tensor, groups: int) -> Tensor:
        """`(t, g)` bool, the expert groups of the given experts: these groups are open, whatever their scores are."""
        group = torch.where(given == LIVE, groups, given // (self.site.num_experts // groups))
        return nn.functional.one_hot(group, groups + 1).any(dim=1)[:, :groups]
