"""Figures without noise: floating-point operations, bytes kept for backward, peak memory. `--count`: their tables, each
a ratio with its limit.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import problem
from benchmarks.cases import Case, list_cases
from benchmarks.contestants import Contestant
from benchmarks.registry import build_contestants

TRANSPARENT_OPERATORS = ("aten", "prim", "prims", "profiler", "inductor", "mixture_of_experts")  # ours have formulas


def grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *_, **__) -> int:
    """2 x rows x inner x columns of a grouped product (shapes), which torch's counter does not know.

    (rows, i) x (e, i, o), (m, rows) x (rows, o) and (e, m, i) x (i, o) all do every row once; only 3-D x 3-D batches.
    """
    batches = a[0] if len(a) == len(b) == 3 else 1
    return 2 * batches * a[-2] * a[-1] * b[-1]


def added_flops(total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *_, **__) -> int:
    """2 x batches x rows x inner x columns of `addmm_` and `baddbmm_`, as torch's counter has it for those that are
    not in place."""
    return 2 * math.prod(a) * b[-1]


class OpNames(TorchDispatchMode):
    """Collects the names of operators from outside torch: products inside them cannot be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace not in TRANSPARENT_OPERATORS:
            self.opaque.add(str(func))
        return func(*args, **(kwargs or {}))


def count_flops(contestant: Contestant) -> int:
    """Floating-point operations of one step's matrix products (FlopCounterMode)."""
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)
    formula: dict = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), added_flops)
    if grouped is not None:
        formula[grouped] = grouped_mm_flops
    counter, names = FlopCounterMode(display=False, custom_mapping=formula), OpNames()
    with counter, names:
        contestant.step()
    contestant.release()
    if names.opaque:
        raise RuntimeError(f"{contestant.name} has operators whose products cannot be counted: {sorted(names.opaque)}")
    return counter.get_total_flops()


def storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage."""
    held = tensor.untyped_storage()
    return held.data_ptr(), held.nbytes()


def count_saved_bytes(contestant: Contestant) -> int:
    """Bytes that autograd keeps between forward and backward: every storage once, without parameters and the input."""
    own = {storage(leaf)[0] for leaf in (*contestant.inputs, *contestant.parameters)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        address, size = storage(tensor)
        if address not in own:
            kept[address] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contestant.step()
    contestant.release()
    return sum(kept.values())


@dataclass(frozen=True)
class Event:
    """An allocation (bytes > 0) or its release (bytes < 0)."""

    address: int
    bytes: int


def memory_events(work: Callable[[], None]) -> list[Event]:
    """Every allocation and release of torch's CPU allocator while `work` runs, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    rows = sorted((e for e in trace if e["name"] == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    return [Event(row["args"]["Addr"], row["args"]["Bytes"]) for row in rows]


def measure_peak_bytes(contestant: Contestant) -> int:
    """The most memory that one step holds at a time beyond what stood before it, its weights' gradients left out.

    Counted from the allocator's own events, so it is exact, repeatable and not blurred by what the process keeps for
    reuse, as the resident size would be. What kernels allocate behind torch's back is not in it. The buffers that end
    as the parameters' gradients are left out from their start; the input's gradient and the output are in.
    """
    contestant.step()
    contestant.release()
    events = memory_events(contestant.step)
    gradients = {storage(leaf.grad)[0] for leaf in contestant.parameters if leaf.grad is not None}
    contestant.release()
    return peak_of(events, gradients)


def peak_of(events: list[Event], lasting: set[int]) -> int:
    """The largest sum of live allocations, without the last allocation at each address in `lasting`."""
    final = {event.address: i for i, event in enumerate(events) if event.bytes > 0 and event.address in lasting}
    live: dict[int, int] = {}
    now = peak = 0
    for i, event in enumerate(events):
        if event.bytes < 0:
            now -= live.pop(event.address, 0)
        elif final.get(event.address) != i:
            live[event.address] = event.bytes
            now += event.bytes
            peak = max(peak, now)
    return peak


Measure = Callable[[Contestant], float]


def row(what: str, case: str, over: float, under: float, unit: str, limit: float | None, note: str) -> dict:
    value = over / under
    met = None if limit is None else value <= limit
    numbers = {"over": over, "under": under, "unit": unit, "value": value, "limit": limit, "met": met}
    return {"what": what, "case": case, "note": note} | numbers


def compare(case: Case, what: str, unit: str, measure: Measure, rival: str, limit: float | None) -> list[dict]:
    """The layer's count over a rival's; empty where the rival is missing."""
    present, _ = build_contestants(replace(case, figures=(), extras=("layer", rival)))
    if len(present) < 2:
        return []
    over, under = (measure(present[name]) for name in ("layer", rival))
    return [row(what, case.name, over, under, unit, limit, f"layer ÷ {rival}")]


def against_rivals(case: Case) -> Iterator[dict]:
    """One case's counts."""
    yield from compare(case, "FLOPs", "FLOP", count_flops, "router + products", 1.0)
    yield from compare(case, "bytes kept for backward", "B", count_saved_bytes, "dense", 1.10)
    yield from compare(case, "peak memory", "B", measure_peak_bytes, "0.2.3", 0.15 if case.n == 8192 else None)


def check_memory_growth() -> Iterator[dict]:
    """Peak memory is linear in the sequence: 16k to 32k tokens adds at most 2.1 times what 8k to 16k adds."""
    peaks = []
    for n in (8192, 16384, 32768):
        case = Case(f"length/{n}", "train", 1, n, 256, 1024, 64, extras=("layer",))
        peaks.append(measure_peak_bytes(build_contestants(case)[0]["layer"]))
    note = "16k→32k over 8k→16k tokens, d256 e64"
    yield row("peak memory growth", "length", peaks[2] - peaks[1], peaks[1] - peaks[0], "B", 2.1, note)


def check_granularity() -> Iterator[dict]:
    """Bytes kept as the experts are cut finer at constant k x h and constant e x h."""
    first = {}
    for k, h, e in ((1, 2048, 16), (2, 1024, 32), (4, 512, 64), (8, 256, 128)):
        for factor in (None, 1.25):
            kind = "dropless" if factor is None else "capacity"
            case = Case(f"cut/{kind}-k{k}-h{h}-e{e}", "train", 4, 1024, 256, h, e, k, factor, gated=True)
            kept = count_saved_bytes(build_contestants(replace(case, extras=("layer",)))[0]["layer"])
            first.setdefault(kind, kept)
            note = "SwiGLU, k x h = 2048, ÷ k = 1"
            yield row("bytes kept for backward", case.name, kept, first[kind], "B", 1.10, note)
            problem.forget_weights()


def iter_count_rows(pattern: str | None) -> Iterator[dict]:
    """Every row of the count tables whose case's name contains `pattern`."""
    wanted = pattern or ""
    for case in list_cases():
        whole = case.mode == "train" and case.name.split("/")[0] in ("train", "mixtral")
        if wanted in case.name and (whole or (wanted and case.name == "toy/train")):
            yield from against_rivals(case)
            problem.forget_weights()
    if wanted in "length":
        yield from check_memory_growth()
    if wanted in "cut/":
        yield from check_granularity()
