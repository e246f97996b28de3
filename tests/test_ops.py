"""`ops` as a user calls it: routing of one's own in, tokens out; which way, and why."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from mixture_of_experts import ExpertList, Experts, GatedExperts, HeirarchicalMoE, MoE, OutputOnly, TopKGating, ops
from mixture_of_experts import experts as experts_module
from mixture_of_experts.experts import RoutedExperts
from mixture_of_experts.ops import ClampedSwiGLU, grouped_matmul, moe_ffn
from mixture_of_experts.support.implementations import LISTENERS, collect_explanations

T, D, H, OUT, E, K = 11, 6, 10, 5, 4, 2


def compute_token_by_token(x, expert, weight, w1, w2, w3=None, *, activation, gate_up=None, b1=None, b2=None, b3=None):
    """What `moe_ffn` says it computes, one choice after the other."""
    rows = []
    for t in range(len(x)):
        total = x.new_zeros(w2.shape[-1])
        for k in range(expert.shape[1]):
            e = int(expert[t, k])
            if not 0 <= e < len(w2):
                continue
            pre = x[t] @ w1[e] + (0 if b1 is None else b1[e])
            if gate_up == "concatenated":
                gate, up = pre[: len(pre) // 2], pre[len(pre) // 2 :]
            elif gate_up == "interleaved":
                gate, up = pre[::2], pre[1::2]
            else:
                gate, up = pre, None if w3 is None else x[t] @ w3[e] + (0 if b3 is None else b3[e])
            if isinstance(activation, ClampedSwiGLU):
                hidden = activation(gate, up)
            else:
                hidden = activation(gate) if up is None else activation(gate) * up
            total = total + weight[t, k] * (hidden @ w2[e] + (0 if b2 is None else b2[e]))
        rows.append(total)
    return torch.stack(rows)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


CALLS = {
    "plain": lambda: {"w1": randn(E, D, H), "activation": F.gelu},
    "plain, biases": lambda: {"w1": randn(E, D, H), "b1": randn(E, H), "b2": randn(E, OUT), "activation": nn.ReLU()},
    "a function of one's own": lambda: {"w1": randn(E, D, H), "activation": lambda h: h.sin()},
    "gated": lambda: {"w1": randn(E, D, H), "w3": randn(E, D, H), "activation": F.silu},
    "gated, biases": lambda: {
        "w1": randn(E, D, H),
        "w3": randn(E, D, H),
        "activation": nn.SiLU(),
        "b1": randn(E, H),
        "b2": randn(E, OUT),
        "b3": randn(E, H),
    },
    "concatenated": lambda: {"w1": randn(E, D, 2 * H), "activation": F.silu, "gate_up": "concatenated"},
    "concatenated, transposed": lambda: {
        "w1": randn(E, 2 * H, D).mT,
        "b1": randn(E, 2 * H),
        "activation": F.silu,
        "gate_up": "concatenated",
    },
    "interleaved, clamped": lambda: {
        "w1": randn(E, D, 2 * H),
        "activation": ClampedSwiGLU(1.5, 0.7),
        "gate_up": "interleaved",
        "b1": randn(E, 2 * H),
        "b2": randn(E, OUT),
    },
}


@pytest.mark.parametrize("implementation", ["auto", "cpu", "grouped", "batched", "plain"])
@pytest.mark.parametrize("call", CALLS)
def test_moe_ffn(call, implementation):
    """Outputs and all gradients; ids that are nobody's, an expert twice, one that gets nothing."""
    arguments = CALLS[call]()
    if implementation in ("cpu", "batched") and call == "a function of one's own":
        pytest.skip("no kernel for it")
    x, w2 = randn(T, D), randn(E, H, OUT)
    expert = torch.randint(0, E + 2, (T, K))
    expert[expert == 1] = 0
    expert[0], expert[1] = 2, torch.tensor([E, -1])
    weight = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    tensors = [t for t in (x, weight, w2, *arguments.values()) if isinstance(t, Tensor)]
    grad = torch.randn(T, OUT, dtype=torch.float64)
    with ops.use(implementation):
        out = moe_ffn(x, expert, weight, w2=w2, **arguments, training=True)
        found = torch.autograd.grad(out, tensors, grad)
    expected = compute_token_by_token(x, expert, weight, w2=w2, **arguments)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, grad))
    with torch.no_grad(), ops.use(implementation):  # and as in decoding
        for tokens in (slice(0, 1), slice(0, 3), slice(0, 0)):
            few = moe_ffn(x[tokens], expert[tokens], weight[tokens], w2=w2, **arguments)
            torch.testing.assert_close(few, expected[tokens].detach())


