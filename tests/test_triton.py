"""The Triton kernels by Triton's interpreter, against the obvious network: outputs and every gradient.

`pytest tests/test_triton.py -m ""` runs all of them, for some minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from support import triton_interpreter
from support.spawned_checks import Checks, spawn_checks
from torch import Tensor, nn

from mixture_of_experts import ops
from mixture_of_experts.dispatch.assignments import assign_experts
from mixture_of_experts.kernels import launching
from mixture_of_experts.ops.network import Call, Network
from mixture_of_experts.ops.triton import _has_large_tensor, schedule, self_check, unsupported_reason

pytestmark = pytest.mark.skipif(
    triton_interpreter.unsupported_reason() is not None, reason=str(triton_interpreter.unsupported_reason())
)

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
OTHER_LAYERS = ("top 2, capacity", "two levels")


@pytest.fixture(scope="module")
def run_check() -> Iterator[Checks]:
    with spawn_checks(triton_interpreter.load_interpreter, "triton_checks") as check:
        yield check


@pytest.mark.parametrize(
    ("layout", "activation", "options"),
    [
        ("plain", "gelu", dict(bias=True)),
        pytest.param("gated", "silu", dict(), marks=slow),
        pytest.param("interleaved", "clamped", dict(bias=True), marks=slow),
        pytest.param("concatenated", "gelu_tanh", dict(transposed=True), marks=slow),
        pytest.param("plain", "relu_squared", dict(routing="capacity"), marks=exhaustive),
        pytest.param("gated", "relu", dict(routing="two levels", bias=True), marks=slow),
        pytest.param("plain", "identity", dict(routing="two levels"), marks=exhaustive),
        pytest.param("gated", "silu", dict(routing="masked", dtype=torch.bfloat16), marks=slow),
        pytest.param("plain", "silu", dict(dtype=torch.float16, sizes=(20, 16, 32, 16, 4, 3)), marks=slow),
    ],
)
def test_outputs_and_gradients(run_check: Checks, layout: str, activation: str, options: dict):
    run_check("check_values", layout, activation, **options)


@slow
@pytest.mark.parametrize("experts", [1, 17, pytest.param(257, marks=exhaustive)])
def test_numbers_of_experts(run_check: Checks, experts: int):
    run_check("check_values", "plain", "gelu", sizes=(19, 8, 8, 8, experts, min(2, experts)))


@exhaustive
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("layout", ["plain", "gated"])
def test_blocks_of_the_schedule(run_check: Checks, layout: str, kind: str):
    for t in (24, 200, 420):
        run_check("check_values", layout, "silu", sizes=(t, 72, 136, 40, 3, 2), bias=True, kind=kind)


@exhaustive
@pytest.mark.parametrize("routing", ["top k", "capacity", "masked", "two levels"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu", "relu_squared", "identity"])
@pytest.mark.parametrize("layout", ["plain", "gated", "concatenated", "interleaved"])
def test_every_activation_and_routing(run_check: Checks, layout: str, activation: str, routing: str):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run_check("check_values", layout, activation, routing=routing, dtype=dtype, bias=True)


@slow
@pytest.mark.parametrize("height", [16, 64])
@pytest.mark.parametrize("experts", [1, 5, 64, 257])
def test_tiles(run_check: Checks, experts: int, height: int):
    run_check("check_tiles", experts, height)


@slow
@pytest.mark.parametrize(
    ("layout", "activation", "dtype", "choices"),
    [
        ("gated", "silu", torch.bfloat16, 2),
        pytest.param("interleaved", "clamped_swiglu", torch.float16, 3, marks=exhaustive),
        pytest.param("concatenated", "gelu_tanh", torch.float32, 1, marks=exhaustive),
        pytest.param("plain", "relu_squared", torch.bfloat16, 2, marks=exhaustive),
    ],
)
def test_wrong_kernels_are_detected(run_check: Checks, layout: str, activation: str, dtype: torch.dtype, choices: int):
    run_check("check_self_check", layout, activation, dtype, choices)


@slow
@pytest.mark.parametrize("layout", ["plain", pytest.param("gated", marks=exhaustive)])
def test_faults_beyond_int32_are_detected(run_check: Checks, layout: str):
    run_check("check_far_self_check", layout)


class QuickGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ShiftedSwiGLU(ops.ClampedSwiGLU):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().forward(gate + 1, up)


@pytest.mark.parametrize(
    ("reason", "d", "h", "activation", "dtype"),
    [
        ("multiples of 16", 16, 24, nn.SiLU(), torch.float32),
        ("got torch.float64", 16, 32, nn.SiLU(), torch.float64),
        ("activation Tanh", 16, 32, nn.Tanh(), torch.float32),
        ("activation QuickGELU", 16, 32, QuickGELU(), torch.float32),
        ("activation ShiftedSwiGLU", 16, 32, ShiftedSwiGLU(), torch.float32),
        ("too large", 16, (1 << 24) + 16, nn.SiLU(), torch.float32),
        ("too large", (1 << 24) + 16, 16, nn.SiLU(), torch.float32),
        ("too large", 1 << 16, 1 << 15, nn.SiLU(), torch.float32),
    ],
)
def test_rejects_bad_arguments(monkeypatch, reason: str, d: int, h: int, activation: nn.Module, dtype: torch.dtype):
    """By name; of tensors only shapes and strides are read."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    one, nothing = torch.empty(1, dtype=dtype), assign_experts(torch.zeros(0, 2).long(), torch.empty(0, 2), 2)
    w_in = [one.expand(2, d, h)] * (1 + isinstance(activation, ops.ClampedSwiGLU))
    network = Network(tuple(w_in), one.expand(2, h, 16), activation, (None,) * len(w_in))
    with ops.use("triton"):
        assert reason in str(unsupported_reason(Call(one.expand(4, d), nothing, network, False)))


