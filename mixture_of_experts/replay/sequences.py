"""Finds a model's routing points, and tracks the sequences in the forward passes of enclosing models.

Axes: b (sequences), n (tokens per forward pass), k (choices per token).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.dispatch.segments import SEGMENT_IDS, check_segment_ids, find_segments
from mixture_of_experts.gating import ExpertChoiceGating, get_side_inputs
from mixture_of_experts.gating.overrides import COUNTED, GIVEN_WEIGHTS
from mixture_of_experts.moe import HeirarchicalMoE
from mixture_of_experts.providers import TokenMetadata, TokensReader
from mixture_of_experts.replay.records import starts_sequences
from mixture_of_experts.support.private_torch import get_backward_id
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import ForwardCall, ForwardWatch
from mixture_of_experts.whole_model.model_tokens import make_tokens_reader
from mixture_of_experts.whole_model.router_discovery import (
    GateSelection,
    RouterHandle,
    check_supported,
    find_routers,
    iter_named_modules,
)

LAYER_INPUTS, GATE_INPUTS = ("inputs", "mask"), ("x", "importance", "mask")


class RoutingPoint(NamedTuple):
    """A gate within a layer, together with the module whose arguments identify the gate's tokens."""

    name: str
    router: RouterHandle
    # the module to hook: a layer, a gate without a layer, an external block, or its router
    hook_target: nn.Module
    k: int
    # path of the layer, which distinguishes the layers that share a gate, even in a graph
    layer_path: str

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def read_inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Return the inputs `(..., n, d)` of a layer or gate, the shape `(b, n)` of the tokens, and the mask `(b, n)`.
        For packed rows, the sequence index of each token replaces the mask, as in `number_documents`."""
        names = GATE_INPUTS if self.hook_target is self.router.hook_target else LAYER_INPUTS
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, mask = given[names[0]], given.get("mask")
        sizes, mask = (math.prod(x.shape[:-2]), x.shape[-2]), given.get(COUNTED) if mask is None else mask
        mask = None if mask is None else mask.reshape(sizes)
        if (ids := given.get(SEGMENT_IDS)) is not None:
            mask = number_documents(check_segment_ids(ids, x.shape[:-1]).reshape(sizes), mask)
        return x, sizes, mask


def find_routing_points(
    model: nn.Module, feature: str, gates: GateSelection | None, weights: bool
) -> list[RoutingPoint]:
    """Find a routing point for each layer that contains a gate, in the same order as in the model. Blocks that choose
    experts from a table of token ids are excluded, unless `gates` selects them.

    Args:
        model, feature, gates: see `find_routers`.
        weights: whether recording and replaying weights must be supported as well.
    """
    routers = find_routers(model, feature, gates)
    if gates is None:
        routers = [router for router in routers if not chooses_by_token_ids(router)]
    check_supported(routers, feature, replay_unsupported_reason)
    if weights:
        check_supported(routers, f"{feature} of weights", weight_replay_unsupported_reason)
    found = {}
    for router in routers:
        for location in reversed(router.locations):  # a layer with two paths is named after the first
            called = router.hook_target if location.layer is None else location.layer
            path = location.name.rpartition(".")[0]
            found[router, location.layer] = RoutingPoint(location.name, router, called, router.k or 0, path)
    order = {place.name: number for number, place in enumerate(iter_named_modules(model))}
    return sorted(found.values(), key=lambda one: order.get(one.name, 0))


def chooses_by_token_ids(router: RouterHandle) -> bool:
    return router.external is not None and router.external.chooses_by_token_ids


def replay_unsupported_reason(router: RouterHandle) -> str | None:
    """Return the reason why a router's choices cannot be recorded or replayed, or None if they can."""
    if chooses_by_token_ids(router):
        return "its experts are chosen by a table of token ids"
    if router.k is None or isinstance(router.gate, ExpertChoiceGating):
        return "its tokens do not make k choices"
    return (
        f"it has outer_expert_dims={router.outer_expert_dims}, as in layers of two levels"
        if router.outer_expert_dims
        else None
    )


def weight_replay_unsupported_reason(router: RouterHandle) -> str | None:
    """Return the reason why a router's weights cannot be recorded or replayed, or None if they can."""
    if router.external is not None:
        return f"its own code computes the weights; {router.external.remedy}"
    if any(isinstance(location.layer, HeirarchicalMoE) for location in router.locations):
        return "a layer of two levels accepts only choices"
    return None if GIVEN_WEIGHTS in get_side_inputs(router.gate) else f"its forward does not accept {GIVEN_WEIGHTS}"


