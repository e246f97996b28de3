"""Every way of computing a routed network against the definition, `ops/plain.py`: outputs and all gradients."""

import pytest
import torch
from support.versions import ONE_DYNAMIC_GRAPH
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mixture_of_experts import ExpertChoiceGating, Experts, GatedExperts, MoE, Top2Gating, TopKGating, ops
from mixture_of_experts.dispatch.permutation import Permutation
from mixture_of_experts.ops import ClampedSwiGLU, autograd
from mixture_of_experts.ops.cpu import batches

IMPLEMENTATIONS = ["cpu", "grouped", "batched"]  # a new way joins here
DIM, E, HIDDEN = 8, 7, 12

GATES = {
    "dropless": lambda: TopKGating(DIM, E, 2),
    "dropless k4": lambda: TopKGating(DIM, E, 4, score="sigmoid"),
    "capacity": lambda: TopKGating(DIM, E, 2, capacity_factor_train=0.7, min_expert_capacity=1),
    "top2": lambda: Top2Gating(DIM, E),
    "expert choice": lambda: ExpertChoiceGating(DIM, E, capacity_factor=1.5),
}
EXPERTS = {
    "plain": lambda **sizes: Experts(DIM, hidden_dim=HIDDEN, **sizes),
    "biases, SiLU": lambda **sizes: Experts(DIM, hidden_dim=HIDDEN, activation=nn.SiLU, bias=True, **sizes),
    "ReLU, wider": lambda **sizes: Experts(DIM, hidden_dim=HIDDEN, activation=nn.ReLU, dim_out=11, bias=True, **sizes),
    "gated": lambda **sizes: GatedExperts(DIM, hidden_dim=HIDDEN, **sizes),
    "gated, GELU tanh": lambda **sizes: GatedExperts(DIM, hidden_dim=HIDDEN, activation=nn.GELU("tanh"), **sizes),
    "gated, biases": lambda **sizes: GatedExperts(DIM, hidden_dim=HIDDEN, bias=True, dim_out=5, **sizes),
    "clamped": lambda **sizes: GatedExperts(
        DIM, hidden_dim=HIDDEN, activation=ClampedSwiGLU(2.0, 0.5), bias=True, **sizes
    ),
}


def compute_results(layer, implementation, x, mask, seed=0):
    """Output, loss, and the gradients of all there is."""
    torch.manual_seed(seed)
    with ops.use(implementation):
        out, aux = layer(x, mask=mask)
        grad = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        gradients = torch.autograd.grad((out * grad).sum() + aux, [x, *layer.parameters()])
    return out, aux, *gradients