@pytest.mark.parametrize(
    ("experts", "stride", "tokens", "far"),
    [
        (255, 1 << 23, 8, False),
        (257, 1 << 23, 8, True),  # 2^31 elements, and one expert more
        (3, 1 << 30, 8, True),  # only strides are large
        (2, 1 << 23, 1 << 18, False),  # 2^31 elements in the rows of two choices
        (2, 1 << 23, (1 << 18) + 1, True),
    ],
)
def test_far_calls_need_a_check_of_their_own(monkeypatch, experts: int, stride: int, tokens: int, far: bool):
    """Calls with a tensor of more than 2^31 elements are checked twice."""
    nothing = torch.empty(1, device="meta")
    weight = nothing.as_strided((experts, 4096, 2048), (stride, 2048, 1))
    expert = torch.empty(tokens, 2, dtype=torch.int64, device="meta")
    assignments = assign_experts(expert, torch.empty(tokens, 2, device="meta"), experts)
    call = Call(nothing.expand(tokens, 4096), assignments, Network((weight,), weight.mT, nn.SiLU()), False)
    assert _has_large_tensor(call) == far
    checked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(self_check, "find_entries", lambda *_: schedule.INTERPRETER_SCHEDULES)
    monkeypatch.setattr(self_check, "check_entries", lambda kind, entries, wanted: checked.append(kind.far))
    self_check.run_self_check(1, torch.device("cuda"), torch.bfloat16, ("plain", "silu"), *3 * [()], 2, False, far)
    assert checked == [False, True][: 1 + far]


def test_supported_gpus(monkeypatch):
    """And by which entries of the schedule: those of their family, of float32 as torch's switch says."""
    card, found = torch.device("cuda"), {}
    for number in ((7, 5), (8, 0), (8, 9), (11, 0), (13, 0)):
        for module in (launching, schedule):
            monkeypatch.setattr(module, "get_device_capability", lambda device, number=number: number)
        if (reason := launching.device_unsupported_reason(card)) is None:
            found[number] = schedule.find_entries(card, torch.bfloat16)
        else:
            assert "compute capability {}.{}".format(*number) in reason
    assert found == {
        (8, 0): schedule.HALF_SCHEDULES[8, 0],
        (8, 9): schedule.HALF_SCHEDULES[8, 6],
        (11, 0): schedule.HALF_SCHEDULES[10, 0],
    }
    monkeypatch.setattr(schedule, "get_device_capability", lambda device: (8, 0))
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            assert schedule.find_entries(card, torch.float32) == schedule.FLOAT32_SCHEDULES[precision]
    finally:
        matmul.fp32_precision = before