def number_documents(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sequence index of each token in packed rows, as an int64 tensor `(b, n)`. Documents are numbered
    across rows, ordered by their first tokens. Padding gets -1.

    Args:
        ids: integers `(b, n)` that are equal for all tokens in a row that belong to the same document.
        mask: bool `(b, n)`, True for tokens that are not padding. None if there is no padding.
    """
    document = find_segments(ids, None).document.flatten()
    real = torch.ones_like(document, dtype=torch.bool) if mask is None else mask.to(document.device).flatten()
    t = document.shape[0]
    index = torch.where(real, torch.arange(t, device=ids.device), t)
    first = torch.full_like(document, t).scatter_reduce(0, document, index, "amin")
    number = first.argsort(stable=True).argsort(stable=True)
    return torch.where(real, number[document], -1).view(ids.shape)


# Calls


@dataclass(eq=False)
class SequenceCall(ForwardCall):
    """A forward pass in progress, for a model that contains gates."""

    tokens: TokenMetadata
    num_seen: Tensor | int  # number of real tokens in each cached sequence, `(b,)` or one number for all
    cache: Any  # the key-value cache, if any
    entered_gates: dict[str, Any] = field(default_factory=dict)  # shape `(b, n)` and mask of the tokens, keyed by gate
    choices: dict[str, Any] = field(default_factory=dict)  # choices that gates made or received
    # masks that have been checked, each with the matching record lengths
    checked_masks: list[Any] = field(default_factory=list)
    layer_path: str = ""  # path of the layer that is currently running

    def enter_gate(self, point: RoutingPoint, sizes: tuple[int, int], mask: Tensor | None) -> None:
        """Record that a gate was called. `sizes` is the shape `(b, n)` of the gate's tokens, and `mask` is the mask of
        these tokens."""
        if point.name in self.entered_gates:
            raise RuntimeError(
                f"{point.name!r} ran twice in one forward pass, but only one call can be recorded; call it once"
            )
        if mask is not None and mask.dtype != torch.bool and not starts_sequences(self.num_seen):
            raise ValueError(
                f"{point.name!r} received {SEGMENT_IDS} in a forward pass that continues cached sequences, but each "
                "row of a cache must be a single sequence; record and replay packed rows with use_cache=False"
            )
        self.layer_path, self.entered_gates[point.name] = point.layer_path, (sizes, mask)

    def count_tokens(self) -> Tensor | int | None:
        """Return the number of real tokens in each sequence after this forward pass, `(b,)` or one number for all, or
        None if it is unknown."""
        if self.tokens.shape is None or self.tokens.mask_unknown_reason is not None:
            return None
        return self.num_seen + (self.tokens.shape[1] if self.tokens.mask is None else self.tokens.mask.sum(dim=-1))


class LastCache(NamedTuple):
    """The key-value cache after a forward pass.

    Attributes:
        cache, keys: weak references to the cache and to its keys.
        shape: shape of the keys.
        length: the result of `TokensReader.get_cached_length`.
        num_tokens: the result of `SequenceCall.count_tokens`.
    """

    cache: Any
    keys: Any
    shape: torch.Size
    length: int | None
    num_tokens: Tensor | int | None


class SequenceWatch(ForwardWatch):
    """Tracks the sequences in forward passes of a model that contains gates.

    Args:
        owner: the recorder or replayer, which is active only in its own thread.
        model: the model to watch.
    """

    owner: Any

    def __init__(self, owner: Any, model: nn.Module) -> None:
        super().__init__(owner)
        self.reader: TokensReader = make_tokens_reader(model)
        self.last_cache: LastCache | None = None

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SequenceCall:
        cache, num_seen = self.reader.read_cache(args, kwargs)
        self.check_no_beam_search(cache)
        if num_seen is None:
            num_seen = self.recall_num_tokens(cache)
        return SequenceCall(self.reader(args, kwargs), num_seen, cache)

    def on_success(self, call: SequenceCall, output: object) -> None:
        missing = sorted(call.entered_gates.keys() - call.choices.keys())
        if missing or not call.choices:
            what = f"a layer, but not its gate {missing[0]!r}" if missing else "no gate"
            raise RuntimeError(
                f"the hooks report that the forward pass ran {what}. If part of the model was compiled and called "
                "before, its graph has no hooks; call torch.compiler.reset() first, or enter the context before the "
                "first compiled call"
            )
        keys = self.reader.get_cached_keys(call.cache)
        if keys is None:
            self.last_cache = None
        else:
            length, num_tokens = self.reader.get_cached_length(call.cache), call.count_tokens()
            self.last_cache = LastCache(weakref.ref(call.cache), weakref.ref(keys), keys.shape, length, num_tokens)
        if self.owner.pending_forwards is not None:
            self.owner.pending_forwards.append(call.choices)

    def check_no_beam_search(self, cache: Any) -> None:
        """Raise an error if the cache's sequences were swapped since the last forward pass, which would mix up the
        records.

        Swapping replaces tensors in the cache with others of the same shape.
        """
        keys = self.reader.get_cached_keys(cache)
        if keys is None or self.last_cache is None or self.last_cache.cache() is not cache:
            return
        if self.last_cache.keys() is not keys and self.last_cache.shape == keys.shape:
            raise RuntimeError(
                "the sequences in the cache were reordered between two forward passes, as in beam search (num_beams > "
                "1), so their choices cannot be recorded or replayed; generate without beam search, or run another "
                "forward pass over the finished sequences"
            )

    def recall_num_tokens(self, cache: Any) -> Tensor | int:
        """Return the number of real tokens that the last forward pass left in the cache. Raise an error if the last
        forward pass had another cache, or if this cache has been cropped since then."""
        last = self.last_cache
        if (
            last is not None
            and last.num_tokens is not None
            and last.cache() is cache
            and last.length == self.reader.get_cached_length(cache)
        ):
            return last.num_tokens
        raise RuntimeError(
            "a forward pass continues cached sequences, but its attention mask includes only the last tokens, so the "
            "number of earlier tokens is unknown; run all forward passes over these sequences in the context, without "
            "cropping the cache or using another one in between, or pass a 2-D attention mask"
        )

    def current_call(self, point: RoutingPoint) -> SequenceCall | None:
        """Return the current forward pass, or None if called in another thread or while a backward pass recomputes the
        model."""
        call = call_stack.current_call(self)
        if call is None and call_stack.current_call(self.owner) is not None:
            raise RuntimeError(
                f"{point.name!r} ran outside a forward pass of the given module; pass the module that you actually call"
            )
        return call


def is_recomputing() -> bool:
    """Return whether a backward pass is currently recomputing a part of a forward pass."""
    return get_backward_id() != -1
