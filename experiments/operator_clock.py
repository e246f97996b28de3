"""Which operators the seconds of a training step go to, and of which part of the model each of them is.

An operator of the backward belongs to the part whose forward it is of: the graph's nodes have its name on them.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixture_of_experts import MoE, Routing

from .language_model.trainee import Trainee

REST, ROUTER, LAYERS, OPTIMIZER = "attention, embeddings, loss", "router", "feed-forward", "optimizer"


class Clock(TorchDispatchMode):
    """Seconds of the processor, and calls, of each operator that runs within it, by (part, operator)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = REST
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.calls: defaultdict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        node: Any = torch._C._current_autograd_node()
        key = (self.part if node is None else node.metadata.get("part", REST), func.overloadpacket.__name__)
        begin = time.process_time()
        out = func(*args, **(kwargs or {}))
        self.seconds[key] += time.process_time() - begin
        self.calls[key] += 1
        return out

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs here, a backward aside, is of `part`."""
        outer, self.part = self.part, part
        yield
        self.part = outer


@contextmanager
def watched(trainee: Trainee) -> Iterator[Clock]:
    """A clock of the steps that are taken here."""
    with ExitStack() as stack:
        clock = Clock()
        for block in trainee.model.blocks:
            follow(block.ffn, LAYERS, clock, stack)
            if isinstance(block.ffn, MoE):
                follow(block.ffn.gate, ROUTER, clock, stack)
        for owner, name in ((trainee.optimizer, "step"), (trainee, "_clip")):
            stack.enter_context(patch.object(owner, name, clock.within(OPTIMIZER)(getattr(owner, name))))
        yield stack.enter_context(clock)


def follow(module: nn.Module, part: str, clock: Clock, stack: ExitStack) -> None:
    """Say that a module's forward and backward are of `part`, until the stack is closed."""
    inside = ExitStack()

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inside.enter_context(clock.within(part))

    def leave(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        inside.close()
        mark(tensors_of(out), args[0].grad_fn, part)

    stack.enter_context(module.register_forward_pre_hook(enter))
    stack.enter_context(module.register_forward_hook(leave))


def tensors_of(out: Any) -> list[Tensor]:
    """The tensors by which a gradient comes back to a router or a feed-forward layer."""
    if isinstance(out, Routing):
        return [out.weight, *out.losses.values()]
    return [part for part in out if isinstance(part, Tensor)]


def mark(outputs: Sequence[Tensor], entrance: Any, part: str) -> None:
    """Write a part's name on the graph's nodes from its outputs back to the node that its input is from."""
    waiting: list[Any] = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node is not entrance and "part" not in node.metadata:
            node.metadata["part"] = part
            waiting += [before for before, _ in node.next_functions if before is not None]


def cost_of_watching(rounds: int = 1500) -> float:
    """Seconds that a clock adds to an operator: what it says of views, less what they take when nobody watches."""
    tensor, clock = torch.zeros(4, 4), Clock()

    def views() -> None:
        for _ in range(rounds):
            tensor[1:3].view(8)

    with clock:
        views()
    begin = time.process_time()
    views()
    return (sum(clock.seconds.values()) - (time.process_time() - begin)) / sum(clock.calls.values())
