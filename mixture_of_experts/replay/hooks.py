"""Hooks around every place where a model chooses, and on the models around: what recording and replay share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixture_of_experts.gating.given import GIVEN, GIVEN_WEIGHTS
from mixture_of_experts.replay.sequences import ChoiceSite, Sequences, runs_again
from mixture_of_experts.replay.topk_calls import TopkCalls
from mixture_of_experts.support.attached import Attached
from mixture_of_experts.whole_model.call_stack import ForwardCall, within
from mixture_of_experts.whole_model.model_tokens import TokensAround


class ChoiceHooks:
    """Recording or replay. In a backward that runs a part again there is no call.

    Attributes:
        sites: where the model chooses.
        replays: whether gates are given choices.
        unread: where a recording keeps what gates chose in forwards that ended well; None in a replay.
        give, give_block: see `Replay`.
        after: `(site, call, output, kwargs)`, after a layer that was given choices, or a gate that made them.
        after_block: `(site, call, output, expert)`, after a block of transformers that chose experts `(..., k)`.
    """

    replays: ClassVar[bool] = False
    unread: list[Any] | None = None
    give: Callable[..., list[Tensor]]
    give_block: Callable[..., Tensor]
    after: Callable[..., None]
    after_block: Callable[..., None]

    def __init__(self, sites: list[ChoiceSite]) -> None:
        self.sites: list[ChoiceSite] = sites

    def start(self, hooks: Attached) -> None:
        """Set the hooks, for forwards of this thread."""
        around = {site.site.around: Sequences(self, site.site.around) for site in self.sites}
        for site in self.sites:
            sequences = around[site.site.around]
            if site.site.external:
                hooks.set(site.called, "forward", partial(self.run_block, site, sequences, site.called.forward))
                continue
            chooses = site.called if self.replays else site.site.called
            hooks.before(site.called, partial(self.before_layer, site, sequences))
            hooks.after(chooses, partial(self.after_layer, site, sequences), with_kwargs=True)
        for model, sequences in around.items():
            sequences.follow(model, hooks)
        hooks.enter_context(within([(self, ForwardCall())]))

    def before_layer(self, site: ChoiceSite, sequences: Sequences, layer: object, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook of a layer, or of a gate without one."""
        if kwargs is None or ((call := sequences.call(site)) is None and not runs_again()):
            return None  # the hook is being set or taken off; another thread
        x, sizes, mask = site.tokens(args, kwargs)
        if call is not None:
            call.enter(site, sizes, mask)
        if not self.replays:
            return None
        if GIVEN in kwargs:
            raise ValueError(f"{site.name!r} is given {GIVEN} by its caller: replay them, or give them, not both")
        given = [values.view(*x.shape[:-1], site.k) for values in self.give(site, call, sizes, mask, x.device)]
        return args, {**kwargs, **dict(zip((GIVEN, GIVEN_WEIGHTS), given, strict=False))}

    def after_layer(
        self, site: ChoiceSite, sequences: Sequences, layer: object, args: Any, kwargs: Any, output: Any = None
    ) -> None:
        """Forward hook of what chooses."""
        call = sequences.call(site)
        if output is not None and call is not None and call.layer == site.layer:
            self.after(site, call, output, kwargs)

    def run_block(
        self, site: ChoiceSite, sequences: Sequences, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The forward of a block of `transformers`."""
        call = sequences.call(site)
        if torch.compiler.is_compiling():
            raise RuntimeError(f"choices of {site.name!r} cannot be part of a graph: compile without fullgraph=True")
        if call is None and not (self.replays and runs_again()):
            return forward(*args, **kwargs)
        hidden = (*args, *kwargs.values())[0]
        if call is not None:
            call.enter(site, sizes_of(site, call.tokens, hidden.shape[:-1].numel()), call.tokens.mask)
        given = self.give_block(site, call, hidden.device) if self.replays else None
        with TopkCalls(site, given) as calls:
            output = forward(*args, **kwargs)
        if calls.expert is None:
            raise TypeError(
                f"{type(site.called).__name__} at {site.name!r} does not choose its {site.k} of {site.num_experts} "
                "experts by torch.topk, so its choices can be neither recorded nor replayed: convert it by "
                "from_transformers"
            )
        if call is not None:
            self.after_block(site, call, output, calls.expert)
        return output


def sizes_of(site: ChoiceSite, tokens: TokensAround, number: int) -> tuple[int, int]:
    """The sizes `(b, n)` of the tokens of a block, whose model tells of them."""
    b, n = tokens.shape or (1, number)
    if tokens.unknown is not None or b * n != number:
        why = tokens.unknown or f"its model was given ({b}, {n})"
        raise ValueError(f"{number} tokens of {site.name!r} cannot be told apart: {why}")
    return b, n
