"""Checks that run in the process of fake CUDA, where a wrong device or a host sync raises an error.

Axes: b sequences, n tokens per sequence, d model dim, e experts, k choices.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mixture_of_experts import (
    ExpertChoiceGating,
    Experts,
    GatedExperts,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    Top2Gating,
    TopKGating,
    ops,
    quantize,
)
from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.gating import top2_by_kernel
from mixture_of_experts.kernels import check_process, launching
from mixture_of_experts.ops import grouped as grouped_way
from mixture_of_experts.ops.network import Call
from mixture_of_experts.quantize import output_width, quantize_experts, rows_by_packed
from mixture_of_experts.stats import track_routing
from support.fake_cuda import set_card
from support.fake_cuda_counts import LAUNCHES, Ledger, count_call

DIM, HIDDEN = 64, 96
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def capacity_factors(capacity: float | None) -> dict[str, float | None]:
    return dict(capacity_factor_train=capacity, capacity_factor_eval=capacity)


def make_grouped_gate(capacity: float | None, outer: tuple[int, ...] = ()) -> TopKGating:
    options = dict(num_groups=4, top_groups=2, expert_bias=True, bias=True, score="sigmoid", scale=2.5)
    return TopKGating(DIM, 8, 3, **options, outer_expert_dims=outer, **capacity_factors(capacity))


ROUTERS: dict[str, Callable[[float | None], nn.Module]] = {
    "top 2": lambda c: Top2Gating(DIM, 8, **capacity_factors(c)),
    "top 2, by score": lambda c: Top2Gating(DIM, 8, priority="score", **capacity_factors(c)),
    "switch": lambda c: TopKGating(DIM, 8, 1, jitter=0.01, **capacity_factors(c)),
    "top 3": lambda c: TopKGating(DIM, 8, 3, balance_over="batch", **capacity_factors(c)),
    "top 3, by token": lambda c: TopKGating(DIM, 8, 3, priority="token", **capacity_factors(c)),
    "top 3 of groups": make_grouped_gate,
    "noisy": lambda c: NoisyTopKGating(DIM, 8, 2, **capacity_factors(c)),
    "expert choice": lambda c: ExpertChoiceGating(DIM, 8),
}
EXPERTS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda num: Experts(DIM, num, HIDDEN),
    "gated": lambda num: GatedExperts(DIM, num, HIDDEN),
    "gated with biases": lambda num: GatedExperts(DIM, num, HIDDEN, nn.GELU, bias=True),
}


@contextmanager
def fake_gpu(dtype: torch.dtype, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Provide a GPU, and create modules in `dtype`, because fake parameters cannot be cast afterwards."""
    before = torch.get_default_dtype()
    with set_card(capability), FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        # what `torch.autocast("cuda", torch.bfloat16)` asks, which a recomputation enters
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.random, "fork_rng", lambda devices, **_: nullcontext())  # there is no generator of numbers
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def run_on_gpu(dtype: torch.dtype, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Do the same, and create tensors on the GPU by default."""
    with fake_gpu(dtype, capability), torch.device("cuda"):
        yield


@contextmanager
def declare_families() -> Iterator[None]:
    """Declare the kernels as the default on the cards where we expect them to be fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "DEFAULT_FAMILIES", ((8, 0), (8, 6), (12, 0)))  # their grouped product is a loop
        patch.setattr(launching, "DECODING_FAMILIES", ((9, 0), (10, 0)))
        patch.setattr(launching, "ROUTER_FAMILIES", ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)))
        yield


