"""The layers on fake CUDA tensors: devices, dtypes, host syncs, and what a call costs there."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fake_cuda
from support.spawned_checks import Checks, spawn_checks
from support.triton_machine_code import PRODUCTS, Case

pytestmark = pytest.mark.skipif(fake_cuda.unsupported_reason() is not None, reason=str(fake_cuda.unsupported_reason()))
ROUTERS = ["top 2", "top 2, by score", "switch", "top 3", "top 3, by token", "top 3 of groups", "noisy"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CARDS = {"A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}
OF_FAMILIES = {"Orin": (8, 7), "B300": (10, 3), "Thor": (11, 0), "GB10": (12, 1)}  # programmed like one of those above


def load_checks() -> None:
    warnings.simplefilter("error")
    fake_cuda.load_fake_cuda()


@pytest.fixture(scope="module")
def run_checks() -> Iterator[Checks]:
    with spawn_checks(load_checks, "fake_cuda_checks") as check:
        yield check


def test_syncs_and_wrong_devices_are_detected(run_checks: Checks):
    run_checks("check_sync_is_seen")


@pytest.mark.parametrize("capacity", [None, pytest.param(1.0, marks=pytest.mark.slow)], ids=["dropless", "capacity"])
@pytest.mark.parametrize("router", [*ROUTERS, "expert choice", "two levels"])
def test_routers(run_checks: Checks, router: str, capacity: float | None):
    for masked in (False, True):
        for declared in (False, True):
            run_checks("check_layer", router, "gated", capacity, masked=masked, declared=declared)


@pytest.mark.parametrize(
    "dtype", ["bf16", "f32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("f16", "f64"))]
)
@pytest.mark.parametrize("experts", ["plain", "gated", "gated with biases"])
def test_dtypes(run_checks: Checks, experts: str, dtype: str):
    for capacity in (None, 1.25):
        run_checks("check_layer", "top 3", experts, capacity, dtype)


@pytest.mark.parametrize("router", ["top 2", "expert choice", "two levels"])
def test_autocast(run_checks: Checks, router: str):
    run_checks("check_layer", router, "plain", None, "f32", autocast=True, masked=True)


@pytest.mark.parametrize("capability", CARDS.values(), ids=CARDS)
def test_cards(run_checks: Checks, capability: tuple[int, int]):
    for dtype in ("bf16", "f32"):
        for declared in (False, True):
            run_checks("check_layer", "top 3", "gated", None, dtype, capability=capability, declared=declared)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("experts", "products"), [("plain", 2), ("gated with biases", 3)])
@pytest.mark.parametrize("router", ["top 3", "expert choice", "two levels"])
def test_quantized_experts_wait_once_per_product(
    run_checks: Checks, router: str, experts: str, products: int, bits: int
):
    assert run_checks("count_waits_of_quantized_experts", router, experts, bits) == (products, products)


def test_statistics(run_checks: Checks):
    run_checks("check_statistics")


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "card", "implementation", "of_triton"),
    [
        ("bf16", "H100", "grouped", "only on request"),
        ("bf16", "B200", "grouped", "only on request"),
        ("bf16", "A100", "triton", None),
        ("f16", "A100", "triton", None),
        ("bf16", "RTX 4090", "triton", None),
        ("f16", "RTX 5090", "triton", None),
        ("f32", "A100", "batched", "only on request"),
        ("f64", "A100", "batched", "got torch.float64"),
        ("f16", "H100", "batched", "only on request"),
        ("bf16", "Orin", "triton", None),
        ("bf16", "GB10", "triton", None),
        ("bf16", "B300", "grouped", "only on request"),
        ("bf16", "Thor", "batched", "only on request"),
        ("bf16", "RTX 2080", "batched", "only on request"),
    ],
)
def test_selected_implementation(run_checks: Checks, dtype: str, card: str, implementation: str, of_triton: str | None):
    reasons = {} if of_triton is None else {"triton": of_triton}
    capability = {**CARDS, **OF_FAMILIES, "RTX 2080": (7, 5)}[card]
    run_checks(
        "check_implementation",
        dtype,
        capability,
        implementation,
        reasons | ({"grouped": "torch's"} if implementation == "batched" else {}),
    )


@needs_triton
@pytest.mark.parametrize("card", ["A100", "H100", "RTX 4090"])
def test_kernels_are_the_default_only_on_declared_cards(run_checks: Checks, card: str):
    """No card has been declared, because none has run `benchmarks.first_hour`."""
    assert not run_checks("check_defaults", CARDS[card], declared=False)
    found = run_checks("check_defaults", CARDS[card], declared=True)
    assert {"top_2_kernel", "top_k_kernel", "count_queue_kernel", "grouped_matmul_kernel"} <= found.keys(), found


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "card", "tokens", "implementation"),
    [
        ("bf16", "H100", 1, "triton"),
        ("f16", "H100", 8, "triton"),
        ("bf16", "B200", 40, "triton"),
        ("bf16", "B200", 64, "grouped"),  # 24 rows of an expert: tiles of 64 rows
        ("bf16", "H100", 65, "grouped"),
        ("f32", "H100", 1, "batched"),
    ],
)
def test_decoding_implementation(run_checks: Checks, dtype: str, card: str, tokens: int, implementation: str):
    run_checks("check_decoding_implementation", dtype, CARDS[card], tokens, implementation)


@needs_triton
@pytest.mark.parametrize("card", ["H100", pytest.param("B200", marks=pytest.mark.slow)])
def test_decoding_multiplies_without_groups_of_warps(run_checks: Checks, card: str):
    """Tiles of 16 and 32 rows use plain `mma.sync`, which avoids what Triton miscompiles for tcgen05."""
    for mean_rows in (1, 16):
        codes = run_checks(
            "triton_machine_code.check_case", Case(CARDS[card], mean_rows=mean_rows), "grouped_matmul_kernel"
        )
        assert {code.blocks[0] for code in codes} == {16 if mean_rows == 1 else 32}
        assert {code.tensor_cores for code in codes} == {("m16n8k16",)}


@needs_triton
@pytest.mark.slow
def test_decoding_is_one_graph(run_checks: Checks):
    run_checks("check_graph_of_decoding", CARDS["H100"])


@pytest.mark.parametrize(
    ("arch", "asked", "implementation"),
    [
        ("gfx942", True, "grouped"),
        ("gfx950", True, "grouped"),
        ("gfx942", False, "batched"),
        ("gfx1100", True, "batched"),
    ],
)
def test_gpus_of_amd(run_checks: Checks, arch: str, asked: bool, implementation: str):
    run_checks("check_amd_gpu", arch, asked, implementation)


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_gpus_of_others(run_checks: Checks, device: str):
    run_checks("check_other_device", device)


def test_a_capture_is_one_of_the_device(run_checks: Checks):
    run_checks("check_capturing")


@needs_triton
@pytest.mark.parametrize("card", OF_FAMILIES)
def test_kernels_serve_a_family(run_checks: Checks, card: str):
    """Gates and experts follow one rule; cards before 8.0 and after 12.x are not supported."""
    run_checks("check_family", OF_FAMILIES[card], True)
    run_checks("check_family", (7, 5), False)
    run_checks("check_family", (13, 0), False)


@needs_triton
@pytest.mark.parametrize("training", [True, False], ids=["training", "decoding"])
def test_prepared_layer_compiles_no_more_kernels(run_checks: Checks, training: bool):
    run_checks("check_prepared", training)


@needs_triton
def test_launches_only_checked_kernels(run_checks: Checks):
    run_checks("check_programs_of_operands")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("card", OF_FAMILIES)
def test_kernels_compile_for_a_family(run_checks: Checks, card: str):
    """The largest and the smallest entry have no fault of `Code.faults`."""
    for mean_rows in (512, 8):
        case = Case(OF_FAMILIES[card], mean_rows=mean_rows)
        assert (
            len(
                run_checks(
                    "triton_machine_code.check_case", case, "grouped_matmul_kernel", "weight_grads", "top_2_kernel"
                )
            )
            > 3
        )


@needs_triton
@pytest.mark.parametrize(
    "capability",
    [pytest.param(card, marks=[] if name == "A100" else pytest.mark.slow, id=name) for name, card in CARDS.items()],
)
def test_self_check_runs_launched_kernels(run_checks: Checks, capability: tuple[int, int]):
    assert run_checks("check_entries", capability) >= 3


def test_a_thousand_experts_are_no_error(run_checks: Checks):
    """torch's grouped product raises an error for 1,024."""
    run_checks("check_many_experts", 1023, "grouped")
    run_checks("check_many_experts", 1024, "batched")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=needs_triton), "batched"])
