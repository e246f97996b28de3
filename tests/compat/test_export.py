"""`torch.export` and ONNX: programs that agree with eager, at the exported shape and at others."""

import contextlib
import io

import pytest
import torch
from support.layer_variants import (
    DIM,
    LAYER_VARIANTS,
    NUM_EXPERTS,
    QUICK_LAYER_VARIANTS,
    ROUTERS,
    LayerVariant,
    make_layer_with_router,
    put_quick_first,
    run_layer,
)
from torch import nn
from torch.export import Dim

from mixture_of_experts import MoE, RoutedExperts, TopKGating
from mixture_of_experts.wrappers import NormedExperts

# torch 2.10 warns of the file that it loads
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")

slow = pytest.mark.slow
LENGTH_AND_BATCH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
OTHER_SHAPES = [(3, 13), (1, 7), (2, 40), (2, 10)]
MASKED = LayerVariant("MoE", "Experts", "dropless", "masked")


def make_arguments(path, *shape, seed=1):
    """Inputs, and the mask if there is one, as a tuple."""
    x, mask = path.inputs(*shape, seed=seed)
    return (x.detach(),) if mask is None else (x.detach(), mask)


def export_layer(layer, args, dynamic):
    """The exported program, saved and loaded."""
    dynamic_shapes = tuple(LENGTH_AND_BATCH for _ in args) if dynamic else None
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, args, dynamic_shapes=dynamic_shapes), file)
    file.seek(0)
    return torch.export.load(file).module()


def assert_programs_agree(program, layer, args):
    """Policy random draws the same numbers in both."""
    torch.manual_seed(2)
    actual = program(*args)
    torch.testing.assert_close(actual, run_layer(layer, *args))


@slow
@pytest.mark.feature("`torch.export` in eval, saved and loaded")
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS), ids=str)
def test_static(path):
    layer = path.build().eval()
    program = export_layer(layer, make_arguments(path), dynamic=False)
    assert_programs_agree(program, layer, make_arguments(path, seed=7))


@pytest.mark.feature("`torch.export` with dynamic batch and length (with `group_size`: those it divides)")
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS, quick=QUICK_LAYER_VARIANTS[:1]), ids=str)
def test_dynamic(path):
    layer = path.build().eval()
    # one group is not a dynamic number of groups: the exported shape has several, on both levels
    first, *others = [(2, 10), *OTHER_SHAPES] if path.variant != "grouped" else [(6, 10), (2, 30), (1, 30)]
    program = export_layer(layer, make_arguments(path, *first), dynamic=True)
    for shape in others:
        assert_programs_agree(program, layer, make_arguments(path, *shape))
    if path.variant == "grouped":  # groups of 5 do not divide 39 positions: another number of groups has to be found
        with pytest.raises(AssertionError, match="Guard failed"):
            program(*make_arguments(path, 3, 13))


@slow
@pytest.mark.parametrize("capacity", ["capacity", "dropless"])
def test_one_token_a_sequence(capacity):
    """As for decoding: an open batch of single tokens takes smaller and larger ones."""
    path = LayerVariant("MoE", "Experts", capacity, "plain")
    layer = path.build(policy="all").eval()
    program = torch.export.export(layer, make_arguments(path, 3, 1), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    for batch in (1, 2, 7, 40):
        assert_programs_agree(program, layer, make_arguments(path, batch, 1))


@slow
@pytest.mark.parametrize("dim", [0, 1])
def test_named_size_of_a_dropless_layer_needs_the_other_size_to_be_open(dim):
    """The page of compatibility says so: drop its row when torch accepts a named size alone."""
    path = LayerVariant("MoE", "Experts", "dropless", "plain")
    layer, args = path.build(policy="all").eval(), make_arguments(path, 2, 16)
    named = {dim: Dim("size", min=2, max=1024)}
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        torch.export.export(layer, args, dynamic_shapes=(named,))
    for accepted in ({dim: Dim.DYNAMIC}, {1 - dim: Dim.DYNAMIC, **named}):
        program = torch.export.export(layer, args, dynamic_shapes=(accepted,)).module()
        shape = [2, 16]
        shape[dim] = 24
        assert_programs_agree(program, layer, make_arguments(path, *shape))


class Doubled(RoutedExperts):
    num_experts = NUM_EXPERTS

    def compute(self, rows, num_tokens_per_expert):
        return 2 * rows


@slow
@pytest.mark.parametrize("wrap", [lambda experts: experts, lambda experts: NormedExperts(experts, nn.RMSNorm(DIM))])
def test_custom_experts_compute_any_number_of_rows(wrap):
    layer = MoE(DIM, gate=TopKGating(DIM, NUM_EXPERTS), experts=wrap(Doubled())).eval()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = torch.export.export(layer, (torch.randn(2, 6, DIM),), dynamic_shapes=shapes).module()
    for shape in ((1, 3), (4, 9)):
        x = torch.randn(*shape, DIM)
        torch.testing.assert_close(program(x), layer(x))


@slow
@pytest.mark.feature("`torch.export` with dynamic batch and length")
@pytest.mark.parametrize("router", put_quick_first(ROUTERS, ["ExpertChoice"]))
def test_routers(router):
    layer = make_layer_with_router(router).eval()
    program = export_layer(layer, make_arguments(MASKED), dynamic=True)
    for shape in OTHER_SHAPES:
        assert_programs_agree(program, layer, make_arguments(MASKED, *shape))


@pytest.fixture
def onnx_session():
    """A function that makes a session of onnxruntime from a layer."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    def session(layer, args, dynamic):
        dynamic_shapes = tuple(LENGTH_AND_BATCH for _ in args) if dynamic else None
        with contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(layer, args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
        file = io.BytesIO()
        program.save(file)
        return runtime.InferenceSession(file.getvalue())

    return session


def assert_onnx_agrees(session, layer, args):
    names = [declared.name for declared in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, args, strict=True)}
    out, aux_loss = (torch.from_numpy(result) for result in session.run(None, feed))
    expected = layer(*args)
    torch.testing.assert_close(out, expected[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aux_loss, expected[1].detach(), rtol=1e-4, atol=1e-5)


onnx_warnings = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@slow
@onnx_warnings
@pytest.mark.feature("ONNX by `torch.onnx.export(dynamo=True)`, in onnxruntime (dynamic; with `group_size` static)")
@pytest.mark.parametrize("path", put_quick_first(LAYER_VARIANTS, QUICK_LAYER_VARIANTS[:1]), ids=str)
def test_onnx(path, onnx_session):
    layer = path.build(policy="threshold").eval()
    dynamic = path.variant != "grouped"
    session = onnx_session(layer, make_arguments(path), dynamic)
    for shape in OTHER_SHAPES if dynamic else [(2, 10)]:
        assert_onnx_agrees(session, layer, make_arguments(path, *shape, seed=7))


@onnx_warnings
@pytest.mark.exhaustive
@pytest.mark.feature("ONNX by `torch.onnx.export(dynamo=True)`, in onnxruntime")
@pytest.mark.parametrize("router", ROUTERS)
def test_onnx_routers(router, onnx_session, limit):
    layer = make_layer_with_router(router).eval()
    session = onnx_session(layer, make_arguments(MASKED), True)
    if router == "Top2, policy random":
        assert session.run(
            None, dict(zip(("inputs", "mask"), (t.numpy() for t in make_arguments(MASKED)), strict=True))
        )
        limit("the model runs, but onnxruntime and torch draw different random numbers: export with another policy")
        return
    for shape in OTHER_SHAPES:
        assert_onnx_agrees(session, layer, make_arguments(MASKED, *shape, seed=7))