@contextmanager
def enable_autocast() -> Iterator[None]:
    """Do the same as `torch.autocast("cuda", torch.bfloat16)`, which would require a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def make_moe(router: str, experts: str, capacity: float | None) -> MoE:
    return MoE(DIM, 8, gate=ROUTERS[router](capacity), experts=EXPERTS[experts](8))


def make_hierarchical_moe(experts: str, capacity: float | None) -> HeirarchicalMoE:
    inner = TopKGating(DIM, 4, 2, outer_expert_dims=(2,), **capacity_factors(capacity))
    outer = Top2Gating(DIM, 2, **capacity_factors(capacity))
    return HeirarchicalMoE(DIM, (2, 4), gate_outer=outer, gate_inner=inner, experts=EXPERTS[experts]((2, 4)))


def make_layer(router: str, experts: str, capacity: float | None) -> nn.Module:
    return make_hierarchical_moe(experts, capacity) if router == "two levels" else make_moe(router, experts, capacity)


def check_layer(
    router: str,
    experts: str,
    capacity: float | None,
    dtype: str = "bf16",
    *,
    masked: bool = False,
    autocast: bool = False,
    capability: tuple[int, int] = (9, 0),
    declared: bool = False,
) -> None:
    """Forward and backward in both modes compute on the GPU, in the right dtype, without a host sync."""
    with run_on_gpu(DTYPES[dtype], capability), declare_families() if declared else nullcontext():
        layer = make_layer(router, experts, capacity)
        for training in (True, False):
            layer.train(training)
            check_call(layer, DTYPES[dtype], masked, autocast)
        check_decoding(layer, DTYPES[dtype], masked, autocast)


def call_layer(layer: nn.Module, x: Tensor, masked: bool, autocast: bool) -> tuple[Tensor, Tensor]:
    """Return the results of a layer, which must be on the device of its tokens, whatever the default device is."""
    mask = torch.empty(x.shape[:-1], dtype=torch.bool) if masked else None
    with torch.device("cpu"), enable_autocast() if autocast else nullcontext():
        out, aux_loss = layer(x, mask=mask)
    assert (out.device.type, out.dtype, out.shape) == ("cuda", x.dtype, x.shape)
    assert (aux_loss.device.type, aux_loss.shape) == ("cuda", ())
    return out, aux_loss


def check_call(layer: nn.Module, dtype: torch.dtype, masked: bool, autocast: bool) -> None:
    x = torch.empty(2, 40, DIM, dtype=dtype, requires_grad=True)
    out, aux_loss = call_layer(layer, x, masked, autocast)
    with torch.device("cpu"):
        (out.float().square().mean() + aux_loss).backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        grad = tensor.grad
        assert grad is not None, name
        assert (grad.device, grad.dtype, grad.shape) == (tensor.device, tensor.dtype, tensor.shape), name
        tensor.grad = None


@torch.no_grad()
def check_decoding(layer: nn.Module, dtype: torch.dtype, masked: bool, autocast: bool) -> None:
    """Compute a few tokens in eval mode, of many sequences and of one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* received one token per sequence in eval")
        for shape in ((2, 1), (1, 20)):
            call_layer(layer, torch.empty(*shape, DIM, dtype=dtype), masked, autocast)


def check_statistics() -> None:
    """Recording statistics of a gate does not wait for the GPU. Reading them would raise an error here."""
    with run_on_gpu(torch.bfloat16):
        layer = make_moe("top 3", "gated", 1.0)
        with track_routing(layer) as stats:
            for _ in range(2):
                check_call(layer, torch.bfloat16, masked=True, autocast=False)
                stats.step()


def check_sync_is_seen() -> None:
    """Reading values, shapes that depend on values, and mixed devices raise errors."""
    with run_on_gpu(torch.float32):
        x = torch.empty(4)
        wrong = {
            "DataDependentOutputException": lambda: x.sum().item(),
            "DynamicOutputShapeException": lambda: x.nonzero(),
            "FakeTensorDeviceMismatchError": lambda: x + torch.empty(4, device="cpu"),
        }
        for error, call in wrong.items():
            with pytest.raises(Exception) as raised:  # noqa: PT011  (torch keeps these classes in private places)
                call()
            assert raised.typename == error


def check_implementation(dtype: str, capability: tuple[int, int], implementation: str, reasons: dict[str, str]) -> None:
    """On a card whose family is declared, "auto" selects this implementation, with these reasons against others."""
    with run_on_gpu(DTYPES[dtype], capability), declare_families():
        described = ops.explain_call(make_moe("top 3", "gated", None), torch.empty(1, 8, DIM, dtype=DTYPES[dtype]))
    assert described.implementation == implementation
    for name, reason in reasons.items():
        assert reason in described.reasons[name], described.reasons


