"""The layers on fake CUDA tensors: devices, dtypes, host syncs, and what a call costs there."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fake_cuda
from support.own_process import Checks, checks
from support.triton_machine_code import PRODUCTS, Case

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))
ROUTERS = ["top 2", "top 2, by score", "switch", "top 3", "top 3, by token", "top 3 of groups", "noisy"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CARDS = {"A100": (8, 0), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}
OF_FAMILIES = {"Orin": (8, 7), "B300": (10, 3), "Thor": (11, 0), "GB10": (12, 1)}  # programmed like one of those above


def load() -> None:
    warnings.simplefilter("error")
    fake_cuda.load()


@pytest.fixture(scope="module")
def check() -> Iterator[Checks]:
    with checks(load, "fake_cuda_checks") as check:
        yield check


def test_a_sync_and_a_wrong_device_are_seen(check: Checks):
    check("check_sync_is_seen")


@pytest.mark.parametrize("capacity", [None, pytest.param(1.0, marks=pytest.mark.slow)], ids=["dropless", "capacity"])
@pytest.mark.parametrize("router", [*ROUTERS, "expert choice", "two levels"])
def test_routers(check: Checks, router: str, capacity: float | None):
    for masked in (False, True):
        check("check_layer", router, "gated", capacity, masked=masked)


@pytest.mark.parametrize(
    "dtype", ["bf16", "f32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("f16", "f64"))]
)
@pytest.mark.parametrize("experts", ["plain", "gated", "gated with biases"])
def test_dtypes(check: Checks, experts: str, dtype: str):
    for capacity in (None, 1.25):
        check("check_layer", "top 3", experts, capacity, dtype)


@pytest.mark.parametrize("router", ["top 2", "expert choice", "two levels"])
def test_autocast(check: Checks, router: str):
    check("check_layer", router, "plain", None, "f32", autocast=True, masked=True)


@pytest.mark.parametrize("capability", CARDS.values(), ids=CARDS)
def test_cards(check: Checks, capability: tuple[int, int]):
    for dtype in ("bf16", "f32"):
        check("check_layer", "top 3", "gated", None, dtype, capability=capability)


def test_statistics(check: Checks):
    check("check_statistics")


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "card", "way", "of_triton"),
    [
        ("bf16", "H100", "grouped", "unless they are asked for"),
        ("bf16", "B200", "grouped", "unless they are asked for"),
        ("bf16", "A100", "triton", None),
        ("f16", "A100", "triton", None),
        ("bf16", "RTX 4090", "triton", None),
        ("f16", "RTX 5090", "triton", None),
        ("f32", "A100", "batched", "unless they are asked for"),
        ("f64", "A100", "batched", "not torch.float64"),
        ("f16", "H100", "batched", "unless they are asked for"),
        ("bf16", "Orin", "triton", None),
        ("bf16", "GB10", "triton", None),
        ("bf16", "B300", "grouped", "unless they are asked for"),
        ("bf16", "Thor", "batched", "unless they are asked for"),
        ("bf16", "RTX 2080", "batched", "unless they are asked for"),
    ],
)
def test_which_way(check: Checks, dtype: str, card: str, way: str, of_triton: str | None):
    reasons = {} if of_triton is None else {"triton": of_triton}
    capability = {**CARDS, **OF_FAMILIES, "RTX 2080": (7, 5)}[card]
    check("check_way", dtype, capability, way, reasons | ({"grouped": "torch's"} if way == "batched" else {}))


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "card", "tokens", "way"),
    [
        ("bf16", "H100", 1, "triton"),
        ("f16", "H100", 8, "triton"),
        ("bf16", "B200", 40, "triton"),
        ("bf16", "B200", 64, "grouped"),  # 24 rows of an expert: tiles of 64 rows
        ("bf16", "H100", 65, "grouped"),
        ("f32", "H100", 1, "batched"),
    ],
)
def test_which_way_decodes(check: Checks, dtype: str, card: str, tokens: int, way: str):
    check("check_way_of_decoding", dtype, CARDS[card], tokens, way)


@needs_triton
@pytest.mark.parametrize("card", ["H100", pytest.param("B200", marks=pytest.mark.slow)])
def test_decoding_multiplies_without_groups_of_warps(check: Checks, card: str):
    """Tiles of 16 and 32 rows have plain `mma.sync`: what Triton miscompiles for tcgen05 is not in them."""
    for mean_rows in (1, 16):
        codes = check("triton_machine_code.check", Case(CARDS[card], mean_rows=mean_rows), "rows_by_weights")
        assert {code.blocks[0] for code in codes} == {16 if mean_rows == 1 else 32}
        assert {code.tensor_cores for code in codes} == {("m16n8k16",)}


@needs_triton
@pytest.mark.slow
def test_decoding_is_one_graph(check: Checks):
    check("check_graph_of_decoding", CARDS["H100"])


@pytest.mark.parametrize(
    ("arch", "asked", "way"),
    [
        ("gfx942", True, "grouped"),
        ("gfx950", True, "grouped"),
        ("gfx942", False, "batched"),
        ("gfx1100", True, "batched"),
    ],
)
def test_gpus_of_amd(check: Checks, arch: str, asked: bool, way: str):
    check("check_amd", arch, asked, way)


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_gpus_of_others(check: Checks, device: str):
    check("check_other_device", device)


def test_a_capture_is_one_of_the_device(check: Checks):
    check("check_capturing")


@needs_triton
@pytest.mark.parametrize("card", OF_FAMILIES)
def test_kernels_serve_a_family(check: Checks, card: str):
    """Gates and experts go by one rule; nothing older than 8.0 is served, and nothing newer than 12.x."""
    check("check_family", OF_FAMILIES[card], True)
    check("check_family", (7, 5), False)
    check("check_family", (13, 0), False)


@needs_triton
@pytest.mark.parametrize("training", [True, False], ids=["training", "decoding"])
def test_a_prepared_layer_compiles_nothing_more(check: Checks, training: bool):
    check("check_prepared", training)


@needs_triton
def test_no_program_is_launched_that_nobody_checked(check: Checks):
    check("check_programs_of_operands")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("card", OF_FAMILIES)
def test_kernels_compile_for_a_family(check: Checks, card: str):
    """The largest and the smallest entry: no fault of `Code.faults`."""
    for mean_rows in (512, 8):
        case = Case(OF_FAMILIES[card], mean_rows=mean_rows)
        assert len(check("triton_machine_code.check", case, "rows_by_weights", "weight_grads", "choose_two")) > 3


@needs_triton
@pytest.mark.parametrize(
    "capability",
    [pytest.param(card, marks=[] if name == "A100" else pytest.mark.slow, id=name) for name, card in CARDS.items()],
)
def test_the_self_check_judges_what_is_launched(check: Checks, capability: tuple[int, int]):
    assert check("check_entries", capability) >= 3


def test_a_thousand_experts_are_no_error(check: Checks):
    """torch's grouped product raises for 1,024."""
    check("check_many_experts", 1023, "grouped")
    check("check_many_experts", 1024, "batched")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("way", [pytest.param("triton", marks=needs_triton), "batched"])
