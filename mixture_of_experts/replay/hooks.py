"""Hooks on every place where a model chooses, and on the models around: what recording and replay share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mixture_of_experts.replay.sequences import ChoiceSite, Seen, Sequences
from mixture_of_experts.replay.topk_calls import Choosing
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.support.private_torch import function_modes
from mixture_of_experts.whole_model.call_stack import ForwardCall, Watch, within


class ChoiceHooks:
    """Recording or replay. A call is None in a backward that runs a part again, and in another thread.

    Attributes:
        sites: where the model chooses.
        outermost: whether it stands outside of other hooks on blocks of transformers.
        before_layer: `(site, sequences, layer, args, kwargs)`, before a layer, or a gate without one; it may change the
            arguments. They are None while the hook is being set or taken off.
        follow_layer: `(site, sequences, hooks)`, sets more hooks on a layer.
        begin_block: `(site, call, hidden)`, returns the mode in which a block of transformers runs, or None.
        ended: `(site, call, output, expert)`, after a block that chose experts `(..., k)`.
    """

    sites: list[ChoiceSite]
    outermost: bool
    before_layer: Callable[..., Any]
    follow_layer: Callable[..., None]
    begin_block: Callable[..., Choosing | None]
    ended: Callable[..., None]

    def start(self, hooks: Attached, seen: Seen | None) -> None:
        """Set the hooks, for forwards of this thread."""
        if seen is not None and not callable(seen):
            raise TypeError(
                f"seen must be a function (args, kwargs) that returns the number of tokens read before, got {seen!r}"
            )
        around = {site.site.around: Sequences(self, site.site.around, seen) for site in self.sites}
        for site in self.sites:
            sequences = around[site.site.around]
            if site.site.external:
                BlockWatch(self, site, sequences).follow(site.called, hooks, first=self.outermost)
                continue
            hooks.before(site.called, partial(self.before_layer, site, sequences))
            self.follow_layer(site, sequences, hooks)
        for model, sequences in around.items():
            sequences.follow(model, hooks)
        hooks.enter_context(within([(self, ForwardCall())]))


@dataclass(eq=False)
class BlockWatch(Watch):
    """Has a mode watch each forward of a block of transformers."""

    choices: ChoiceHooks
    site: ChoiceSite
    sequences: Sequences

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choosing | None:
        call, site = self.sequences.call(self.site), self.site
        if torch.compiler.is_compiling():
            raise RuntimeError(f"choices of {site.name!r} cannot be part of a graph: compile without fullgraph=True")
        mode = self.choices.begin_block(site, call, (*args, *kwargs.values())[0])
        return None if mode is None else mode.__enter__()

    def ended(self, call: Choosing, output: Any) -> None:
        self.lost(call)
        site = self.site
        if call.expert is None:
            raise TypeError(
                f"{type(site.called).__name__} at {site.name!r} does not choose its {site.k} of {site.num_experts} "
                "experts by torch.topk, so its choices can be neither recorded nor replayed: convert it by "
                "from_transformers"
            )
        self.choices.ended(site, self.sequences.call(site), output, call.expert)

    def lost(self, call: Choosing) -> None:
        call.over = True
        modes = function_modes()
        while modes and isinstance(modes[-1], Choosing) and modes[-1].over:
            modes.pop().__exit__(None, None, None)
