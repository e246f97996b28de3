"""Reads the routing decisions of a model's gates, including routers from other libraries, during a forward pass.

Most routers from other libraries return `(logits, weights, experts)` for flattened tokens. If a router does not return
its choices, they are recomputed from its logits, as described by its provider. The arguments of the enclosing model
determine which tokens are padding and where sequences end.

Axes: b (sequences), n (tokens per sequence), e (experts), k (choices per token).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mixture_of_experts import losses
from mixture_of_experts.dispatch.capacity import Length
from mixture_of_experts.dispatch.queues import queue_up
from mixture_of_experts.dispatch.routing import Routing, check_routing
from mixture_of_experts.dispatch.segments import find_segments
from mixture_of_experts.gating.steps import SCORES
from mixture_of_experts.support.attachments import Attachments
from mixture_of_experts.whole_model.external_routers import read_router_output
from mixture_of_experts.whole_model.model_tokens import TokenWatch
from mixture_of_experts.whole_model.router_discovery import RouterHandle, find_routers


class RouterOutputReader(TokenWatch):
    """Converts the outputs of a model's external routers to `Routing` objects."""

    def to_routing(self, router: RouterHandle, output: Any) -> Routing:
        """Convert the output of a router to a `Routing`."""
        external, tokens = router.external, self.current_tokens()
        assert external is not None
        logits, weight, expert = read_router_output(router, output)
        (*shape, e), k = logits.shape, expert.shape[-1]
        b, n = shape if len(shape) == 2 else (1, *shape)  # some routers return (b, n, e)
        if tokens.shape is not None and math.prod(tokens.shape) == b * n:
            b, n = tokens.shape
        real = tokens.mask if tokens.mask is not None and tokens.mask.shape == (b, n) else None
        logits, expert, weight = logits.float().view(b, n, e), expert.reshape(b, n, k).long(), weight.float()
        probs = SCORES[external.score](logits)
        probs = probs / probs.sum(dim=-1, keepdim=True)
        chosen = expert < e  # larger ids belong to experts on other ranks
        proxy, length = probs, n
        if real is not None:
            chosen, length = chosen & real.unsqueeze(-1), Length(real.sum(dim=-1))
            proxy = torch.where(real.unsqueeze(-1), probs, 0.0)
        expert = torch.where(chosen, expert, 0)
        segments, ids = None, tokens.segment_ids
        if ids is not None and ids.shape == (b, n) and external.capacity is None:
            segments = find_segments(ids, real)
            load = segments.count_experts(expert, chosen, e)
            balance_loss = losses.load_balancing_loss_over_documents(load, proxy.flatten(0, 1), segments, k)
        else:
            balance_loss = losses.load_balancing_loss_from_choices(expert, chosen, proxy.sum(dim=-2), length, k)
        chosen, expert = chosen.flatten(-2), expert.flatten(-2)
        kept, queues = chosen, None
        if (capacity := external.capacity) is not None:
            queues = queue_up(expert, chosen, e, k)
            kept = chosen & (queues.position < capacity)
        return Routing(
            expert=expert,
            kept=kept,
            weight=torch.where(kept, weight.reshape(b, n * k), 0.0),
            probs=probs,
            losses={"balance": balance_loss, "z": losses.z_loss(logits, real)},
            num_tokens=n,
            num_experts=e,
            capacity=capacity,
            k=k,
            sent=chosen,
            queues=queues,
            mask=real,
            segments=segments,
        )


def attach_gate_hooks(routers: Sequence[RouterHandle], on_routing: Callable[..., None], hooks: Attachments) -> None:
    """Attach hooks that call `on_routing(router, gate, routing, importance)` after each forward pass of a gate."""
    readers = {
        router.enclosing_model: RouterOutputReader(router.enclosing_model) for router in routers if router.is_external
    }
    for router in routers:

        def hook(gate: nn.Module, args: Any, kwargs: Any, output: Any = None, router: RouterHandle = router) -> None:
            if output is None:
                return  # the hook is being attached or removed
            importance = None if router.is_external else kwargs.get("importance", args[1] if len(args) > 1 else None)
            routing = readers[router.enclosing_model].to_routing(router, output) if router.is_external else output
            on_routing(router, gate, check_routing(repr(router.name), routing), importance)

        hooks.add_forward_hook(router.hook_target, hook, with_kwargs=True)
    for reader in readers.values():  # routers in the same model share a reader
        reader.attach_to(reader.model, hooks)


@torch.no_grad()
def routing_of(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Routing]:
    """Run one forward pass without gradients, in the model's current mode, and return the routing decisions of each
    gate.

    Args:
        model: a model that contains gates, as in `track_routing`. The model must not be compiled, because compiled
            graphs have no hooks.
        args, kwargs: arguments to pass to the model.

    Returns:
        A dictionary that maps each gate's path in the model to its `Routing`. If a gate ran more than once, the
        `Routing` of its last call is returned. For a router from another library, the `Routing` is constructed from the
        router's outputs.

    Raises:
        ValueError: the model has no gate.
        RuntimeError: no gate ran.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.stats import routing_of
        >>> routing = routing_of(MoE(dim=8, num_experts=4), torch.randn(1, 5, 8))
        >>> routing["gate"].probs.shape
        torch.Size([1, 5, 4])
    """
    routers = find_routers(model, "routing_of")
    found: dict[str, Routing] = {}
    with Attachments() as hooks:
        attach_gate_hooks(
            routers, lambda router, gate, routing, importance: found.update({router.name: routing}), hooks
        )
        model(*args, **kwargs)
    if not found:
        raise RuntimeError(
            f"no gate in the {type(model).__name__} ran; pass the model's own arguments to routing_of, and call it "
            "before compiling the model"
        )
    return {router.name: found[router.name] for router in routers if router.name in found}