def test_requested_implementations(run_checks: Checks, implementation: str, dtype: str):
    for capacity in (None, 1.0):
        run_checks("check_forced", implementation, "gated with biases", capacity, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped", "batched", pytest.param("triton", marks=needs_triton)])
def test_one_graph(run_checks: Checks, implementation: str):
    run_checks("check_compiled", implementation, "many experts", None, "bf16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("implementation", ["batched", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("router", [*ROUTERS, "expert choice", "two levels"])
def test_one_graph_of_every_router(run_checks: Checks, router: str, implementation: str, dtype: str):
    implementation = "batched" if router == "expert choice" else implementation  # kernels compute token choice
    for capacity in (None, 1.0):
        run_checks("check_compiled", implementation, router, capacity, dtype)


# ---- what Triton makes of it ----


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        Case((9, 0)),
        pytest.param(Case((8, 0), bias=True, activation="gelu"), marks=pytest.mark.exhaustive),
        pytest.param(Case((8, 9), layout="interleaved", activation="clamped_swiglu"), marks=pytest.mark.exhaustive),
        pytest.param(Case((10, 0), "float16", "plain", mean_rows=8), marks=pytest.mark.exhaustive),
        pytest.param(Case((12, 0), "float32", tf32=True), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_machine_code(run_checks: Checks, case: Case):
    """Checks register spills, shared memory, tensor cores and atomics; `triton_machine_code.py` has the rest."""
    codes = run_checks("triton_machine_code.check_case", case)
    others = ["top_k", "count_queue", "rank_queue", "top_2", "top_2_grads", "find_rows", "rank_rows"]
    assert {code.kernel for code in codes} >= {*PRODUCTS, *(f"{name}_kernel" for name in others)}


#: KB of shared memory at most, programs of a multiprocessor at least, and the instruction that multiplies
CHOSEN = [
    ("H100", {"row_grads": (144, 1, "m64n256k16"), "weight_grads": (96, 2, "m64n128k16")}),
    ("RTX 4090", {"row_grads": (64, 1, "m16n8k16"), "weight_grads": (48, 1, "m16n8k16")}),
]
MORE_CHOSEN = [
    ("H100", {"grouped_matmul_kernel": (144, 1, "m64n256k16"), "hidden_grads": (72, 2, "m64n64k16")}),
    ("A100", {"grouped_matmul_kernel": (96, 1, "m16n8k16"), "hidden_grads": (72, 2, "m16n8k16")}),
    ("RTX 4090", {"grouped_matmul_kernel": (64, 1, "m16n8k16"), "hidden_grads": (48, 2, "m16n8k16")}),
]


@needs_triton
@pytest.mark.parametrize(
    ("card", "wanted"), [*CHOSEN, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_CHOSEN)]
)
def test_block_size_selection(run_checks: Checks, card: str, wanted: dict[str, tuple[int, int, str]]):
    """Checks shared memory, concurrent programs and instructions, with no fault of `Code.faults`."""
    run_checks("triton_machine_code.check_chosen", CARDS[card], wanted)


@needs_triton
@pytest.mark.parametrize(
    ("card", "height", "kernels"),
    [
        pytest.param("H100", 128, ("hidden_grads",), marks=pytest.mark.slow),
        *(
            pytest.param(card, height, (), marks=pytest.mark.exhaustive)
            for card, height in itertools.product(CARDS, (16, 32, 64, 128))
        ),
    ],
)
def test_first_hour_candidates_are_clean(run_checks: Checks, card: str, height: int, kernels: tuple[str, ...]):
    """None of about ten block sizes per kernel spills or exceeds the shared memory."""
    found = run_checks("triton_machine_code.check_candidates", CARDS[card], height, *kernels)
    assert all(8 <= number <= 13 for number in found.values()), found


@needs_triton
@pytest.mark.slow
def test_programs_over_numbers_of_tokens(run_checks: Checks):
    """With 5 to 300 mean rows, the programs of four kernels depend on the height of tiles, and no others do."""
    programs = run_checks("triton_machine_code.programs_over_lengths", 60)
    assert programs.pop("grouped_matmul_kernel") == 8  # up and down
    assert {kernel for kernel, number in programs.items() if number == 4} == {
        "find_tiles_kernel",
        "hidden_grads",
        "row_grads",
    }
    twice = {"find_rows_kernel", "weight_grads", "sum_rows_kernel"}  # of one level and two; of either weight; out and x
    assert {kernel: number for kernel, number in programs.items() if number not in (1, 4)} == dict.fromkeys(twice, 2)
    assert len(programs) == 12


# ---- what a call costs ----

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "gpu_support.md"
ROWS = {
    "launches, forward": ("forward", "small"),
    "launches, forward and backward": ("forward and backward", "small"),
    "launches, decoding 1 token": ("1", "decoding"),
    "launches, decoding 4 tokens": ("4", "decoding"),
    "launches, decoding 64 tokens": ("64", "decoding"),
    "launches of two levels, forward": ("forward", "capacity"),
    "launches of two levels, forward and backward": ("forward and backward", "capacity"),
    "kept for the backward": ("kept", "large"),
    "kept, experts cut 8 times finer": ("kept", "fine"),
    "kept, limited capacity": ("kept", "capacity"),
    "moved by forward and backward, GB": ("moved", "large"),
}


def read_documented() -> dict[tuple[str, str], float]:
    """Return the cells of the table by implementation and row."""
    table = GUIDE.read_text(encoding="utf-8").split("<!-- table: costs -->\n")[1].split("<!-- end -->")[0]
    head, _, *lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {
        (implementation, row): float(cell)
        for row, *cells in lines
        for implementation, cell in zip(head[1:], cells, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped", "batched", pytest.param("triton", marks=needs_triton), "plain"])
def test_costs_are_those_of_the_guide(run_checks: Checks, implementation: str):
    """No cost exceeds its budget, and no budget is much larger than its cost."""
    found = {size: run_checks("measure_costs", implementation, size) for size in ("small", "large", "fine")}
    found["decoding"] = {
        str(tokens): run_checks("count_decoding_launches", implementation, tokens, implementation == "triton")
        for tokens in (1, 4, 64)
    }
    found["capacity"] = run_checks("measure_costs_with_capacity", implementation)
    for row, (name, size) in ROWS.items():
        budget = read_documented()[implementation, row]
        assert 0.93 * budget - 0.05 <= found[size][name] <= budget + 0.005, (row, found[size][name], budget)


@pytest.mark.parametrize(
    ("implementation", "most"), [("grouped", 30), ("batched", 30), pytest.param("triton", 12, marks=needs_triton)]
)
def test_decoding_is_few_launches(run_checks: Checks, implementation: str, most: int):
    """Counts a layer of 128 experts, including the gate and its losses, for 1 to 64 sequences."""
    for tokens in (1, 2, 5, 8, 42, 64):
        assert run_checks("count_decoding_launches", implementation, tokens) <= most, tokens


@needs_triton
def test_router_kernels_do_not_depend_on_the_implementation_of_experts(run_checks: Checks):
    """65 tokens are too many for decoding, so that "auto" selects `grouped` for the experts on an H100."""
    launches = {
        (implementation, kernels): run_checks("count_decoding_launches", implementation, 65, kernels)
        for implementation in ("auto", "grouped")
        for kernels in (None, True, False)
    }
    for kernels in (None, True, False):
        assert launches["grouped", kernels] == launches["auto", kernels], launches
    assert launches["grouped", True] <= launches["grouped", False] - 10
    fewest, most = (run_checks("count_decoding_launches", "triton", 65, kernels) for kernels in (None, False))
    assert fewest <= most - 10, (fewest, most)


@needs_triton
def test_two_choices_are_few_launches(run_checks: Checks):
    """Forward and backward, including the router's products. torch's operators need 33 and 33, or 46 and 39 for a
    second level."""
    assert run_checks("count_two_choice_launches", 0) == (9, 11)
    assert run_checks("count_two_choice_launches", 3) == (10, 11)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize(("implementation", "more"), [("grouped", (9, 25)), ("batched", (23, 45))])
def test_lora_is_few_launches_more(run_checks: Checks, implementation: str, more: tuple[int, int]):
    """Forward and backward with factors on three weights; a host sync would raise an error."""
    assert run_checks("count_lora_launches", implementation) == (implementation, *more)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped", "batched", pytest.param("triton", marks=needs_triton)])
def test_finer_experts_keep_the_same(run_checks: Checks, implementation: str):
    """Within 5%, because weights and tables of rows grow, but not the router's scores."""
    assert (
        run_checks("measure_costs", implementation, "fine")["kept"]
        <= 1.05 * run_checks("measure_costs", implementation, "large")["kept"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("router", ["top 2", "softmax", "sigmoid, groups", "expert choice"])
def test_gates_of_many_experts_keep_no_scores(run_checks: Checks, router: str, autocast: bool):
    """They keep only the indices and weights of a few choices, and values per token."""
    assert run_checks("measure_kept_scores", router, autocast) < 0.05


# ---- what users are shown ----


@pytest.mark.slow
def test_the_billion_of_the_documents(run_checks: Checks):
    text = (GUIDE.parent / "concepts.md").read_text(encoding="utf-8")
    code = text.split("<!-- test: cuda -->\n```python\n")[1].split("```")[0]
    assert 1e9 < run_checks("check_billion_example", code) < 1.1e9


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_example_trains(run_checks: Checks, compiled: bool):
    run_checks("check_example", compiled)


@pytest.mark.slow
def test_the_example_for_gpus_is_one_graph(run_checks: Checks):
    run_checks("check_example_for_gpus")
