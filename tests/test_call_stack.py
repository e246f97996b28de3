"""Calls that are under way: each known to its own thread, read by compiled graphs, gone with its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.concurrent_calls import run_in_threads
from torch import Tensor, nn

from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import CALL_STACKS, ForwardCall


class MaskCall(ForwardCall):
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.seen: list[Tensor] = []


class Layer(nn.Module):
    """Multiplies by the mask of the call that it is part of."""

    def forward(self, x: Tensor) -> Tensor:
        call = call_stack.current_call(self)
        if call is None:
            return x
        call.seen.append(x.sum())
        return x * call.mask


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), nn.Sigmoid(), Layer())
        self.sum = [torch.zeros(())]
        self.register_forward_pre_hook(self.begin, with_kwargs=True)
        self.register_forward_hook(self.end, always_call=True)

    def begin(self, _: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        call_stack.push_call(MaskCall(kwargs["mask"]), self, *self.layers)

    def end(self, *_: object) -> None:
        call = call_stack.pop_call(self)
        self.sum[0] = call.seen[0] + call.seen[1]

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.layers(x)


def make_masks(number: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    return [torch.randint(2, (5,), generator=gen).float() for _ in range(number)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [None, "model", "layers"])
def test_each_thread_has_its_own(compiled):
    """A graph of the model serves all threads and masks; those of layers, whose hooks are outside, may be two."""
    torch.compiler.reset()
    model, graphs = Model(), []

    for module in {None: [], "model": [model], "layers": list(model.layers.children())[::2]}[compiled]:
        module.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    x, given = torch.arange(5.0), make_masks(4)
    model(x, mask=given[0])
    made = len(graphs)

    def work(number: int) -> None:
        for _ in range(50):
            found = model(x, mask=given[number])
            assert torch.equal(found, (x * given[number]).sigmoid() * given[number])
        assert not CALL_STACKS.calls

    run_in_threads(work, 4)
    assert len(graphs) == made or compiled == "layers"  # nothing was compiled for other threads and masks
    assert bool(graphs) == bool(compiled)
    assert len(graphs) <= made * 5  # one more of each for each of the four threads, and no more in 200 forwards
    assert torch.equal(model(x, mask=given[1]), (x * given[1]).sigmoid() * given[1])
    torch.testing.assert_close(model.sum[0], x.sum() + (x * given[1]).sigmoid().sum())
    torch.compiler.reset()


def test_an_interrupted_call_is_forgotten():
    """No hook is told of it; the next who asks finds that its frame is gone."""
    model, x = Model(), torch.arange(5.0)
    layer = model.layers[0]

    def interrupt(*_: object) -> None:
        assert call_stack.current_call(layer) is not None
        raise KeyboardInterrupt

    hook = layer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x, mask=make_masks(1)[0])
    hook.remove()
    assert CALL_STACKS.calls
    assert torch.equal(layer(x), x)
    assert torch.equal(model.layers(x), x.sigmoid())
    model(x, mask=make_masks(2)[1])
    assert not CALL_STACKS.calls


def test_recomputation_is_not_part_of_enclosing_call():
    """Unless it brings one along."""
    layer, x = Layer(), torch.ones(5, requires_grad=True)
    of_forward, of_backward, seen = MaskCall(torch.zeros(5)), MaskCall(torch.full((5,), 2.0)), []

    def run_again(grad: Tensor) -> None:
        seen.append(layer(x))
        with call_stack.activate_calls([(layer, of_backward)]):
            seen.append(layer(x))
        seen.append(layer(x))

    with call_stack.activate_calls([(layer, of_forward)]):
        y = layer(x)
        y.register_hook(run_again)
        y.sum().backward()
        seen.append(layer(x))
    assert [int(value.sum()) for value in seen] == [5, 10, 5, 0]
    assert call_stack.current_call(layer) is None
    assert call_stack.pop_call(layer) is None
