"""Forced routing, for benchmarks: every gate of a model sends tokens to experts that no score chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mixture_of_experts.checks import check_choice
from mixture_of_experts.gating import TokenChoiceGate, reads_of
from mixture_of_experts.gating.given import FORCED, Forced, forced_experts
from mixture_of_experts.held import BlockSettings, are_choices, record_of


@contextmanager
def force_routing(model: nn.Module, how: Forced = "balanced") -> Iterator[None]:
    """Make every gate in `model` send tokens to forced experts, while the context lasts.

    The time and memory of a layer then depend on shapes alone. Every real token makes all k choices, at most one of
    each expert; of `ReLUGating` those with positive logits. The gate computes their weights from the scores of the
    forced experts, with gradients. In a block of `transformers` the forced experts get the weights of the router's own
    choices, and padding is routed too.

    Args:
        model: a model whose gates read `given_experts`. For a single gate set its attribute `forced` instead.
        how: "balanced" takes one expert after the other: all have equally many choices of real tokens, give or take
            one. It starts with expert 0 in every call, so every step of decoding takes the same experts. "random" draws
            k different experts for each token by torch's generator, as a router that is balanced on average.

    Raises:
        ValueError: `how` is another word, or the model has nothing to force.
        TypeError: a gate does not read `given_experts`; in a forward, a router of `transformers` returns no choices.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating, force_routing
        >>> moe = MoE(dim=8, gate=TopKGating(8, num_experts=4))
        >>> with force_routing(moe, "balanced"):
        ...     routing = moe.gate(torch.randn(1, 4, 8))
        >>> routing.expert.tolist()
        [[0, 1, 2, 3, 0, 1, 2, 3]]
    """
    check_choice("how", how, tuple(FORCED))
    gates = [module for module in model.modules() if isinstance(module, TokenChoiceGate)]
    blocks = [(module, record) for module in model.modules() if (record := record_of(module)) is not None]
    if not gates and not blocks:
        raise ValueError(f"{type(model).__name__} has no gate of token choice and no sparse block: nothing to force")
    for gate in gates:
        if "given_experts" not in reads_of(gate):
            raise TypeError(
                f"{type(gate).__name__} does not read given_experts, by which experts are forced: name it in `reads`, "
                'and have `decide` choose tokens.side["given_experts"]'
            )
    with ExitStack() as ends:
        for gate in gates:
            ends.callback(setattr, gate, "forced", gate.forced)
            gate.forced = how
        for block, record in blocks:
            held = BlockSettings(block, record)
            ends.callback(held.router.register_forward_hook(partial(replace_choices, held, how)).remove)
        yield


def replace_choices(held: BlockSettings, how: Forced, router: nn.Module, args: object, output: Any) -> Any:
    """Forward hook of a router of `transformers`: replaces the experts `(t, k)` that it returns."""
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    expert = next((ids for ids in tensors for weight in tensors if are_choices(weight, ids)), None)
    if expert is None:
        raise TypeError(
            f"{type(router).__name__} returns no experts of flattened tokens, so they cannot be forced: convert its "
            "block with from_transformers"
        )
    shape = (1, *expert.shape)
    forced = forced_experts(how, shape, held.num_experts - held.always, expert.device).view(expert.shape)
    return tuple(forced.to(expert.dtype) if part is expert else part for part in parts)