def test_the_gradient_of_a_fused_weight_is_one_tensor_in_its_strides():
    w1, w2 = torch.randn(E, 2 * H, D, requires_grad=True), torch.randn(E, H, D)
    x, expert, weight = torch.randn(T, D), torch.randint(E, (T, K)), torch.rand(T, K)
    moe_ffn(x, expert, weight, w1.mT, w2, activation=F.silu, gate_up="concatenated", training=True).sum().backward()
    assert w1.grad is not None
    assert w1.grad.is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("gate_up", ["concatenated", "interleaved"])
def test_moe_ffn_compiled(gate_up):
    """In one graph, for every length."""
    w1, w2, b1 = randn(E, D, 2 * H), randn(E, H, OUT), randn(E, 2 * H)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x, expert, weight):
        act = ClampedSwiGLU()
        return moe_ffn(x, expert, weight, w1, w2, activation=act, gate_up=gate_up, b1=b1, training=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for length in (7, 9, 13):  # no other size, which torch would take for the same
        arguments = randn(length, D), torch.randint(E, (length, K)), torch.rand(length, K)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(2, T, D)}, r"x and w2 must have shapes \(t, d\)"),
        ({"w1": torch.randn(0, D, H), "w2": torch.randn(0, H, OUT)}, r"got \(0, 10, 5\); pass at least one expert"),
        ({"w2": torch.randn(E, H, 0)}, r"positive dimensions .* got \(4, 10, 0\)"),
        ({"expert": torch.zeros(T, K + 1, dtype=torch.int64)}, r"same shape \(t, k\)"),
        ({"expert": torch.zeros(T, K)}, "float32"),
        ({"expert": torch.zeros(T, K, dtype=torch.bool)}, "bool"),
        ({"expert": torch.zeros(T, 0, dtype=torch.int64), "weight": torch.zeros(T, 0)}, "k > 0"),
        ({"activation": nn.GELU}, "got the class GELU"),
        ({"w1": torch.randn(E, D, H + 1)}, r"w1 must have shape \(4, 6, 10\)"),
        ({"b2": torch.randn(E, H)}, r"b2 must have shape \(4, 5\)"),
        ({"w3": torch.randn(E, H, D)}, r"w3 must have shape \(4, 6, 10\)"),
        ({"b3": torch.randn(E, H)}, "b3 is the bias of w3, but w3 is None"),
        ({"gate_up": "side by side"}, "gate_up must be one of 'concatenated', 'interleaved'"),
        ({"gate_up": "concatenated"}, r"w1 must have shape \(4, 6, 20\)"),
        ({"gate_up": "concatenated", "w3": torch.randn(E, D, H)}, "w3 must be None"),
        ({"activation": ClampedSwiGLU()}, r"\(gate, up\).*w3"),
        ({"x": torch.ones(T, D, dtype=torch.int64)}, "x must be floating point"),
        ({"x": torch.ones(T, D, dtype=torch.complex64)}, "x must be floating point"),
        ({"w1": 1, "w2": 1}, "w1 must be a tensor, got 1"),
        ({"b2": [0.0]}, r"b2 must be a tensor, got \[0.0\]"),
        ({"x": torch.randn(T, D, device="meta")}, r"the experts' weights must be on .* tokens \(meta\), got cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),  # the tensors are random
)
def test_moe_ffn_rejects_bad_arguments(changed, message):
    arguments = {
        "x": torch.randn(T, D),
        "expert": torch.zeros(T, K, dtype=torch.int64),
        "weight": torch.rand(T, K),
        "w1": torch.randn(E, D, H),
        "w2": torch.randn(E, H, OUT),
        "activation": F.silu,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        moe_ffn(**{**arguments, **changed})


def test_explain_call():
    """The way that is taken, and why no faster one."""
    x = torch.randn(2, 5, D)
    other = MoE(D, E, activation=F.gelu)
    other.experts.act.register_forward_hook(lambda *_: None)  # which is that layer's alone
    for layer in (MoE(D, E, activation=F.gelu), MoE(D, E)):
        found = ops.explain_call(layer, x)
        assert (found.implementation, found.reasons) == ("cpu", {})
    assert [gate.implementation for gate in found.gates] == ["operators"]
    assert "NVIDIA" in found.gates[0].reasons["kernel"]
    assert str(found).splitlines()[:2] == ["cpu", "gate: operators"]
    odd = ops.explain_call(MoE(D, E, activation=nn.Tanh), x)
    assert odd.implementation == "grouped"
    assert "Tanh" in odd.reasons["cpu"]
    assert "not cpu: the activation Tanh" in str(odd)
    assert ops.explain_call(MoE(D, E, experts=[nn.Linear(D, D) for _ in range(E)]), x).implementation == "module"
    meta = ops.explain_call(HeirarchicalMoE(D, (2, 2)).to("meta"), x.to("meta"))
    assert meta.implementation == "batched"
    assert meta.reasons == {
        "cpu": "the tokens are on meta",
        "triton": "the kernels support only NVIDIA GPUs",
        "grouped": "there is no grouped product on meta",
    }
    assert [gate.implementation for gate in meta.gates] == 2 * ["operators"]
    with ops.use("grouped"):
        assert ops.explain_call(MoE(D, E), x).implementation == "grouped"


def test_explain_call_describes_the_gate():
    """That of a gate behind a parametrization is the same; another `decide`, and a second call, are told of too."""
    token = torch.randn(1, 1, D)
    layer = MoE(D, E, gate=TopKGating(D, E)).eval()
    assert ops.explain_call(layer, token).gates == (ops.Explanation("numbers"),)
    parametrize.register_parametrization(layer.gate, "w_gating", nn.Identity())
    assert ops.explain_call(layer, token).gates == (ops.Explanation("numbers"),)
    own = type("Own", (TopKGating,), {"decide": lambda self, tokens: TopKGating.decide(self, tokens)})(D, E)
    assert "Own overrides decide" in ops.explain_call(MoE(D, E, gate=own).eval(), token).gates[0].reasons["numbers"]
    both = nn.Sequential(OutputOnly(layer), OutputOnly(layer))
    assert len(ops.explain_call(both, token).gates) == 1


def test_a_table_without_an_implementation_for_the_call():
    """The error has each reason and the remedy, and nothing is reported."""
    own = {name: part for name, part in TopKGating.implementations.items() if name != "operators"}
    gate = type("Own", (TopKGating,), {"implementations": own})(D, E)
    message = "no implementation of the gate .*'numbers': 'it supports only eval mode .*TokenChoiceGate"
    with collect_explanations() as explanations, pytest.raises(ValueError, match=message):
        gate(torch.randn(1, 1, D))
    assert explanations == []


def test_explain_call_has_no_side_effects():
    layer, x = MoE(D, E), torch.randn(2, 5, D)
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    ops.explain_call(layer, x)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(TypeError):
        ops.explain_call(layer, x, importance=1)
    assert not LISTENERS.lists


def test_preparing_a_layer_changes_nothing():
    """Neither buffers nor gradients nor random numbers."""
    layer = MoE(D, E, gate=TopKGating(D, E, 2, expert_bias=True), experts=GatedExperts(D, E))
    calls = []
    layer.register_forward_hook(lambda module, args, out: calls.append(args[0]))
    before, drawn = {name: value.clone() for name, value in layer.state_dict().items()}, torch.get_rng_state()
    found = ops.prepare(layer, [5, 7], sequences=(1, 3))
    assert list(found) == [(1, 5), (1, 7), (3, 5), (3, 7)] == [call.shape[:2] for call in calls]
    assert {described.implementation for described in found.values()} == {"cpu"}
    assert all(call.requires_grad for call in calls)
    ops.prepare(layer.eval(), 5)
    assert not calls[-1].requires_grad
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    for wrong, said in (({"tokens": 0}, "tokens"), ({"tokens": 1, "sequences": 1.5}, "sequences")):
        with pytest.raises(ValueError, match=f"^{said} must be"):
            ops.prepare(layer, **wrong)
    with pytest.raises(ValueError, match=r"^layer\.dim must be"):
        ops.prepare(nn.Linear(2, 2), 5)


def test_tokens_that_prepare_a_layer_have_the_dtype_of_its_experts():
    """A router may be in float32 beside experts in bfloat16."""
    layer = MoE(D, E, experts=[nn.Linear(D, D) for _ in range(E)]).to(torch.bfloat16)
    layer.gate.float()
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    ops.prepare(layer, 5)
    ops.prepare(MoE(D, E, experts=[nn.Identity()] * E), 5)  # of the router, where experts have no weights
    assert seen == [torch.bfloat16]


def test_explain_call_uses_current_thread():
    """Others compute meanwhile, and explain by themselves."""
    layers = [MoE(8, 4, activation=activation) for activation in (nn.GELU, nn.CELU)]
    x = torch.randn(1, 6, 8)
    expected = [ops.explain_call(layer, x).implementation for layer in layers]
    assert len(set(expected)) == 2
    entered, started = threading.Barrier(2), threading.Barrier(2)

    def until_both_explain(*_: object) -> None:
        entered.wait(60)

    for layer in layers:
        layer.register_forward_pre_hook(until_both_explain)

    def told(layer: nn.Module) -> str:
        started.wait(60)
        return ops.explain_call(layer, x).implementation

    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            assert list(pool.map(told, layers)) == expected


def test_use_contexts_exit_in_any_order():
    """Contexts of two threads that overlap: each takes out its own, and nothing stays."""
    layer, x, steps = MoE(8, 4), torch.randn(1, 6, 8), threading.Barrier(2)
    before = ops.explain_call(layer, x).implementation

    def other() -> None:
        steps.wait(60)  # 1: the first one is open
        with ops.use("batched"):
            steps.wait(60)  # 2: both are
            steps.wait(60)  # 3: the first one is closed
            assert ops.explain_call(layer, x).implementation == "batched"

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        with ops.use("plain"):
            assert ops.explain_call(layer, x).implementation == "plain"
            steps.wait(60)
            steps.wait(60)
            assert ops.explain_call(layer, x).implementation == "batched"  # for all threads
        steps.wait(60)
        future.result()
    assert ops.explain_call(layer, x).implementation == before != "plain"
    with ops.use("plain"), ops.use("batched"):
        assert ops.explain_call(layer, x).implementation == "batched"
    assert ops.explain_call(layer, x).implementation == before


def test_requested_unsupported_implementation_raises():
    layer = MoE(D, E, activation=nn.Tanh)
    with ops.use("cpu"), pytest.raises(ValueError, match=r"'cpu' is requested.* Tanh .* request 'auto'"):
        layer(torch.randn(2, 5, D))
    layer(torch.randn(2, 5, D))
    with pytest.raises(ValueError, match="implementation must be one of 'auto', "), ops.use("fast"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("value", "expected"), [("plain", "plain"), ("", "cpu"), ("quick", "must be one of")])
def test_the_variable(value, expected):
    code = "import torch; from mixture_of_experts import MoE, ops\n"
    code += "print(ops.explain_call(MoE(8, 4), torch.randn(1, 3, 8)))"
    environment = {**os.environ, "MIXTURE_OF_EXPERTS_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert expected in done.stdout + done.stderr


@pytest.mark.parametrize("kind", [Experts, GatedExperts])
def test_hooks_on_the_activation_fire_on_every_path(kind):
    layer, x = MoE(D, E, experts=kind(D, E, H)), torch.randn(2, 5, D)
    seen = []
    layer.experts.act.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]) or out * 0)
    for implementation in ("auto", "grouped", "plain"):
        with ops.use(implementation):
            assert (layer(x)[0] == 0).all(), implementation
    assert seen == [H] * 3
    assert "hooks" in ops.explain_call(layer, x).reasons["cpu"]


