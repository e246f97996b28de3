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
from mixture_of_experts.support.private_torch import function_modes


class TopkCalls(TorchFunctionMode):
    """Watches calls of `torch.topk` in a forward of a block.

    Args:
        site: the site of the block.
        given: `(t, k)` int64, the choices that the block is to make; None: it chooses.

    Attributes:
        expert: what the block chose; None until it does.
    """

    site: ChoiceSite
    given: Tensor | None
    expert: Tensor | None = None

    def __init__(self, site: ChoiceSite, given: Tensor | None) -> None:
        super().__init__()
        self.site, self.given = site, given
        block: Any = site.site.block
        self.groups: Any = block.attribute("num_groups"), block.attribute("top_groups")

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        called = self.topk if func in (torch.topk, Tensor.topk) else func
        return called(*args, **(kwargs or {}))

    def topk(self, input: Tensor, k: int, dim: int = -1, *rest: Any, **kwargs: Any) -> Any:
        size, given, last = input.shape[-1], self.given, dim in (-1, input.ndim - 1)
        if last and given is not None and (size, k) == self.groups and input.numel() == len(given) * size:
            input = input.masked_fill(self.groups_of(given, size).view_as(input), torch.inf)
        found = torch.topk(input, k, dim, *rest, **kwargs)
        if not last or (size, k) != (self.site.num_experts, self.site.k):
            return found
        if given is not None:
            given = given.view_as(found.indices)
            expert = torch.where(given == LIVE, found.indices, given)
            found = torch.return_types.topk((input.gather(-1, expert), expert))
        for mode in (self, *function_modes()):  # a recording around a replay saw what the block itself would choose
            if isinstance(mode, TopkCalls):
                mode.expert = found.indices
        return found

    def groups_of(self, given: Tensor, groups: int) -> Tensor:
        """`(t, g)` bool, the expert groups of the given experts: these groups are open, whatever their scores are."""
        group = torch.where(given == LIVE, groups, given // (self.site.num_experts // groups))
        return nn.functional.one_hot(group, groups + 1).any(dim=1)[:, :groups]
