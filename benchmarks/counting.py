"""`--count`: the tables of figures without noise, each a ratio with its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks import problem, timing
from benchmarks.cases import Case, every_case
from benchmarks.contest import Contestant
from benchmarks.counts import flops, kept_bytes, peak_bytes
from benchmarks.field import enter

ROUNDS_FOR_FAULTS = 5
Measure = Callable[[Contestant], float]


def row(what: str, case: str, over: float, under: float, unit: str, limit: float | None, note: str) -> dict:
    value = over / under
    met = None if limit is None else value <= limit
    numbers = {"over": over, "under": under, "unit": unit, "value": value, "limit": limit, "met": met}
    return {"what": what, "case": case, "note": note} | numbers


def compare(case: Case, what: str, unit: str, measure: Measure, rival: str, limit: float | None) -> list[dict]:
    """The layer's count over a rival's; empty where the rival is missing."""
    present, _ = enter(replace(case, figures=(), extras=("layer", rival)))
    if len(present) < 2:
        return []
    over, under = (measure(present[name]) for name in ("layer", rival))
    return [row(what, case.name, over, under, unit, limit, f"layer ÷ {rival}")]


def against_rivals(case: Case) -> Iterator[dict]:
    """One case's counts."""
    yield from compare(case, "FLOPs", "FLOP", flops, "router + products", 1.0)
    yield from compare(case, "bytes kept for backward", "B", kept_bytes, "dense", 1.10)
    yield from compare(case, "peak memory", "B", peak_bytes, "products", None)
    yield from compare(case, "peak memory", "B", peak_bytes, "0.2.3", 0.15 if case.n == 8192 else None)
    yield from faults(case)


def faults(case: Case) -> Iterator[dict]:
    """Page faults of a step (median of a few), interleaved as in the timing."""
    present, _ = enter(replace(case, figures=(), extras=("layer", "products", "0.2.3")))
    samples = timing.rounds_of(present, (), ROUNDS_FOR_FAULTS, warmup=2)
    counts = {name: samples[name].summary()["faults"] for name in samples}
    for rival in list(present)[1:]:
        yield row("page faults", case.name, counts["layer"], max(1, counts[rival]), "", None, f"layer ÷ {rival}")


def growth() -> Iterator[dict]:
    """Peak memory is linear in the sequence: 16k to 32k tokens adds at most 2.1 times what 8k to 16k adds."""
    peaks = []
    for n in (8192, 16384, 32768):
        case = Case(f"length/{n}", "train", 1, n, 256, 1024, 64, extras=("layer",))
        peaks.append(peak_bytes(enter(case)[0]["layer"]))
    note = "16k→32k over 8k→16k tokens, d256 e64"
    yield row("peak memory growth", "length", peaks[2] - peaks[1], peaks[1] - peaks[0], "B", 2.1, note)


def granularity() -> Iterator[dict]:
    """Bytes kept as the experts are cut finer at constant k x h and constant e x h."""
    first = {}
    for k, h, e in ((1, 2048, 16), (2, 1024, 32), (4, 512, 64), (8, 256, 128)):
        for factor in (None, 1.25):
            kind = "dropless" if factor is None else "capacity"
            case = Case(f"cut/{kind}-k{k}-h{h}-e{e}", "train", 4, 1024, 256, h, e, k, factor, gated=True)
            kept = kept_bytes(enter(replace(case, extras=("layer",)))[0]["layer"])
            first.setdefault(kind, kept)
            note = "SwiGLU, k x h = 2048, ÷ k = 1"
            yield row("bytes kept for backward", case.name, kept, first[kind], "B", 1.10, note)
            problem.forget_weights()


def count(pattern: str | None) -> Iterator[dict]:
    """Every row of the count tables whose case's name contains `pattern`."""
    wanted = pattern or ""
    for case in every_case():
        whole = case.mode == "train" and case.name.split("/")[0] in ("train", "mixtral")
        if wanted in case.name and (whole or (wanted and case.name == "toy/train")):
            yield from against_rivals(case)
            problem.forget_weights()
    if wanted in "length":
        yield from growth()
    if wanted in "cut/":
        yield from granularity()