def test_no_more_tiles_than_there_can_be():
    """The bound is reached, and never passed: all ways to give some rows to some experts."""
    from mixture_of_experts.ops.triton import operators  # it imports triton

    for experts in (1, 2, 3):
        for rows in range(1, 9):
            shares = [s for s in itertools.product(range(rows + 1), repeat=experts) if sum(s) <= rows]
            for height in (1, 2, 3, 4):
                most = max(sum(-(-count // height) for count in share) for share in shares)
                assert operators.count_max_tiles(rows, experts, height) == most


def test_more_rows_than_int32_counts():
    """More rows than int32 counts are refused."""
    from mixture_of_experts.ops.triton import operators  # it imports triton

    for rows in (1 << 31, operators.MAX_KERNEL_ROWS + 1):
        with pytest.raises(ValueError, match=f"at most {operators.MAX_KERNEL_ROWS} rows, got {rows}"):
            operators.launch_find_tiles(torch.tensor([rows]), rows, 128)


def test_heights_of_tiles():
    """Rows that whole tiles have, as they are reckoned and of loads that are drawn; and which height they lead to."""
    torch.manual_seed(0)
    for mean in (128, 256, 1024):
        counts = torch.multinomial(torch.ones(128), 128 * mean, replacement=True).bincount(minlength=128)
        for height in (64, 128):
            drawn = float((-(-counts // height) * height).sum()) / (128 * mean)
            assert abs(schedule.estimate_computed_rows(mean, height) / mean - drawn) < 0.06
    found = {
        card: [schedule.find_schedule(schedule.HALF_SCHEDULES[card], mean).rows for mean in (1, 24, 128, 1024)]
        for card in ((8, 0), (9, 0))
    }
    assert found == {(8, 0): [16, 32, 64, 128], (9, 0): [16, 64, 128, 128]}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("interleaved", dict(routing="masked", bias=True, sizes=(19, 16, 20, 24, 4, 2))),
        pytest.param("gated", dict(bias=True, sizes=(15, 20, 16, 16, 3, 2), dtype=torch.bfloat16), marks=slow),
        ("plain", dict(routing="two levels, zeros", bias=True, sizes=(15, 8, 8, 8, 4, 2))),
        pytest.param("plain", dict(routing="two levels", bias=True), marks=exhaustive),
        pytest.param("concatenated", dict(routing="capacity", transposed=True), marks=exhaustive),
        pytest.param("gated", dict(sizes=(210, 72, 136, 40, 3, 2), bias=True, kind="half"), marks=exhaustive),
        pytest.param("plain", dict(sizes=(19, 16, 16, 16, 257, 2), bias=True), marks=exhaustive),
    ],
)
def test_every_access_to_memory(run_check: Checks, layout: str, options: dict):
    """No place outside a tensor, none that nobody has written, none that two programs share."""
    run_check("check_memory", layout, "clamped" if layout == "interleaved" else "silu", **options)


@pytest.mark.parametrize(
    "routing",
    [
        *(pytest.param(r, marks=slow) for r in ("dropless", "masked", "capacity, zeros")),
        "dropless, zeros",
        "capacity, masked",
    ],
)
@pytest.mark.parametrize("experts", [*(pytest.param(e, marks=slow) for e in (1, 5, 257)), 64])
def test_plans(run_check: Checks, experts: int, routing: str):
    for groups in (1, 3):
        run_check("check_permutation", experts, groups, routing)


@pytest.mark.parametrize(("limited", "mask"), [(True, False), pytest.param(False, True, marks=slow)])
def test_plans_of_two_levels(run_check: Checks, limited: bool, mask: bool):
    run_check("check_plan_of_two_levels", limited, mask)


@pytest.mark.parametrize("sizes", [(5, 2, 70), *(pytest.param(s, marks=slow) for s in ((1, 1, 1), (257, 3, 50)))])
def test_queues(run_check: Checks, sizes: tuple[int, int, int]):
    run_check("check_queues", *sizes)


@pytest.mark.parametrize(
    ("gate", "experts", "dtype"),
    [
        ("softmax", 5, torch.float32),
        pytest.param("sigmoid, biased", 100, torch.bfloat16, marks=slow),
        pytest.param("of the chosen", 64, torch.float32, marks=slow),
        pytest.param("of the unlikely", 6, torch.float32, marks=slow),
        pytest.param("one", 1, torch.float32, marks=slow),
        pytest.param("module", 257, torch.bfloat16, marks=slow),
        *(
            pytest.param(gate, experts, torch.float16, marks=exhaustive)
            for gate in ("softmax", "sigmoid, biased", "of the chosen", "of the unlikely", "one", "module")
            for experts in (1, 2, 7, 128, 1000)
        ),
    ],
)
def test_choices_of_few_tokens(run_check: Checks, gate: str, experts: int, dtype: torch.dtype):
    run_check("check_topk_kernel", gate, experts, dtype)


@slow
@pytest.mark.parametrize(
    ("policy", "experts", "dtype"),
    [
        ("random", 5, torch.float32),
        ("threshold", 33, torch.bfloat16),
        ("all", 1, torch.float32),
        ("none", 2, torch.float16),
        ("all", 16, torch.float32),
        *(
            pytest.param(policy, experts, torch.float32, marks=exhaustive)
            for policy in ("all", "none", "threshold", "random")
            for experts in (1, 2, 5, 16, 33, 300)
        ),
    ],
)
def test_two_choices(run_check: Checks, policy: str, experts: int, dtype: torch.dtype):
    run_check("check_two_choices", policy, experts, dtype)


@pytest.mark.parametrize("selective", [False, True])
def test_a_first_call_in_checkpointing(run_check: Checks, selective: bool):
    run_check("check_first_call_in_checkpoint", selective)


OTHER_FAULTS = ("expert", "chosen", "primary", "probs", "log_total", "sums", "totals", "raises", "memory")


@pytest.mark.parametrize("fault", ["weight", "grad_logits", *(pytest.param(f, marks=slow) for f in OTHER_FAULTS)])
def test_wrong_two_choices_are_detected(run_check: Checks, fault: str):
    run_check("check_wrong_two_choices", fault)


@slow
@pytest.mark.parametrize("layer", ["top 3, gated, biases", *OTHER_LAYERS])
def test_few_tokens(run_check: Checks, layer: str):
    run_check("check_small_batches", layer)


@pytest.mark.parametrize("layer", ["top 3, gated, biases", *(pytest.param(name, marks=slow) for name in OTHER_LAYERS)])
def test_layer_equals_plain_layer(run_check: Checks, layer: str):
    run_check("check_layer", layer)


@slow
@pytest.mark.parametrize("activation", ["relu", "relu_squared"])
def test_nan_inputs(run_check: Checks, activation: str):
    run_check("check_nan", activation)


@slow
@pytest.mark.parametrize("layer", ["dropless", "capacity", "two levels, filled"])
def test_a_token_that_is_not_finite(run_check: Checks, layer: str):
    run_check("check_isolated", layer)


CHECKS = "lengths_of_the_self_check plan_with_unused_slots empty_inputs last_rows devices"
SLOW_CHECKS = "first_hour faults operand_layouts frozen operators compiled"


@pytest.mark.parametrize("name", [*CHECKS.split(), *(pytest.param(name, marks=slow) for name in SLOW_CHECKS.split())])
def test_checks_without_parameters(run_check: Checks, name: str):
    run_check(f"check_{name}")
