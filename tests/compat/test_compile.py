"""`torch.compile(fullgraph=True)`: one graph without breaks, equal to eager, and few graphs for many lengths."""

import shutil

import pytest
import torch
from torch._dynamo import lookup_backend

from compat.paths import (
    PATHS,
    ROUTERS,
    SOME_PATHS,
    Path,
    assert_all_close,
    gradients,
    layer_with_router,
    run,
    some_first,
)

pytestmark = [
    pytest.mark.slow,  # until the table has their rows
    pytest.mark.usefixtures("fresh_compiler"),
    # torch makes an object of every autograd function that it traces, and warns of that itself
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:group_size=5 splits"),  # one of the shapes: the warning too is traced
]
compiler_needed = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")

# the second makes length and batch dynamic, all others must fit that graph: short and long, and with every queue full
SHAPES = [(2, 10), (3, 13), (2, 7), (5, 40), (3, 2), (2, 10)]
TRACED = "`torch.compile(fullgraph=True)`, forward and backward, "


class Counting:
    """A backend that keeps the graphs it was given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = lookup_backend(backend)
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return self.backend(graph, example_inputs)


def compare(layer, compiled, x, mask, **tolerance):
    """Outputs, loss and gradients of both under the same seed."""
    expected, actual = run(layer, x, mask), run(compiled, x, mask)
    torch.testing.assert_close(actual, expected, **tolerance)
    assert_all_close(gradients(layer, x, actual), gradients(layer, x, expected), **tolerance)


def check_lengths(path, layer, backend):
    """Equal to eager at every shape, by two graphs; by a graph for each with group_size, which searches a divisor."""
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for shape in SHAPES[:2] if path.variant == "grouped" else SHAPES:
        compare(layer, compiled, *path.inputs(*shape))
    assert len(backend.graphs) == 2


@pytest.mark.feature(
    TRACED + "in training (policy random): two graphs for all lengths (with `group_size`: up to one each)"
)
@pytest.mark.parametrize("path", some_first(PATHS), ids=str)
def test_training(path):
    check_lengths(path, path.build(), Counting())


@pytest.mark.feature(TRACED + "in eval: two graphs for all lengths (with `group_size`: up to one each)")
@pytest.mark.parametrize("path", some_first(PATHS), ids=str)
def test_eval(path):
    check_lengths(path, path.build().eval(), Counting())


@pytest.mark.feature(TRACED + "in training: two graphs for all lengths")
@pytest.mark.parametrize("router", ROUTERS)
def test_routers(router):
    path = Path("MoE", "Experts", "dropless", "masked")
    check_lengths(path, layer_with_router(router), Counting())


@pytest.mark.feature(TRACED + "with inductor")
@pytest.mark.parametrize("path", some_first(SOME_PATHS[:2]), ids=str)
@compiler_needed
def test_inductor(path):
    layer = path.build()
    with torch._inductor.config.patch(fallback_random=True):  # else it has random numbers of its own
        compiled = torch.compile(layer, fullgraph=True)
        compare(layer, compiled, *path.inputs())
