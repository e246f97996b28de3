"""`torch.compile(fullgraph=True)`: one graph without breaks, equal to eager, and few graphs for many lengths."""

import shutil

import pytest
import torch
from support.layer_variants import (
    LAYER_VARIANTS,
    QUICK_LAYER_VARIANTS,
    ROUTERS,
    LayerVariant,
    assert_all_close,
    compute_gradients,
    make_layer_with_router,
    put_quick_first,
    run_layer,
)
from support.versions import ONE_DYNAMIC_GRAPH
from torch._dynamo import lookup_backend

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:group_size=5 splits"),  # one of the shapes: the warning too is traced
]
slow = pytest.mark.slow
compiler_needed = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")

# the second makes length and batch dynamic, all others must fit that graph: short and long, and with every queue full
SHAPES = [(2, 10), (3, 13), (2, 7), (5, 40), (3, 2), (2, 10)]
PLAIN = [path for path in LAYER_VARIANTS if path.variant == "plain"]
QUICK = [path for path in PLAIN if str(path) in ("MoE-Experts-capacity-plain", "MoE-GatedExperts-dropless-plain")]
TRACED = "`torch.compile(fullgraph=True)`, forward and backward, "


class Counting:
    """A backend that keeps the graphs it was given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = lookup_backend(backend)
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return self.backend(graph, example_inputs)


def assert_compiled_equal(layer, compiled, x, mask, **tolerance):
    """Outputs, loss and gradients of both under the same seed."""
    expected, actual = run_layer(layer, x, mask), run_layer(compiled, x, mask)
    torch.testing.assert_close(actual, expected, **tolerance)
    assert_all_close(compute_gradients(layer, x, actual), compute_gradients(layer, x, expected), **tolerance)


def check_lengths(path, layer, backend, graphs=2):
    """Equal to eager at every shape, by two graphs; by a graph for each with group_size, which searches a divisor."""
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for shape in SHAPES[:2] if path.variant == "grouped" else SHAPES:
        assert_compiled_equal(layer, compiled, *path.inputs(*shape))
    assert len(backend.graphs) == graphs


@pytest.mark.feature(
    TRACED + "in training (policy random): two graphs for all lengths (with `group_size`: up to one each)"
)
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS, quick=QUICK_LAYER_VARIANTS[:1]), ids=str)
def test_training(path):
    check_lengths(path, path.build(), Counting())


@slow
@pytest.mark.feature(TRACED + "in eval: two graphs for all lengths (with `group_size`: up to one each)")
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS), ids=str)
def test_eval(path):
    check_lengths(path, path.build().eval(), Counting())


@slow
@pytest.mark.feature(TRACED + "`dynamic=True`: one graph for all lengths (with `group_size`: one each)")
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS, QUICK), ids=str)
def test_dynamic(path):
    layer, backend = path.build(), Counting()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    shapes = SHAPES[:2] if path.variant == "grouped" else SHAPES
    for shape in shapes:
        assert_compiled_equal(layer, compiled, *path.inputs(*shape))
    allowed = [1] if ONE_DYNAMIC_GRAPH else [1, 2]
    assert len(backend.graphs) in ([len(shapes)] if path.variant == "grouped" else allowed)


@slow
@pytest.mark.feature(TRACED + "bfloat16, float16, float64 modules and autocast to bfloat16 (plain)")
@pytest.mark.parametrize("path", put_quick_first(PLAIN, QUICK), ids=str)
@pytest.mark.parametrize("dtype", put_quick_first(["bfloat16", "float16", "float64", "autocast"], ["bfloat16"]))
def test_dtypes(path, dtype):
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, dtype)
    layer = path.build().to(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x, mask = path.inputs(dtype=dtype)
        tolerance = {} if dtype == torch.float64 else dict(rtol=2e-2, atol=2e-2)
        assert_compiled_equal(layer, compiled, x, mask, **tolerance)


@slow
@pytest.mark.parametrize("router", ["Top2, policy random", "ExpertChoice"])
def test_another_capacity_factor(router):
    """A float that differs between two layers becomes a symbol, from which no size can be computed."""
    path = LayerVariant("MoE", "Experts", "capacity", "plain")
    for factor in (1.0, 1.5, 0.75):
        layer = make_layer_with_router(router)
        names = [name for name in dir(layer.gate) if name in ("capacity_factor", "capacity_factor_train")]
        setattr(layer.gate, names[-1], factor)
        assert_compiled_equal(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), *path.inputs())


@slow
@pytest.mark.feature(TRACED + "in training: two graphs for all lengths (one more if a capacity is a single slot)")
@pytest.mark.parametrize("router", put_quick_first(ROUTERS, ["TopK, expert bias", "ExpertChoice"]))
def test_routers(router):
    path = LayerVariant("MoE", "Experts", "dropless", "masked")
    graphs = 3 if router == "ExpertChoice" else 2  # two tokens make a capacity of one, and a size of one broadcasts
    check_lengths(path, make_layer_with_router(router), Counting(), graphs)


@slow
@pytest.mark.feature(TRACED + "with inductor (plain)")
@pytest.mark.parametrize("path", put_quick_first(PLAIN, QUICK), ids=str)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of what torch itself imports
@compiler_needed
def test_inductor(path):
    layer = path.build()
    with torch._inductor.config.patch(fallback_random=True):  # else it has random numbers of its own
        compiled = torch.compile(layer, fullgraph=True)
        assert_compiled_equal(layer, compiled, *path.inputs())
