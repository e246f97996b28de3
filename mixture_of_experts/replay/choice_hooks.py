"""Defines the hooks that recording and replay attach to routing points and to the models that contain them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixture_of_experts.gating.overrides import GIVEN, GIVEN_WEIGHTS
from mixture_of_experts.providers import TokenMetadata
from mixture_of_experts.replay.sequences import RoutingPoint, SequenceWatch, is_recomputing, number_documents
from mixture_of_experts.replay.topk_mode import TopkMode
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.whole_model.call_stack import ForwardCall, activate_calls


class ChoiceHooks:
    """Base class for recording and replaying choices. There is no current call while a backward pass recomputes part of
    the model.

    Attributes:
        points: the routing points of the model.
        is_replay: whether the hooks supply choices to the gates.
        pending_forwards: the list in which a recording stores the choices of successful forward passes, or None in a
            replay.
        supply_choices, supply_block_choices: see `RoutingReplayer`.
        on_choices: callback that receives `(point, call, output, kwargs)` after a layer has received choices or a gate
            has made them.
        on_block_choices: callback that receives `(point, call, output, expert)` after an external block has chosen
            experts `(..., k)`.
    """

    is_replay: ClassVar[bool] = False
    pending_forwards: list[Any] | None = None
    supply_choices: Callable[..., list[Tensor]]
    supply_block_choices: Callable[..., Tensor]
    on_choices: Callable[..., None]
    on_block_choices: Callable[..., None]

    def __init__(self, points: list[RoutingPoint]) -> None:
        self.points: list[RoutingPoint] = points

    def attach_hooks(self, hooks: Attachments) -> None:
        """Attach hooks that observe forward passes in the current thread."""
        watches = {
            point.router.enclosing_model: SequenceWatch(self, point.router.enclosing_model) for point in self.points
        }
        for point in self.points:
            sequences = watches[point.router.enclosing_model]
            if point.router.is_external:
                hooks.set_attribute(
                    point.hook_target,
                    "forward",
                    partial(self.forward_block, point, sequences, point.hook_target.forward),
                )
                continue
            choosing_module = point.hook_target if self.is_replay else point.router.hook_target
            hooks.add_forward_pre_hook(point.hook_target, partial(self.layer_pre_hook, point, sequences))
            hooks.add_forward_hook(choosing_module, partial(self.layer_hook, point, sequences), with_kwargs=True)
        for model, sequences in watches.items():
            sequences.attach_to(model, hooks)
        hooks.enter_context(activate_calls([(self, ForwardCall())]))

    def layer_pre_hook(
        self, point: RoutingPoint, sequences: SequenceWatch, layer: object, args: Any, kwargs: Any = None
    ) -> Any:
        """Forward pre-hook for a layer, or for a gate that is not part of a layer."""
        if kwargs is None or ((call := sequences.current_call(point)) is None and not is_recomputing()):
            return None  # the hook is being attached or removed, or another thread runs the layer
        x, sizes, mask = point.read_inputs(args, kwargs)
        if call is not None:
            call.enter_gate(point, sizes, mask)
        if not self.is_replay:
            return None
        if GIVEN in kwargs:
            raise ValueError(
                f"{GIVEN} was passed to {point.name!r} during a replay; choices can be replayed or passed, but not both"
            )
        given = [
            values.view(*x.shape[:-1], point.k) for values in self.supply_choices(point, call, sizes, mask, x.device)
        ]
        return args, {**kwargs, **dict(zip((GIVEN, GIVEN_WEIGHTS), given, strict=False))}

    def layer_hook(
        self, point: RoutingPoint, sequences: SequenceWatch, layer: object, args: Any, kwargs: Any, output: Any = None
    ) -> None:
        """Forward hook for the module that chooses experts: the layer in a replay, the gate in a recording."""
        call = sequences.current_call(point)
        if output is not None and call is not None and call.layer_path == point.layer_path:
            self.on_choices(point, call, output, kwargs)

    def forward_block(
        self, point: RoutingPoint, sequences: SequenceWatch, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Replacement for the forward method of an external block."""
        call = sequences.current_call(point)
        if torch.compiler.is_compiling():
            raise RuntimeError(f"the choices of {point.name!r} cannot be traced; compile without fullgraph=True")
        if call is None and not (self.is_replay and is_recomputing()):
            return forward(*args, **kwargs)
        hidden = (*args, *kwargs.values())[0]
        if call is not None:
            shape, mask = get_token_shape(point, call.tokens, hidden.shape[:-1].numel()), call.tokens.mask
            if (ids := call.tokens.segment_ids) is not None and tuple(ids.shape) == shape:
                mask = number_documents(ids, mask)  # layers number documents in the same way
            call.enter_gate(point, shape, mask)
        given = self.supply_block_choices(point, call, hidden.device) if self.is_replay else None
        with TopkMode(point, given) as calls:
            output = forward(*args, **kwargs)
        if calls.expert is None:
            external: Any = point.router.external
            raise TypeError(
                f"{type(point.hook_target).__name__} at {point.name!r} does not choose {point.k} of "
                f"{point.num_experts} experts with torch.topk, so its choices cannot be recorded or replayed; "
                f"{external.remedy}"
            )
        if call is not None:
            self.on_block_choices(point, call, output, calls.expert)
        return output


def get_token_shape(point: RoutingPoint, tokens: TokenMetadata, num_tokens: int) -> tuple[int, int]:
    """Return the shape `(b, n)` of a block's tokens, based on the token metadata of the enclosing model."""
    b, n = tokens.shape or (1, num_tokens)
    if tokens.mask_unknown_reason is not None or b * n != num_tokens:
        why = tokens.mask_unknown_reason or f"its model got ({b}, {n}) tokens"
        raise ValueError(f"{num_tokens} tokens of {point.name!r} cannot be assigned to sequences: {why}")
    return b, n
