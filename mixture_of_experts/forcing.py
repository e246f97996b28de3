"""Forced routing: every gate of a model sends tokens to experts that no score chose, for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mixture_of_experts.checks import check_choice
from mixture_of_experts.gating import TokenChoiceGate, reads_of
from mixture_of_experts.gating.forced import FORCED, Forced, forced_experts
from mixture_of_experts.held import BlockSettings, are_choices, record_of


@contextmanager
def force_routing(model: nn.Module, how: Forced = "balanced") -> Iterator[None]:
    """Have every gate in `model` send tokens to forced experts, while the context lasts.

    What a layer takes in time and memory then depends on shapes alone. Real tokens make all their choices, which weigh
    what the gate makes of the scores of these experts, with gradients. A block of `transformers` keeps the weights of
    its own choices, and routes padding as well.

    Args:
        model: with gates that read `given_experts`; a gate alone has the attribute `forced`.
        how: "balanced": one expert after the other, so that they have equally many choices of real tokens, give or take
            one. It begins anew in every call: a step of decoding always meets the same experts. "random": k different
            ones of each token, by torch's generator, as a router that is balanced on average.

    Raises:
        ValueError: `how` is another word, or there is nothing to force in the model.
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
                "and have `decide` choose what tokens.side has under that name"
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
    """Forward hook of a router of `transformers`: the experts `(t, k)` that it returns, replaced."""
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    expert = next((ids for ids in tensors for weight in tensors if are_choices(weight, ids)), None)
    if expert is None:
        raise TypeError(
            f"{type(router).__name__} returns no experts of flattened tokens, they cannot be forced: convert its block "
            "with from_transformers"
        )
    shape = (1, *expert.shape)
    forced = forced_experts(how, shape, held.num_experts - held.always, expert.device).view(expert.shape)
    return tuple(forced.to(expert.dtype) if part is expert else part for part in parts)