def check_amd_gpu(arch: str, asked: bool, implementation: str) -> None:
    """Check which implementation an AMD GPU uses, and the reasons against faster ones."""
    with run_on_gpu(torch.bfloat16), set_card((9, 4), arch + ":sramecc+:xnack-"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        patch.setattr(grouped_way, "IS_AMD_GROUPED_GEMM_ENABLED", asked)
        layer = make_moe("top 3", "gated", None)
        described = ops.explain_call(layer, torch.empty(1, 8, DIM))
        check_call(layer, torch.bfloat16, masked=True, autocast=False)
    assert described.implementation == implementation
    assert "NVIDIA" in described.reasons["triton"]
    assert implementation == "grouped" or f"not on {arch}" in described.reasons["grouped"]


def check_other_device(device: str) -> None:
    """Intel's and Apple's GPUs use `batched`. Only forwards are checked, because a process supports gradients on one
    kind of device."""
    with fake_gpu(torch.bfloat16), torch.device(device):
        for router in (*ROUTERS, "two levels"):
            layer, x = make_layer(router, "gated", 1.0), torch.empty(2, 40, DIM)
            described = ops.explain_call(layer, x)
            assert described.implementation == "batched"
            assert "NVIDIA" in described.reasons["triton"]
            assert device in described.reasons["grouped"]
            for training in (True, False):
                with torch.device("cpu"):
                    out, aux_loss = layer.train(training)(x)
                assert out.device.type == aux_loss.device.type == device


def check_family(capability: tuple[int, int], served: bool) -> None:
    """Check that the kernels of gates and those of experts support the same cards."""
    with run_on_gpu(torch.bfloat16, capability):
        with declare_families():
            assert launching.can_launch_kernels(torch.device("cuda")) == served
        with ops.use("triton"), nullcontext() if served else pytest.raises(ValueError, match="kernels do not support"):
            make_moe("top 3", "gated", None)(torch.empty(1, 8, DIM))


def check_capturing() -> None:
    """The device of the call, not the current one, determines whether a graph is being captured."""
    current = [0]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", on)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
        patch.setattr(check_process, "run_in_process", lambda *_: check_process.Verdict(None))
        patch.setenv("MIXTURE_OF_EXPERTS_CACHE", "")
        check = launching.SelfCheck("some kernels")
        with pytest.warns(UserWarning, match="not used in this CUDA graph, because they have not been checked"):
            assert check.failure_reason(torch.device("cuda", 1), "kind", lambda: None) is not None
        current[0] = 1
        assert check.failure_reason(torch.device("cuda", 0), "kind", lambda: None) is None
        assert check.verdicts == {(torch.device("cuda", 0), "kind"): None}


def check_entries(capability: tuple[int, int]) -> int:
    """The self-check uses the entry of the schedule and the number of choices of the launched call. Return the number
    of entries that calls of many shapes use."""
    from mixture_of_experts.ops import triton
    from mixture_of_experts.ops.triton import operators, schedule, self_check

    judged, launched = [], []

    def judge(mean_rows: int, *given: Any) -> None:
        kind = self_check.CallKind(*given)
        entries = schedule.find_entries(kind.device, kind.dtype)
        judged.append((schedule.find_schedule(entries, mean_rows), kind.num_choices))

    def find(entries: tuple[schedule.Schedule, ...], mean_rows: int) -> schedule.Schedule:
        launched.append(schedule.find_schedule(entries, mean_rows))
        return launched[-1]

    seen = set()
    with run_on_gpu(torch.bfloat16, capability), ops.use("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "is_fake_tensor", lambda tensor: False)
        patch.setattr(self_check, "run_self_check", judge)
        patch.setattr(operators, "find_schedule", find)
        layers = {
            3: MoE(DIM, 8, gate=TopKGating(DIM, 8, 3), experts=Experts(DIM, 8, HIDDEN)),
            8: MoE(DIM, 64, gate=TopKGating(DIM, 64, 8), experts=Experts(DIM, 64, HIDDEN)),
            2: MoE(DIM, 16),
            4: HeirarchicalMoE(DIM, (4, 4)),
        }
        for choices, layer in layers.items():
            for shape in ((1, 1), (1, 128), (1, 2048), (4, 512)):
                x = torch.empty(*shape, DIM, requires_grad=True)
                judged.clear()
                launched.clear()
                with Ledger() as ledger, ledger.count_kernels():
                    layer(x)[0].sum().backward()
                ((entry, described),) = judged
                assert launched == [entry] * 2, (choices, shape, launched, entry)
                assert described == choices
                seen.add(entry)
    return len(seen)


@contextmanager
def collect_entries() -> Iterator[set[str]]:
    """Yield the programs of the launched kernels."""
    from support.triton_machine_code import build_program, describe_argument

    programs = set()

    def note(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        described = {name: describe_argument(value) for name, value in arguments.items()}
        programs.add(f"{kernel.fn.__name__} {build_program(kernel, described)}")

    with Ledger(), pytest.MonkeyPatch.context() as patch:
        for where in LAUNCHES:
            patch.setattr(where, note)
        yield programs


def check_programs_of_operands() -> None:
    """Calls of one kind launch the programs that the self-check has checked, for any alignment of operands, dtype of
    row weights, and number of experts and blocks."""
    from mixture_of_experts.ops.triton import self_check
    from mixture_of_experts.ops.triton.network_spec import NetworkSpec

    def programs(call: Call) -> set[str]:
        with collect_entries() as found:
            self_check.compute_by_kernels(call, kind)
            self_check.are_permutations_equal(call.assignments)
        return found

    def moved(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    cpu, both = torch.device("cpu"), (False, False)
    kind = self_check.CallKind(cpu, torch.bfloat16, NetworkSpec("gated", "silu"), both, both, (0, 0, 0), 2, False)
    judged = self_check.make_call(kind, 512, 3)
    wanted = programs(judged)
    assert len(wanted) > 10
    narrow = assign_experts(torch.zeros(256, 2).long(), torch.ones(256, 2, dtype=torch.bfloat16), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "MIN_DIM", 1024)  # 16 blocks of hidden_grads
        large = self_check.make_call(kind, 16 * 512, 16)
    apart = judged.network.map(lambda w: torch.cat([w, w[..., :3]], dim=-1)[..., : w.shape[-1]])
    for name, call in {
        "not aligned": judged._replace(x=moved(judged.x), network=judged.network.map(moved)),
        "rows not aligned": judged._replace(network=apart),
        "row weights in bfloat16": judged._replace(assignments=narrow),
        "sizes that are multiples of 16": large,
    }.items():
        assert programs(call) == wanted, (name, programs(call) ^ wanted)


def check_prepared(training: bool) -> None:
    """After `ops.prepare`, calls with the prepared shapes launch no new programs."""
    sequences, tokens = ([8], [16, 1024]) if training else ([1, 64], [1])
    with run_on_gpu(torch.bfloat16, (8, 0)), declare_families(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* received one token per sequence in eval")
        for layer in (MoE(512, 16), MoE(64, 8, gate=TopKGating(64, 8, 3), experts=GatedExperts(64, 8, 96))):
            layer.train(training)
            with collect_entries() as prepared:
                implementations = ops.prepare(layer, tokens, sequences=sequences)
            assert {described.implementation for described in implementations.values()} == {"triton"}
            for shape in implementations:
                x = torch.empty(*shape, layer.dim, requires_grad=training)
                with collect_entries() as found, torch.set_grad_enabled(training):
                    out, aux_loss = layer(x)
                    if training:
                        (out.float().square().mean() + aux_loss).backward()
                assert found
                assert found <= prepared, (shape, found - prepared)


def check_defaults(capability: tuple[int, int], declared: bool) -> Counter[str]:
    """Count the launches of kernels in calls that request nothing, in training and in decoding."""
    context = declare_families() if declared else nullcontext()
    with run_on_gpu(torch.bfloat16, capability), context, Ledger() as ledger, ledger.count_kernels():
        for layer in (MoE(512, 16), make_moe("top 3", "gated", None), make_moe("top 3", "gated", 1.0)):
            for training, tokens in ((True, 256), (False, 1)):
                layer.train(training)
                x = torch.empty(4, tokens, layer.dim, requires_grad=training)
                with torch.set_grad_enabled(training), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".* received one token per sequence in eval")
                    layer(x)
    return Counter({name: count for name, count in ledger.launches.items() if "::" not in name and "." not in name})


def count_waits_of_quantized_experts(router: str, experts: str, bits: Literal[8, 4]) -> tuple[int, int]:
    """Count the products of packed weights in a forward and in its backward, each of which waits for the host once.

    Nothing else waits, because fake tensors raise an error.
    """
    dims = (2, 4) if router == "two levels" else 8
    stored = nn.ModuleDict({"experts": EXPERTS[experts](dims).requires_grad_(False)})
    packed: Any = quantize_experts(stored, bits, group=32)["experts"]
    waits: list[str] = []

    def multiply(x: Tensor, packed: Tensor, groups: Tensor | None, scale: Tensor, counts: Tensor, back: bool) -> Tensor:
        with pytest.raises(DataDependentOutputException):
            rows_by_packed._init_fn(x, packed, groups, scale, counts, back)
        waits.append("backward" if back else "forward")
        return x.new_empty(x.shape[0], output_width(packed, scale, back))

    with run_on_gpu(torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "rows_by_packed", multiply)
        layer = make_layer(router, experts, 1.25 if router == "top 3" else None)
        layer.experts = packed
        for name, buffer in packed.named_buffers():
            packed._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for training in (False, True):
            waits.clear()
            out, aux_loss = layer.train(training)(torch.empty(2, 40, DIM, requires_grad=True))
        (out.float().square().mean() + aux_loss).backward()
    return waits.count("forward"), waits.count("backward")


@torch.no_grad()
def check_decoding_implementation(dtype: str, capability: tuple[int, int], tokens: int, implementation: str) -> None:
    with run_on_gpu(DTYPES[dtype], capability), declare_families():
        layer = make_moe("top 3", "gated", None).eval()
        assert ops.explain_call(layer, torch.empty(tokens, 1, DIM)).implementation == implementation
        assert ops.explain_call(layer.train(), torch.empty(tokens, 1, DIM)).implementation != "triton"


def check_graph_of_decoding(capability: tuple[int, int]) -> None:
    """A compiled layer decodes in one graph, in which the experts are a single operator."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with fake_gpu(torch.bfloat16, capability), declare_families(), torch.no_grad():
        with torch.device("cuda"):
            layer, x = make_moe("top 3", "gated", None).eval(), torch.empty(4, 1, DIM)
        out, _ = compile_fullgraph(layer, backend)(x)
        assert out.shape == x.shape
    (graph,) = graphs
    assert sum("triton_ffn" in str(node.target) for node in graph.graph.nodes) == 1


def check_many_experts(number: int, implementation: str) -> None:
    with run_on_gpu(torch.bfloat16):
        layer = MoE(DIM, number, gate=TopKGating(DIM, number, 2), experts=Experts(DIM, number, HIDDEN))
        assert ops.explain_call(layer, torch.empty(1, 8, DIM)).implementation == implementation
        check_call(layer, torch.bfloat16, masked=False, autocast=False)


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Register kernels that torch has on CUDA; without them, tracing would decompose their operators."""

    def never(*_):
        raise AssertionError("there is no kernel: tensors are fake")

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("silu_backward", "silu_backward.grad_input"):
            library.impl(name, never, "CUDA")
        yield


def compile_fullgraph(model: nn.Module, backend: Any = "aot_eager") -> Any:
    """Compile a model without graph breaks, up to what Inductor would receive, and run its operators."""
    # torch's own, of every autograd function that it traces
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def check_compiled(implementation: str, router: str, capacity: float | None, dtype: str) -> None:
    """A layer is one graph, forward and backward; "many experts" recompute their scores."""
    with ops.use(implementation), fake_gpu(DTYPES[dtype], CARD[implementation]), kernels_of_cuda():
        with torch.device("cuda"):
            x = torch.empty(2, 40, DIM, requires_grad=True)
            if router == "many experts":
                x = torch.empty(1, 64, 256, requires_grad=True)
                layer = MoE(256, gate=TopKGating(256, 512, 4), experts=GatedExperts(256, 512, 32))
            else:
                layer = make_layer(router, "gated", capacity)
        out, aux_loss = compile_fullgraph(layer)(x)
        (out.float().square().mean() + aux_loss).backward()
        assert all(tensor.grad is not None for tensor in (x, *layer.parameters()))


def check_forced(implementation: str, experts: str, capacity: float | None, dtype: str) -> None:
    """A requested implementation computes all routers; kernels support token choice."""
    with ops.use(implementation):
        for router in sorted({*ROUTERS, "two levels"} - ({"expert choice"} if implementation == "triton" else set())):
            check_layer(router, experts, capacity, dtype, masked=True)


# ---- what a call costs ----

#: gated layers of bfloat16, dropless: tokens, d, h, e, k
SIZES = {
    "small": (4096, 1024, 512, 64, 8),
    "large": (32768, 2048, 768, 128, 8),
    # of large, experts cut 8 times finer at equal FLOPs; torch's grouped product takes no 1,024
    "fine": (32768, 2048, 96, 1024, 64),
    "fine, grouped": (32768, 2048, 96, 1016, 64),
}
CARD = {"grouped": (9, 0), "triton": (9, 0), "batched": (8, 0), "plain": (8, 0)}


def use_documented(implementation: str) -> AbstractContextManager[None]:
    """Use an implementation as in the documentation's table of costs: kernels for all parts, or for none."""
    return ops.use(implementation, router_kernels=implementation == "triton")


def measure_costs(implementation: str, size: str = "small") -> dict[str, float]:
    """Return launches, gigabytes moved by forward and backward, and memory kept, divided by that of x and
    pre-activations."""
    tokens, dim, hidden, experts, choices = SIZES.get(f"{size}, {implementation}", SIZES[size])
    with run_on_gpu(torch.bfloat16, CARD[implementation]), use_documented(implementation):
        layer = MoE(dim, gate=TopKGating(dim, experts, choices), experts=GatedExperts(dim, experts, hidden))
        x = torch.empty(1, tokens, dim, requires_grad=True)
        counts = count_call(lambda: layer(x), [x, *layer.parameters()])
    floor = 2 * tokens * (dim + choices * 2 * hidden)
    return {
        "forward": counts.launches,
        "forward and backward": counts.launches_both,
        "kept": counts.kept / floor,
        "moved": counts.moved_both / 1e9,
    }


def measure_costs_with_capacity(implementation: str) -> dict[str, float]:
    """Return the costs of layers with their default capacity in training: launches of two levels, and memory kept by
    one level, divided by that of x and the pre-activations of all slots."""
    with run_on_gpu(torch.bfloat16, CARD[implementation]), use_documented(implementation):
        x = torch.empty(4, 1024, 512, requires_grad=True)
        layer, grid = MoE(512, 16), HeirarchicalMoE(512, (4, 4))
        one, two = (count_call(lambda layer=layer: layer(x), [x, *layer.parameters()]) for layer in (layer, grid))
        slots = layer.gate(x).queue_length.numel() * int(1.25 * 1024 / 16)
    return {
        "forward": two.launches,
        "forward and backward": two.launches_both,
        "kept": one.kept / (2 * (4 * 1024 * 512 + slots * 2048)),
    }


@torch.no_grad()
def count_decoding_launches(implementation: str, tokens: int = 64, router_kernels: bool | None = None) -> int:
    """Count the launches of a layer with 128 experts and 8 choices in eval mode, for one token per sequence."""
    card = CARD.get(implementation, (9, 0))
    with run_on_gpu(torch.bfloat16, card), ops.use(implementation, router_kernels=router_kernels):
        layer = MoE(2048, gate=TopKGating(2048, 128, 8), experts=GatedExperts(2048, 128, 768)).eval()
        x = torch.empty(tokens, 1, 2048)
        with Ledger() as ledger, ledger.count_kernels():
            layer(x)
        return ledger.launches.total()


def count_lora_launches(implementation: str) -> tuple[str, int, int]:
    """For a layer with low-rank factors on three weights in training, return the implementation, and how many more
    launches than the frozen layer the forward and the backward have."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers about each other
    from mixture_of_experts.huggingface.lora.wrapper import AdaptedFFN

    with run_on_gpu(torch.bfloat16, CARD[implementation]), ops.use(implementation):
        experts, rank = GatedExperts(512, 16, 1024), 16
        parts = {}
        for name, weight in zip(("w_in.0", "w_in.1", "w_out"), experts.requires_grad_(False).parameters(), strict=True):
            e, p, q = weight.shape
            down, up = torch.empty(e, p, rank, requires_grad=True), torch.empty(e, rank, q, requires_grad=True)
            parts[name] = (down, up)
        layer, forward = MoE(512, gate=TopKGating(512, 16, 2), experts=experts), experts.forward
        x = torch.empty(1, 4096, 512, requires_grad=True)
        frozen = count_call(lambda: layer(x), [x])
        experts.forward = lambda x, assignments: forward(
            x, assignments, ffn=AdaptedFFN(parts)
        )  # as PEFT's wrapper calls it
        counts = count_call(lambda: layer(x), [x, *(factor for part in parts.values() for factor in part[:2])])
        forward_more = counts.launches - frozen.launches
        return (
            ops.explain_call(layer, x).implementation,
            forward_more,
            counts.launches_both - frozen.launches_both - forward_more,
        )


def count_two_choice_launches(outer: int) -> tuple[int, int]:
    """Count the launches of the decision of `Top2Gating` in training, including product and losses: forward, and
    backward."""
    with run_on_gpu(torch.bfloat16), ops.use("triton"):
        gate, shape = Top2Gating(512, 16, outer_expert_dims=outer or ()), (outer, 4, 1024) if outer else (4, 1024)
        x = torch.empty(*shape, 512, requires_grad=True)
        tokens = gate.read(x, importance=torch.empty(shape) if outer else None)

        def decide() -> list[Tensor]:
            assert top2_by_kernel.unsupported_reason(gate, tokens) is None
            made = top2_by_kernel.choose_by_kernel(gate, tokens)
            return [made.weight, *made.losses.values()]

        counts = count_call(decide, [])
        return counts.launches, counts.launches_both - counts.launches


def measure_kept_scores(router: str, autocast: bool) -> float:
    """Return the memory that a gate with many experts keeps in addition to its tokens, in units of one float32 per
    token and expert."""
    tokens, dim, experts = 1024, 256, 512
    gates: dict[str, Callable[[], nn.Module]] = {
        "top 2": lambda: Top2Gating(dim, experts),
        "softmax": lambda: TopKGating(dim, experts),
        "sigmoid, groups": lambda: TopKGating(
            dim, experts, score="sigmoid", bias=True, expert_bias=True, num_groups=8, top_groups=4
        ),
        "expert choice": lambda: ExpertChoiceGating(dim, experts),
    }
    with run_on_gpu(torch.float32 if autocast else torch.bfloat16), enable_autocast() if autocast else nullcontext():
        gate, x = gates[router](), torch.empty(1, tokens, dim, requires_grad=True)

        def decide() -> list[Tensor]:
            routing = gate(x)
            return [routing.weight, routing.z_loss]

        return count_call(decide, [x, *gate.parameters(), *gate.buffers()]).kept / (4 * tokens * experts)


def check_training(model: nn.Module, windows: Tensor, loss_of: Callable[..., Tensor]) -> None:
    """Under autocast, all parameters of a model receive gradients of a loss."""
    with enable_autocast(), kernels_of_cuda():
        returned = model(windows)
    with kernels_of_cuda():
        loss_of(*returned).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def check_billion_example(code: str) -> int:
    """Run the README's layer of a billion parameters at its real size, and return its number of parameters."""
    code = code.replace(".cuda()", "")  # it is made there: fake parameters cannot be moved
    names: dict[str, Any] = {}
    with run_on_gpu(torch.float32):
        exec(code, names)
        assert names["out"].shape == (4, 1024, 512)
        assert names["out"].device.type == "cuda"
        names["out"].sum().backward()
        return sum(parameter.numel() for parameter in names["moe"].parameters())


def check_example(compiled: bool) -> None:
    """Run the model of experiments/train_lm.py as `--device cuda --dtype bfloat16` trains it, except for printing.

    With `--compile`, it is one graph, forward and backward, up to what Inductor would receive.
    """
    from experiments.language_model.model import ByteLM
    from experiments.language_model.routers import ROUTERS
    from experiments.language_model.settings import Settings
    from experiments.language_model.trainee import make_optimizer

    settings = Settings(device="cuda", dtype="bfloat16")
    router = ROUTERS[settings.router]
    with fake_gpu(torch.float32):
        shape = {"dim": settings.dim, "layers": settings.layers, "heads": settings.heads, "context": settings.context}
        with torch.device("cuda"):
            model = ByteLM(lambda: router.build(settings.dim, settings.num_experts, settings.width), **shape)
            windows = torch.zeros(settings.batch_size, settings.context + 1, dtype=torch.int64)

        def loss_of(logits: Tensor, aux_loss: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()) + aux_loss

        check_training(compile_fullgraph(model) if compiled else model, windows[:, :-1], loss_of)
        make_optimizer(model, settings.learning_rate, settings.expert_rate).step()


def check_example_for_gpus() -> None:
    """The mixture of examples/train_gpu.py is one graph on a GPU, forward and backward."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    import train_gpu

    with fake_gpu(torch.float32, (8, 0)):
        with torch.device("cuda"):
            model = train_gpu.LanguageModel(train_gpu.mixture, 64, 2, 32)
            windows = torch.zeros(2, 33, dtype=torch.int64)
        check_training(compile_fullgraph(model), windows, torch.add)
