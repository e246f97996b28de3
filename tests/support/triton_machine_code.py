"""Machine code of the Triton kernels for GPUs that are not here: what the operators launch, compiled ahead of time.

    python tests/support/triton_machine_code.py [sm_80 ...]    # every entry of the schedule: about 12 minutes a card

The operators run on fake CUDA tensors; what they would launch is written down and compiled, with the types, constants
and divisibilities of that launch. Wanted of each: no register spills, shared memory within the card's limit,
tensor-core instructions in products (but of IEEE float32), no atomics.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TENSOR_CORES = r"\b(?:mma\.sync\.aligned|wgmma\.mma_async\.sync\.aligned|tcgen05\.mma)\S*"
SHAPE = r"m\d+n\d+k\d+"
ATOMICS = r"\b(?:atom|red)\.\S+"
MANY_ROWS = 512  # rows of an expert for which tiles are the highest
PRODUCTS = ("grouped_matmul_kernel", "hidden_grads", "row_grads", "weight_grads")
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "bool": "i1"}


class Multiprocessor(NamedTuple):
    """What the programs of one multiprocessor share, and what one of them may have."""

    shared: int  # KB
    shared_of_one: int  # KB
    threads: int
    registers: int = 65536


CARDS = {
    (8, 0): Multiprocessor(164, 163, 2048),
    (8, 6): Multiprocessor(100, 99, 1536),
    (8, 9): Multiprocessor(100, 99, 1536),
    (9, 0): Multiprocessor(228, 227, 2048),
    (10, 0): Multiprocessor(228, 227, 2048),
    (12, 0): Multiprocessor(100, 99, 1536),
}
#: cards of their families
OTHER_CASES = {
    (8, 7): Multiprocessor(164, 163, 1536),
    (10, 3): Multiprocessor(228, 227, 2048),
    (11, 0): Multiprocessor(228, 227, 1536),
    (12, 1): Multiprocessor(100, 99, 1536),
}


class Case(NamedTuple):
    """A network whose launches are compiled."""

    capability: tuple[int, int]
    dtype: str = "bfloat16"
    layout: str = "gated"
    activation: str = "silu"
    bias: bool = False
    mean_rows: int = MANY_ROWS
    tf32: bool = False
    transposed: bool = False  # weights stored `(e, h, d)` and `(e, o, h)`
    even: bool = True  # blocks fit into every size


class Code(NamedTuple):
    """What a launch is compiled to.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's stack and local memory.
        shared: KB.
        programs: how many a multiprocessor runs at once.
        buffers: of each operand that loops copy asynchronously, how many blocks are under way or in use.
        waited: blocks of two dimensions that loops load into registers, and wait for.
        tensor_cores: the shapes of the instructions.
        atomics: instructions.
        divisions: instructions that round as IEEE says.
    """

    kernel: str
    blocks: tuple[int, ...]
    registers: int
    spilled: int
    shared: int
    programs: int
    buffers: tuple[int, ...]
    waited: int
    tensor_cores: tuple[str, ...]
    atomics: int
    divisions: int

    def faults(self, case: Case) -> list[str]:
        is_product = self.kernel in PRODUCTS
        wants_cores = is_product and (case.tf32 or case.dtype != "float32")
        # what warp groups multiply stays in use a turn longer
        by_groups = any(shape.startswith(("m64", "tcgen05")) for shape in self.tensor_cores)
        under_way = self.blocks[-1] - (not by_groups) if is_product else 0
        faults = {
            f"{self.spilled} bytes spilled": self.spilled > 0,
            f"{self.shared} KB of shared memory": self.programs == 0,
            "no tensor cores": wants_cores and not self.tensor_cores,
            f"{self.waited} loads that are waited for": self.waited > 0,
            f"{self.buffers} blocks, not {under_way} of each": is_product
            and (len(self.buffers) < 2 or set(self.buffers) != {under_way}),
            "one program a multiprocessor": self.kernel in is_slow_alone(case.capability)
            and (case.dtype, case.mean_rows) == ("bfloat16", MANY_ROWS)
            and self.programs < 2,
            "two weights in one program": self.kernel == "weight_grads" and len(self.buffers) != 2,
            f"{self.atomics} atomics": self.atomics > 0,
            "weights of a tie may be more than 0.5": self.kernel == "top_2_kernel" and self.divisions == 0,
        }
        return [fault for fault, found in faults.items() if found]


def is_slow_alone(capability: tuple[int, int]) -> list[str]:
    """The kernels of which two programs run at once: `hidden_grads` has a long end, in which one leaves tensor cores
    idle; `weight_grads` has 128 registers on most cards, by the Triton that comes with torch."""
    import triton

    of_torch = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    return ["hidden_grads", *(["weight_grads"] if of_torch and capability[0] < 12 else [])]


def check_case(case: Case, *only: str) -> list[Code]:
    """Compile what a forward and a backward launch, or some kernels of it; an AssertionError names what is wrong."""
    launches = [launch for launch in list_launches(case) if not only or launch[0].fn.__name__ in only]
    codes = [compile_launch(kernel, arguments, case.capability) for kernel, arguments in launches]
    wrong = [(code, code.faults(case)) for code in codes if code.faults(case)]
    assert not wrong, (case, wrong)
    return codes


def check_chosen(capability: tuple[int, int], wanted: dict[str, tuple[int, int, str]]) -> None:
    """The programs of many rows are what the table's entries are chosen for: of each kernel, KB of shared memory at
    most, programs at once at least, and, where it is launched with the most columns, the widest instruction."""
    case, found = Case(capability), {}
    for kernel, arguments in list_launches(case):
        if kernel.fn.__name__ in wanted:
            code = compile_launch(kernel, arguments, capability)
            shared, programs, _ = wanted[code.kernel]
            assert not code.faults(case), code
            assert code.shared <= shared, code
            assert code.programs >= programs, code
            if code.kernel not in found or code.blocks[1] > found[code.kernel].blocks[1]:
                found[code.kernel] = code
    for kernel, (_, _, shape) in wanted.items():
        assert shape in found[kernel].tensor_cores, found[kernel]


def check_candidates(capability: tuple[int, int], height: int, *only: str) -> dict[str, int]:
    """What the first hour tries around an entry of the schedule: of each kernel (or of some) sizes of blocks, none of
    which has a fault or takes more shared memory than was reckoned. Returns how many."""
    import torch

    from benchmarks import blocks
    from mixture_of_experts.kernels.launching import find_card_family
    from mixture_of_experts.ops.triton import operators, row_permutation, schedule
    from support.fake_cuda_checks import run_on_gpu

    case, found = Case(capability, mean_rows=MANY_ROWS - 1), dict.fromkeys(blocks.KERNELS, 0)
    (entry,) = (entry for entry in schedule.HALF_SCHEDULES[find_card_family(capability)] if entry.rows == height)
    shared = 1024 * (CARDS | OTHER_CASES)[capability].shared_of_one
    for tried, changed in blocks.list_neighbouring_entries(entry, capability, shared):
        launches = {}

        def note(kernel: Any, grid: tuple[int, ...], launches=launches, changed=changed, **arguments: Any) -> None:
            if (name := blocks.get_kernel_name(kernel, arguments)) in changed and name in (only or blocks.KERNELS):
                described = {name: describe_argument(value) for name, value in arguments.items()}
                launches[name, str(described)] = (kernel, described)

        with run_on_gpu(torch.bfloat16, capability), blocks.force_schedule(note, tried):
            run_operators(case, operators, row_permutation)
        for (name, _), (kernel, arguments) in launches.items():
            code, sizes = compile_launch(kernel, arguments, capability), getattr(tried, name)
            m, by_groups = getattr(sizes, "m", height), "m64" in str(code.tensor_cores) or capability[0] == 10
            assert not code.faults(case), (name, sizes, code, code.faults(case))
            assert code.shared <= -(-blocks.count_shared_bytes(sizes, m, by_groups) // 1024) + 1, (name, sizes, code)
        found = {name: number + (name in changed) for name, number in found.items()}
    return found


def programs_over_lengths(number: int) -> dict[str, int]:
    """How many programs of each kernel would be compiled for so many mean rows of an expert."""
    found: dict[str, set] = {}
    for rows in range(1, number + 1):
        for kernel, arguments in list_launches(Case((9, 0), mean_rows=5 * rows)):
            found.setdefault(kernel.fn.__name__, set()).add(str(build_program(kernel, arguments)))
    return {kernel: len(programs) for kernel, programs in found.items()}


def list_launches(case: Case) -> list[tuple[Any, dict[str, Any]]]:
    """The launches of a forward and a backward, each kind once."""
    import torch

    from mixture_of_experts.kernels import queueing, top_2, top_k
    from mixture_of_experts.ops.triton import operators, row_permutation
    from support.fake_cuda_checks import run_on_gpu

    seen: dict[Any, tuple[Any, dict[str, Any]]] = {}

    def note(kernel, grid, **arguments):
        described = {name: describe_argument(value) for name, value in arguments.items()}
        seen[kernel.fn.__name__, tuple(sorted(described.items(), key=str))] = (kernel, described)

    modules, launch = (operators, top_k, queueing, top_2), operators.launch_kernel
    for module in modules:
        module.launch_kernel = note
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        with run_on_gpu(getattr(torch, case.dtype), case.capability):
            run_operators(case, operators, row_permutation)
            logits, settings = (
                torch.empty(64, 1, 128, dtype=torch.float32),
                (8, not case.bias, not case.bias, True, 2.5, 1e-20, 1.0, 1.0),
            )
            top_k.choose_top_k._init_fn(logits, logits[0, 0] if case.bias else None, *settings)
            line = torch.empty(4, 256, dtype=torch.int64)
            queueing.queue_assignments._init_fn(line, line > 0, line if case.bias else None, 128, 1, case.bias)
            run_two_best(top_2, case)
    finally:
        for module in modules:
            module.launch_kernel = launch
    return list(seen.values())


def run_operators(case: Case, operators, row_permutation) -> None:
    import torch

    e, (d, h, o) = 8, (1024, 512, 2048) if case.even else (1008, 528, 2032)
    r = e * case.mean_rows
    width = h if case.layout in ("plain", "gated") else 2 * h
    number = 2 if case.layout == "gated" else 1

    def weight(p: int, q: int) -> torch.Tensor:
        return torch.empty(e, q, p).mT if case.transposed else torch.empty(e, p, q)

    index, flag, table = (torch.empty(r, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.int32))
    tables = (torch.empty(r, dtype=torch.float32), table, table, table, torch.empty(e, dtype=torch.int64), 2)
    w_in, w_out = [weight(d, width) for _ in range(number)], weight(h, o)
    biases = ([torch.empty(e, width) for _ in range(number)], [torch.empty(e, o)]) if case.bias else ([], [])
    network = (case.layout, case.activation, 1.702, 7.0)
    x, grad = torch.empty(r // 2, d), torch.empty(r // 2, o)
    length = torch.empty(e, dtype=torch.int64)
    row_permutation.triton_permute._init_fn(index, index, flag, flag, length, None, r // 2, 2, e, e, 2, r)
    row_permutation.triton_permute._init_fn(index, index, flag, flag, length, index, r // 4, 2, e // 4, e, 4, r)
    row_permutation.triton_permute_few._init_fn(index, flag, e, 2)
    _, pre = operators.triton_ffn._init_fn(x, *tables, w_in, w_out, *biases, *network, True)
    operators.triton_ffn_backward._init_fn(grad, pre, x, *tables, w_in, w_out, *biases, *network, True, True, True)


def run_two_best(top_2, case: Case) -> None:
    """With masks, random numbers and all gradients, or with nothing."""
    import torch

    # of 100 experts registers are the most
    logits, of_token = torch.empty(2, 300, 128 if case.even else 100, dtype=torch.float32), None
    grads, policy, flag = [None] * 4, "all", None
    if case.bias:
        of_token, flag = torch.empty(2, 300, dtype=torch.float32), torch.empty(2, 300, dtype=torch.bool)
        grads, policy = [logits, of_token, logits[:, 0], of_token[0, 0]], "random"
    expert, weight, _, _, probs, log_total, *_ = top_2.choose_top_2._init_fn(
        logits, flag, flag, of_token, policy, 0.2, 1e-9
    )
    top_2.choose_top_2_grads._init_fn(probs, expert, log_total, flag, 1e-9, [weight, *grads])


def describe_argument(value: Any) -> Any:
    """A tensor as its type and whether its first element is aligned to 16 bytes."""
    import torch

    if isinstance(value, torch.Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return "*" + TYPES[str(value.dtype).removeprefix("torch.")], aligned
    return value


def build_program(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict, dict]:
    """What of a launch its program depends on: types, constants, divisibilities; and options of the compiler."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = value is None or (value == 1 and not parameter.do_not_specialize)
        if parameter.is_constexpr or fixed:
            signature[parameter.name], constants[place,] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, tuple):
            signature[parameter.name], even = value
            attributes |= {(place,): [["tt.divisibility", 16]]} if even else {}
        else:
            signature[parameter.name] = "i32"
            even = value % 16 == 0 and not parameter.do_not_specialize
            attributes |= {(place,): [["tt.divisibility", 16]]} if even else {}
    return signature, constants, attributes, options