class Doubling(RoutedExperts):
    """The least that dropless experts of one's own have to be."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.weight = E, nn.Parameter(torch.randn(E, D, D))

    def compute(self, rows, counts):
        return grouped_matmul(rows, self.weight, counts)


def test_experts_that_write_compute_take_slots_too():
    own, slots = Doubling(), torch.randn(E, 3, D)
    torch.testing.assert_close(own(slots), slots @ own.weight)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("training", [True, False])
def test_ids_of_any_integers(dtype, training):
    w1, w2, x, weight = torch.randn(E, D, H), torch.randn(E, H, OUT), torch.randn(T, D), torch.rand(T, K)
    expert = torch.randint(E + 1, (T, K))
    with torch.no_grad():
        found = [
            moe_ffn(x, ids, weight, w1, w2, activation=F.relu, training=training) for ids in (expert, expert.to(dtype))
        ]
    torch.testing.assert_close(*found)


class TwoArgumentActivation(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.sin()


@pytest.mark.slow
def test_custom_two_argument_activation():
    """A class and a function, eager and compiled."""
    x = torch.randn(2, 5, D, requires_grad=True)
    for activation in (TwoArgumentActivation, lambda gate, up: F.silu(gate) * up.sin()):
        layer = MoE(D, E, gate=TopKGating(D, E, 2), experts=GatedExperts(D, E, H, activation=activation))
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
        with pytest.raises(ValueError, match=r"takes \(gate, up\) as arguments, so it requires GatedExperts"):
            Experts(D, E, activation=activation)


def test_under_vmap_of_something_else():
    """Neither the tokens nor the weights are mapped; and many gradients at once, as `jacobian(vectorize=True)` asks."""
    layer, x = MoE(D, E, gate=TopKGating(D, E, 2)), torch.randn(2, 5, D, requires_grad=True)
    scale = torch.randn(3)
    out, _ = layer(x)
    torch.testing.assert_close(torch.vmap(lambda s: s * layer(x)[0])(scale), scale.view(3, 1, 1, 1) * out)
    grads = torch.randn(4, *out.shape)
    at_once = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)[0]
    for grad, found in zip(grads, at_once, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(out, x, grad, retain_graph=True)[0])


class PassThrough(Experts):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Adapter(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.base_layer = Experts(*sizes)

    def forward(self, x):
        return self.base_layer(x)


class OldExperts(Experts):
    def forward(self, x):
        return super().forward(x)


class OldCountsExperts(Experts):
    def forward(self, x, counts=None):
        assert counts is None
        return super().forward(x)


def run_checkpointed(*sizes):
    return checkpoint_wrapper(Experts(*sizes))


def compile_call(*sizes):
    return torch.compile(Experts(*sizes), backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", [PassThrough, run_checkpointed, compile_call, Adapter, OldExperts, OldCountsExperts])
def test_forward_arguments_are_replaced(kind):
    """An adapter and the old forwards get slots, others tokens; all compute the same."""
    gate, x, shapes, results = TopKGating(D, E, 2), torch.randn(2, 9, D), [], []
    for make in (Experts, kind):
        torch.manual_seed(1)
        layer = MoE(D, gate=gate, experts=make(D, E, H))
        layer.experts.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        results.append(layer(x))
    torch.testing.assert_close(*results)
    assert shapes[0] == (18, D)
    assert len(shapes[1]) == (3 if kind in (Adapter, OldExperts, OldCountsExperts) else 2)


def test_rejects_misplaced_decide_at_class_creation():
    with pytest.raises(TypeError, match="must accept `assignments` as its second argument"):

        class Wrong(Experts):
            def forward(self, x, *, assignments=None):
                return x


def test_hooks_on_experts_see_tokens_everywhere():
    for experts in (Experts(D, E), ExpertList(nn.Linear(D, D) for _ in range(E)), Doubling()):
        layer, seen = MoE(D, E, experts=experts), []
        layer.experts.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append((args[0].shape, out.shape))
        )
        layer(torch.randn(2, 9, D))
        assert seen == [((18, D), (18, D))]


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("kind", ["Experts", "GatedExperts", "list", "slots"])
def test_experts_as_heads(kind, factor):
    """Another output width: of stacks, lists and modules, with a mask and a shared expert of that width."""
    experts = {
        "Experts": lambda: Experts(D, E, H, dim_out=OUT),
        "GatedExperts": lambda: GatedExperts(D, E, H, dim_out=OUT, bias=True),
        "list": lambda: ExpertList([nn.Linear(D, OUT) for _ in range(E)], dim_out=OUT),
        "slots": lambda: Slots(dim_out=OUT),
    }[kind]()
    gate = TopKGating(D, E, 2, capacity_factor_train=factor)
    layer = MoE(D, E, gate=gate, experts=experts, shared_expert=nn.Linear(D, OUT))
    mask = torch.rand(2, 9) < 0.7
    out, aux = layer(torch.randn(2, 9, D), mask=mask)
    assert out.shape == (2, 9, OUT)
    assert (out[~mask] == 0).all()
    (out.sum() + aux).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with pytest.raises(ValueError, match=r"shared_expert must return a tensor of shape \(2, 9, 5\)"):
        MoE(D, E, gate=gate, experts=experts, shared_expert=nn.Linear(D, D))(torch.randn(2, 9, D))


def test_rows_and_counts_go_to_compute():
    with pytest.raises(ValueError, match="to compute rows with num_tokens_per_expert, call `compute`"):
        Experts(D, E)(torch.randn(5, D), torch.tensor([1, 1, 1, 2]))


@pytest.mark.parametrize("kind", ["forward", "compute"])
def test_wrong_output_width_raises(kind):
    """5 of 8 columns are an error that names both, unless dim_out tells of them."""

    experts = type("Narrow", (RoutedExperts,), {"num_experts": E, kind: lambda self, x, assignments: x[:, :5]})()
    layer = MoE(D, E, experts=experts)
    with pytest.raises(ValueError, match=rf"must return a tensor of shape \(12, {D}\).*got \(12, 5\)"):
        layer(torch.randn(2, 6, D))
    experts.dim_out = 5
    assert layer(torch.randn(2, 6, D))[0].shape == (2, 6, 5)
    setattr(type(experts), kind, lambda self, x, assignments: x[1:, :5])
    with pytest.raises(ValueError, match=r"must return .*(12|24).*got \((11|23), 5\)"):
        layer(torch.randn(2, 6, D))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_identity_experts_keep_inputs(compiled):
    class Same(RoutedExperts):
        num_experts = E

        def forward(self, x, assignments):
            return x

    layer, x = MoE(D, E, experts=Same()), torch.randn(2, 6, D)
    if compiled:
        layer = torch.compile(layer, backend="aot_eager")
    before = x.clone()
    with torch.no_grad():
        out, _ = layer(x)
        out += 1
    assert torch.equal(x, before)


class Slots(nn.Module):
    """Experts of one's own, all at once; it keeps the shapes that it was given."""

    def __init__(self, num_experts=E, dim_out=D):
        super().__init__()
        self.weight, self.dim_out = nn.Parameter(torch.randn(num_experts, D, dim_out)), dim_out
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return torch.tanh(x @ self.weight)