def test_ways_that_are_asked_for(check: Checks, way: str, dtype: str):
    for capacity in (None, 1.0):
        check("check_forced", way, "gated with biases", capacity, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grouped", "batched", pytest.param("triton", marks=needs_triton)])
def test_one_graph(check: Checks, way: str):
    check("check_compiled", way, "many experts", None, "bf16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("way", ["batched", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("router", [*ROUTERS, "expert choice", "two levels"])
def test_one_graph_of_every_router(check: Checks, router: str, way: str, dtype: str):
    way = "batched" if router == "expert choice" else way  # kernels compute token choice
    for capacity in (None, 1.0):
        check("check_compiled", way, router, capacity, dtype)


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
def test_machine_code(check: Checks, case: Case):
    """No register spills, the card's shared memory, tensor cores, no atomics; `triton_machine_code.py` has the rest."""
    codes = check("triton_machine_code.check", case)
    wanted = "choose count_in_line rank_in_line choose_two choose_two_grads find_rows rank_rows"
    assert {code.kernel for code in codes} >= {*wanted.split(), *PRODUCTS}


#: KB of shared memory at most, programs of a multiprocessor at least, and the instruction that multiplies
CHOSEN = [
    ("H100", {"row_grads": (144, 1, "m64n256k16"), "weight_grads": (96, 2, "m64n128k16")}),
    ("RTX 4090", {"row_grads": (64, 1, "m16n8k16"), "weight_grads": (48, 1, "m16n8k16")}),
]
MORE_CHOSEN = [
    ("H100", {"rows_by_weights": (144, 1, "m64n256k16"), "hidden_grads": (72, 2, "m64n64k16")}),
    ("A100", {"rows_by_weights": (96, 1, "m16n8k16"), "hidden_grads": (72, 2, "m16n8k16")}),
    ("RTX 4090", {"rows_by_weights": (64, 1, "m16n8k16"), "hidden_grads": (48, 2, "m16n8k16")}),
]


@needs_triton
@pytest.mark.parametrize(
    ("card", "wanted"), [*CHOSEN, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_CHOSEN)]
)
def test_what_blocks_are_chosen_for(check: Checks, card: str, wanted: dict[str, tuple[int, int, str]]):
    """Shared memory, programs at once, instructions; and no fault of `Code.faults`."""
    check("triton_machine_code.check_chosen", CARDS[card], wanted)


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
def test_what_the_first_hour_tries_is_clean(check: Checks, card: str, height: int, kernels: tuple[str, ...]):
    """About ten sizes of blocks of each kernel, none of which spills or wants more shared memory than there is."""
    found = check("triton_machine_code.check_candidates", CARDS[card], height, *kernels)
    assert all(8 <= number <= 13 for number in found.values()), found


@needs_triton
@pytest.mark.slow
def test_programs_over_numbers_of_tokens(check: Checks):
    """Over mean rows of 5 to 300: those of four kernels depend on the height of tiles, the others on nothing."""
    programs = check("triton_machine_code.programs_over_lengths", 60)
    assert programs.pop("rows_by_weights") == 8  # up and down
    assert {kernel for kernel, number in programs.items() if number == 4} == {"find_tiles", "hidden_grads", "row_grads"}
    twice = {"find_rows", "weight_grads", "sum_rows"}  # of one level and two; of either weight; out and x
    assert {kernel: number for kernel, number in programs.items() if number not in (1, 4)} == dict.fromkeys(twice, 2)
    assert len(programs) == 12


# ---- what a call costs ----

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
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


def documented() -> dict[tuple[str, str], float]:
    """The cells of the table: (way, row)."""
    table = GUIDE.read_text(encoding="utf-8").split("<!-- table: costs -->\n")[1].split("<!-- end -->")[0]
    head, _, *lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {(way, row): float(cell) for row, *cells in lines for way, cell in zip(head[1:], cells, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grouped", "batched", pytest.param("triton", marks=needs_triton), "plain"])
def test_costs_are_those_of_the_guide(check: Checks, way: str):
    """None is above its budget, and no budget is far above what is."""
    found = {size: check("costs", way, size) for size in ("small", "large", "fine")}
    found["decoding"] = {str(tokens): check("launches_of_decoding", way, tokens) for tokens in (1, 4, 64)}
    found["capacity"] = check("costs_with_capacity", way)
    for row, (name, size) in ROWS.items():
        budget = documented()[way, row]
        assert 0.93 * budget - 0.05 <= found[size][name] <= budget + 0.005, (row, found[size][name], budget)


@pytest.mark.parametrize(
    ("way", "most"), [("grouped", 30), ("batched", 30), pytest.param("triton", 12, marks=needs_triton)]
)
def test_decoding_is_few_launches(check: Checks, way: str, most: int):
    """Of a layer of 128 experts, for 1 to 64 sequences, with the gate and its losses."""
    for tokens in (1, 2, 5, 8, 42, 64):
        assert check("launches_of_decoding", way, tokens) <= most, tokens


@needs_triton
def test_two_choices_are_few_launches(check: Checks):
    """Forward and backward with the router's products, by torch's operators 33 and 33; of a second level 46 and 39."""
    assert check("launches_of_two_choices", 0) == (9, 11)
    assert check("launches_of_two_choices", 3) == (10, 11)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize(("way", "more"), [("grouped", (9, 25)), ("batched", (23, 45))])
def test_lora_is_few_launches_more(check: Checks, way: str, more: tuple[int, int]):
    """Forward and backward, on three weights; a host sync would raise."""
    assert check("launches_of_lora", way) == (way, *more)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grouped", "batched", pytest.param("triton", marks=needs_triton)])
def test_finer_experts_keep_the_same(check: Checks, way: str):
    """To 5 %: what is more are weights and tables of rows, not the router's scores."""
    assert check("costs", way, "fine")["kept"] <= 1.05 * check("costs", way, "large")["kept"]


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("router", ["top 2", "softmax", "sigmoid, groups", "expert choice"])
def test_gates_of_many_experts_keep_no_scores(check: Checks, router: str, autocast: bool):
    """But indices and weights of a few choices, and what is of tokens alone."""
    assert check("kept_of_scores", router, autocast) < 0.05


# ---- what users are shown ----


@pytest.mark.slow
def test_the_billion_of_the_documents(check: Checks):
    text = (GUIDE.parent / "concepts.md").read_text(encoding="utf-8")
    code = text.split("<!-- test: cuda -->\n```python\n")[1].split("```")[0]
    assert 1e9 < check("check_billion", code) < 1.1e9


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_example_trains(check: Checks, compiled: bool):
    check("check_example", compiled)


@pytest.mark.slow
def test_the_example_for_gpus_is_one_graph(check: Checks):
    check("check_example_for_gpus")