def compile_launch(kernel: Any, arguments: dict[str, Any], capability: tuple[int, int]) -> Code:
    """As Triton would compile it at this launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = build_program(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    registers, spilled = read_resource_usage(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    found = re.findall(TENSOR_CORES, compiled.asm["ptx"])
    shapes = {shape[0] if (shape := re.findall(SHAPE, name)) else name for name in found}
    sizes = [arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C") if name in arguments]
    return Code(
        kernel.fn.__name__,
        (*sizes, *options.values()),
        registers,
        spilled,
        -(-shared // 1024),
        programs_at_once((CARDS | OTHER_CASES)[capability], registers, shared, warps),
        *copy_source(compiled.asm["ttgir"]),
        tuple(sorted(shapes)),
        len(re.findall(ATOMICS, compiled.asm["ptx"])),
        compiled.asm["ptx"].count("div.rn.f32"),
    )


def programs_at_once(card: Multiprocessor, registers: int, shared: int, warps: int) -> int:
    """0 if not even one fits."""
    of_warp = -(-registers // 8) * 8 * 32
    by_shared = (card.shared * 1024) // (shared + 1024) if shared <= card.shared_of_one * 1024 else 0
    return min(card.registers // (of_warp * warps), by_shared, card.threads // (32 * warps))


def copy_source(text: str) -> tuple[tuple[int, ...], int]:
    """Of a program before it is PTX: the buffers of what its loops copy, and the blocks that they wait for."""
    buffers = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", text)
    waited, blocks = 0, []  # of the blocks of the text that are open: whether it is a loop, its loads, its products
    for line in map(str.strip, text.splitlines()):
        if line.startswith("}"):
            is_loop, loads, products = blocks.pop()
            waited += loads if is_loop and products else 0
        if re.search(r"\{(?: loc\(\S+\))?$", line):
            blocks.append(["scf.for" in line, 0, 0])
        elif blocks:
            blocks[-1][1] += bool(re.search(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr", line))
            blocks[-1][2] += bool(re.search(r"tt\.dot |warp_group_dot |tc_gen5_mma ", line))
    return tuple(map(int, buffers)), waited


def read_resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory, where spilled ones go."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    assert match is not None, done.stdout + done.stderr
    return int(match[1]), int(match[2]) + int(match[3])


def list_cases(capability: tuple[int, int]) -> Iterator[Case]:
    """Every entry of the schedule, with the networks that need the most registers."""
    gated = Case(capability, "bfloat16", "gated", "gelu", True)
    clamped = gated._replace(layout="interleaved", activation="clamped_swiglu")
    bfloat16 = (gated, gated._replace(layout="plain"), clamped)
    bfloat16 += tuple(case._replace(transposed=True) for case in (gated, clamped))  # as transformers stores weights
    bfloat16 += (gated._replace(even=False),)
    float32 = [gated._replace(dtype="float32", even=even) for even in (True, False)]
    for case in (*bfloat16, gated._replace(dtype="float16"), *(one._replace(tf32=True) for one in float32), *float32):
        for mean_rows in (8, 16, 40, MANY_ROWS):
            yield case._replace(mean_rows=mean_rows)


def main() -> int:
    wanted = sys.argv[1:] or [f"sm_{major}{minor}" for major, minor in CARDS]
    failed = 0
    for capability in CARDS:
        name = "sm_{}{}".format(*capability)
        if name not in wanted:
            continue
        for case in list_cases(capability):
            for kernel, arguments in list_launches(case):
                code = compile_launch(kernel, arguments, capability)
                faults = code.faults(case)
                failed += bool(faults)
                kind = "tf32" if case.tf32 else case.dtype
                described = [
                    word for word, said in (("transposed", case.transposed), ("uneven", not case.even)) if said
                ]
                print(name, kind, case.layout, *described, case.mean_rows, *code, *faults, flush=True)
        for height in (16, 32, 64, 128):
            print(name, "around tiles of", height, check_candidates(capability, height), flush=True)
    print(f"{failed} faults")
    return int(failed > 0)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter has no machine code"
    sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])
    from support import fake_cuda

    fake_cuda.load_fake_cuda()
    sys.exit(main())