@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_dropless_slots_are_as_many_as_the_fullest_expert_needs(tokens, monkeypatch):
    moe, x = MoE(D, gate=TopKGating(D, E), experts=Slots()).double(), torch.randn(2, tokens, D, dtype=torch.float64)
    found = {}
    for readable in (True, False):
        monkeypatch.setattr(experts_module, "is_host_readable", lambda tensor, readable=readable: readable)
        monkeypatch.setattr(experts_module, "MAX_SLOTS_PER_CHOICE", 1e9)
        leaf = x.clone().requires_grad_()
        out, aux_loss = moe(leaf)
        found[readable] = (out, *torch.autograd.grad(out.square().sum() + aux_loss, [leaf, *moe.parameters()]))
    torch.testing.assert_close(found[True], found[False])
    fullest = int(moe.gate(x).queue_length.sum(0).max())
    assert moe.experts.shapes == [(E, fullest, D), (E, 2 * tokens, D)]


def test_unbounded_slots_warn(monkeypatch):
    """Where counts cannot be read, as on a GPU: the warning names what to set, and with a capacity there is none."""
    monkeypatch.setattr(experts_module, "is_host_readable", lambda tensor: False)
    moe, x = MoE(D, gate=TopKGating(D, 32), experts=Slots(32)), torch.randn(1, 1024, D)
    with pytest.warns(UserWarning, match=r"32 x 1024 .*2048 choices.* set capacity_factor_train"):
        moe(x)
    moe.gate.capacity_factor_train = 2.0
    moe(x)
    assert moe.experts.shapes == [(32, 1024, D), (32, 128, D)]