def compute_second_derivatives(layer, implementation, x, mask=None):
    """Second derivatives."""
    torch.manual_seed(0)
    with ops.use(implementation):
        out, aux = layer(x, mask=mask)
    leaves = [x, *layer.parameters()]
    first = torch.autograd.grad(out.square().sum() + aux, leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


def perturb_layer(layer):
    """Biases that are not 0."""
    for name, parameter in layer.experts.named_parameters():
        if name.startswith("b"):
            nn.init.normal_(parameter, std=0.5)
    return layer.double()


@pytest.mark.parametrize(
    ("gate", "experts"),
    [  # a column and a row of all pairs
        pytest.param(gate, experts, marks=[pytest.mark.slow] * (gate != "dropless" and experts != "gated, biases"))
        for gate in GATES
        for experts in EXPERTS
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementation(implementation, gate, experts, monkeypatch):
    """Masked and not, padded to batches or not, in one chunk or many, down to no token at all."""
    layer = perturb_layer(MoE(DIM, E, gate=GATES[gate](), experts=EXPERTS[experts](num_experts=E)))
    for shape, chunk, padding in [((2, 33), 1, 1 << 20), ((2, 33), 1 << 30, 0), ((3, 1), 1, 1), ((0, 4), 1, 1)]:
        monkeypatch.setattr(batches, "MAX_CHUNK_BYTES", chunk)
        monkeypatch.setattr(batches, "PADDING_WORK", padding)
        monkeypatch.setattr(batches, "FREE_PADDING_ROWS", min(padding, 2))
        x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
        for mask in (None, torch.rand(shape) < 0.7):
            torch.testing.assert_close(
                compute_results(layer, implementation, x, mask), compute_results(layer, "plain", x, mask)
            )


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementation_without_backward(implementation, experts):
    """Nothing is kept then, and the hidden layer may lie where what it is computed from did."""
    layer = perturb_layer(MoE(DIM, E, gate=TopKGating(DIM, E, 2), experts=EXPERTS[experts](num_experts=E)))
    x = torch.randn(2, 33, DIM, dtype=torch.float64)
    with ops.use("plain"):
        expected = layer(x)[0]
    with ops.use(implementation), torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementation_with_one_busy_expert(implementation):
    """The others have no rows, and gradients of exactly 0, on memory that was used before too."""
    layer = MoE(DIM, E, gate=TopKGating(DIM, E, 1, bias=True), experts=GatedExperts(DIM, E, HIDDEN, bias=True)).double()
    with torch.no_grad():
        layer.gate.b_gating[3] = 50.0
    x = torch.randn(2, 33, DIM, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        torch.testing.assert_close(
            compute_results(layer, implementation, x, None), compute_results(layer, "plain", x, None)
        )
        with ops.use(implementation):
            layer(x)[0].square().sum().backward()
        for parameter in layer.experts.parameters():
            assert (parameter.grad[torch.arange(E) != 3] == 0).all()
            parameter.grad = None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("experts", ["gated, biases", "clamped"])
def test_second_derivatives_and_many_gradients_at_once(implementation, experts):
    layer = perturb_layer(MoE(DIM, E, gate=GATES["dropless"](), experts=EXPERTS[experts](num_experts=E)))
    x = torch.randn(1, 5, DIM, dtype=torch.float64, requires_grad=True)

    torch.testing.assert_close(
        compute_second_derivatives(layer, implementation, x), compute_second_derivatives(layer, "plain", x)
    )

    def batched(name):
        with ops.use(name):
            out, _ = layer(x)
            grads = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
            leaves = [x, *layer.experts.parameters()]
            return torch.vmap(lambda grad: torch.autograd.grad(out, leaves, grad, retain_graph=True))(grads)

    torch.testing.assert_close(batched(implementation), batched("plain"))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("implementation", ["cpu", "batched"])
def test_plans_of_saved_tensors(implementation, gate, monkeypatch):
    """As they are saved on a GPU: not a bit of a gradient, or of a gradient's gradient, changes."""
    layer = perturb_layer(MoE(DIM, E, gate=GATES[gate](), experts=Experts(DIM, E, HIDDEN, bias=True)))
    x, mask = torch.randn(2, 33, DIM, dtype=torch.float64, requires_grad=True), torch.rand(2, 33) < 0.7

    wanted, saved = (
        (*compute_results(layer, implementation, x, mask), *compute_second_derivatives(layer, implementation, x, mask)),
        [],
    )
    monkeypatch.setattr(
        autograd, "select_tables_to_save", lambda permutation: saved.append(permutation.tensors_to_save()) or saved[-1]
    )
    for got, want in zip(
        (*compute_results(layer, implementation, x, mask), *compute_second_derivatives(layer, implementation, x, mask)),
        wanted,
        strict=True,
    ):
        assert torch.equal(got, want)
    for tables in saved:
        assert tables["assignment"].dtype == torch.int32
        assert ("token" not in tables) == (gate != "expert choice")
    assert len(saved) == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("frozen", ["w1", "w2", "w3", "b1", "b2", "b3", "x", "weights"])
def test_frozen_inputs_get_no_gradient(implementation, frozen):
    """Of experts in part frozen, as in fine-tuning, the other gradients are the same."""
    layer = perturb_layer(MoE(DIM, E, gate=GATES["dropless"](), experts=GatedExperts(DIM, E, HIDDEN, bias=True)))
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=frozen != "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name != f"experts.{frozen}" and not (frozen == "weights" and name.startswith("exp")))
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]

    def gradients(name):
        with ops.use(name):
            return torch.autograd.grad(layer(x)[0].square().sum(), wanted)

    torch.testing.assert_close(gradients(implementation), gradients("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["dropless", "capacity"])
def test_batched_is_one_graph_for_all_lengths(gate, monkeypatch):
    """What a GPU takes unasked, forward and backward, saved as there."""
    monkeypatch.setattr(autograd, "select_tables_to_save", Permutation.tensors_to_save)
    layer = perturb_layer(MoE(DIM, gate=GATES[gate](), experts=EXPERTS["gated, biases"](num_experts=E)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for length in (12, 17, 30):
        x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
        for got, wanted in zip(
            compute_results(compiled, "batched", x, None), compute_results(layer, "plain", x, None), strict=True
        ):
            torch.testing.assert_close(got, wanted)
        frames.add(counter.frame_count)
    assert len(frames) == 1 or not ONE_DYNAMIC_GRAPH


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "plain"])
@pytest.mark.parametrize(("dtype", "narrow"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_gradients_with_narrower_weights(implementation, dtype, narrow):
    """Routing weights with fewer bits than the experts, as under autocast, limit only their own gradient."""
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(9, DIM), torch.randn(E, DIM, HIDDEN), torch.randn(E, HIDDEN, DIM)
    expert, weight = torch.rand(9, E).topk(2).indices, torch.rand(9, 2).to(narrow)

    def compute_gradients(dtype, narrow, implementation):
        leaves = [*(value.to(dtype).requires_grad_() for value in (x, w1, w2)), weight.to(narrow).requires_grad_()]
        with ops.use(implementation):
            out = ops.moe_ffn(leaves[0], expert, leaves[3], *leaves[1:3], activation=nn.functional.silu, training=True)
        return torch.autograd.grad(out.sin().sum(), leaves)

    found, wanted = compute_gradients(dtype, narrow, implementation), compute_gradients(*[torch.float64] * 2, "plain")
    for one, other in zip(found[:3], wanted, strict=False):
        relative = (one.double() - other).norm() / other.norm()
        assert relative < (3e-6 if dtype == torch.float32 else 1e-14)
    assert found[3].dtype == narrow


def test_an_activation_with_its_own_forward_is_called():
    layer = MoE(DIM, gate=TopKGating(DIM, E), experts=Experts(DIM, E, HIDDEN))
    layer.experts.act.forward = lambda h: torch.zeros_like(h)
    assert not layer(torch.randn(1, 5, DIM))[0].any()
