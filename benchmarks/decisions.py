"""What the results of a first hour decide: sizes of blocks and costs of the schedule, ways by default, what to delete.

All of it is a function of the results alone: a dry run with made-up times shows the decision that follows.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from math import exp, inf, log
from typing import Any

from benchmarks.blocks import KERNELS
from benchmarks.gpu import IMPLEMENTATIONS, MODES, RIVALS
from benchmarks.results_file import run_task
from mixture_of_experts.ops.triton.schedule import Schedule, find_schedule

Found = dict[str, dict[str, Any]]  # results by piece, and by name
Load = tuple[str, int]  # a shape, and the mean rows of an expert
Row = dict[str, dict[tuple[int, ...], float]]  # of each kernel, seconds with some sizes of blocks
Times = dict[tuple[Load, int], Row]  # by load and height of tiles

MAX_TIED_RATIO = 1.03  # times that differ by less are equal
MAX_SERVED_RATIO = 1.1  # a height serves the loads on which it takes at most so much longer than the best
OURS = ("layer", *(f"layer, {way}" for way in IMPLEMENTATIONS))


def geometric_mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [log(ratio) for ratio in ratios]
    return exp(sum(logs) / len(logs)) if logs else inf


def results_of(found: Found, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """What pieces behind the prefix are called, and name and value of each result that is there."""
    for piece, results in found.items():
        for name, value in results.items() if piece.startswith(prefix) else ():
            if not (isinstance(value, dict) and "ended" in value):
                yield piece.removeprefix(prefix), name, value


def lines(found: Found, entries: tuple[Schedule, ...]) -> Iterator[str]:
    """The decisions, in Markdown. `entries` are the schedule's for this card."""
    for title, part in (
        ("What is wrong", partial(list_faults, found)),
        ("Who wins: time on the card ÷ the fastest", partial(list_winners, found)),
        ("Decoding as a graph: `triton` ÷ the fastest other way", partial(decoding, found)),
        ("`ops/triton/schedule.py`", partial(tables, found, entries)),
        ("What loses, and is to be deleted unless it wins on another card", partial(list_losers, found)),
    ):
        told = run_task(lambda part=part: list(part()))  # a report is written whatever there is
        told = [str(told)] if isinstance(told, dict) else told
        yield from ["", f"## {title}", "", *(told or ["Nothing was measured."])]


def list_faults(found: Found) -> Iterator[str]:
    """Kernels and contestants that are wrong, and what ended."""
    checks = [(name, said) for _, name, said in results_of(found, "checks/") if isinstance(said, str)]
    yield f"{sum(said == 'right' for _, said in checks)} of {len(checks)} checks of kernels are right."
    yield from (f"- {name}: {said}" for name, said in checks if said != "right")
    for piece, _, record in results_of(found, "cases/"):
        yield from (
            f"- {piece}: {name} is {said}" for name, said in record["missing"].items() if "BAD_ARGUMENTS" in said
        )
    for piece, results in found.items():
        ended = {
            name: value["ended"] for name, value in results.items() if isinstance(value, dict) and "ended" in value
        }
        yield from (f"- {piece}, {name}: ended {said}" for name, said in ended.items())


def list_winners(found: Found) -> Iterator[str]:
    """The layer by each way, rivals, and the products alone; then the way that is the fastest over all shapes."""
    names, lost, missing = (*OURS, *RIVALS, "products"), defaultdict(lambda: defaultdict(list)), {}
    if not any(results_of(found, "cases/")):
        return
    yield "| | " + " | ".join(names) + " | fastest |\n|---|" + "---:|" * len(names) + "---|"
    for piece, _, record in results_of(found, "cases/"):
        missing |= record["missing"]
        times = {name: (row["median_s"], row["host_s"]) for name, row in record["contestants"].items()}
        best = min((name for name in times if name != "products"), key=times.__getitem__, default="")
        told = {
            n: f"{card / times[best][0]:.2f} ({1e3 * card:.3g}, {1e3 * host:.3g})" for n, (card, host) in times.items()
        }
        yield f"| {piece} | " + " | ".join(told.get(name, "") for name in names) + f" | {best} |"
        ours = {name: times[name][0] for name in OURS if name in times}
        for name, time in ours.items():
            lost[record["mode"]][name].append(time / min(ours.values()))
    yield "\nIn brackets milliseconds on the card, and of the host.\n"
    yield from (f"- {name} was missing: {reason}" for name, reason in missing.items())
    for mode, of_mode in lost.items():
        costs = {
            name: geometric_mean(ratios) for name, ratios in of_mode.items() if len(ratios) == len(of_mode["layer"])
        }
        best = min(costs, key=costs.__getitem__)
        stays = costs["layer"] <= MAX_TIED_RATIO * costs[best]
        told = ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
        verdict = "what is taken by default stays" if stays else f"**take {best} by default**"
        yield f"- {mode}: {verdict} ({told}). `BY_DEFAULT` and `DECODING_FAMILIES` of `ops/triton` say what is."


def decoding(found: Found) -> Iterator[str]:
    ratios = []
    for shape, results in itertools.groupby(results_of(found, "decoding/"), key=lambda result: result[0]):
        rows = {name: value for _, name, value in results}
        for name, row in ((name, row) for name, row in rows.items() if name.endswith("triton")):
            others = [rows[other]["graph"] for way in IMPLEMENTATIONS if (other := name.replace("triton", way)) in rows]
            ratios.append((shape, name, row["rows"], row["graph"] / min(others[1:], default=inf)))
        yield f"- {shape}: " + ", ".join(f"{name} {ratio:.2f}" for of, name, _, ratio in ratios if of == shape)
    if not ratios:
        return
    loses = min((rows for *_, rows, ratio in ratios if ratio > MAX_TIED_RATIO), default=inf)
    wins = max((rows for *_, rows, _ in ratios if rows < loses), default=0)
    yield f"- it wins for experts of up to {wins:g} rows: what `LOW` and `DECODING_FAMILIES` may send to it"


# ---- the schedule ----


def collect_times(found: Found) -> Times:
    times: Times = {}
    for shape, name, value in results_of(found, "kernels/"):
        if " rows, tiles of " in name:
            rows, height = map(int, name.split(" rows, tiles of "))
            times[(shape, rows), height] = {
                kernel: {tuple(sizes): time for sizes, time in tried if isinstance(time, float)}
                for kernel, tried in value.items()
            }
    return times


def total(row: Row, entry: Schedule | None = None) -> float:
    """Seconds of all kernels with the blocks of an entry, or of each with its best ones."""
    if entry is None:
        return sum(min(tried.values(), default=inf) for tried in row.values())
    return sum(tried.get(tuple(getattr(entry, kernel)), inf) for kernel, tried in row.items())


def choose_blocks(entry: Schedule, times: Times) -> Schedule:
    """The entry with the blocks that are the best over the loads on which its height is, or its own where these are
    close."""
    best, rows = find_best_times(times), {load: row for (load, height), row in times.items() if height == entry.rows}
    served = {load: row for load, row in rows.items() if total(row) <= MAX_SERVED_RATIO * best[load]}
    for kernel in KERNELS:
        tried = [row[kernel] for row in served.values() if row.get(kernel)]
        tried = tried or [row[kernel] for row in rows.values() if row.get(kernel)]
        everywhere = set.intersection(*map(set, tried)) if tried else set()
        ratios = {sizes: geometric_mean(of[sizes] / min(of.values()) for of in tried) for sizes in everywhere}
        own, fastest = getattr(entry, kernel), min(ratios, key=ratios.__getitem__, default=())
        if fastest and ratios.get(tuple(own), inf) > MAX_TIED_RATIO * ratios[fastest]:
            entry = entry._replace(**{kernel: type(own)(*fastest)})
    return entry


def find_best_times(times: Times) -> dict[Load, float]:
    """Of each load the least seconds, by any height and blocks."""
    return {load: min(total(row) for (of, _), row in times.items() if of == load) for load, _ in times}


def compute_regret(times: Times, best: dict[Load, float], load: Load, table: tuple[Schedule, ...]) -> float:
    """Time by a table ÷ the best; infinite, if the height that it takes was not timed."""
    entry = find_schedule(table, load[1])
    row = times.get((load, entry.rows))
    return inf if row is None else total(row, entry) / best[load]


def fit_costs(entries: tuple[Schedule, ...], times: Times) -> tuple[Schedule, ...]:
    """The entries with the costs by which heights are chosen best over all loads; of equally good ones the nearest."""
    best = find_best_times(times)

    def with_costs(costs: tuple[float, ...]) -> tuple[Schedule, ...]:
        return tuple(entry._replace(cost=cost) for entry, cost in zip(entries, (*costs, 1.0), strict=True))

    def worth(costs: tuple[float, ...]) -> tuple[float, float]:
        far, table = sum(abs(log(c / entry.cost)) for c, entry in zip(costs, entries, strict=False)), with_costs(costs)
        return round(sum(log(compute_regret(times, best, load, table)) for load in best), 4), far

    grid = [[entry.cost, *(round(1.12**i, 2) for i in range(18))] for entry in entries[:-1]]
    falling = (costs for costs in itertools.product(*grid) if list(costs) == sorted(costs, reverse=True))
    return with_costs(min(falling, key=worth))


def tables(found: Found, entries: tuple[Schedule, ...]) -> Iterator[str]:
    if not (times := collect_times(found)):
        return
    chosen = fit_costs(tuple(choose_blocks(entry, times) for entry in entries), times)
    yield "\n".join(["One choice for all shapes, and the costs that fit:", "", "```python"])
    yield "\n".join([*(f"{entry}," for entry in chosen), "```", ""])
    for old, new in zip(entries, chosen, strict=True):
        for kernel in (kernel for kernel in KERNELS if getattr(old, kernel) != getattr(new, kernel)):
            rows = {load: row.get(kernel, {}) for (load, height), row in times.items() if height == old.rows}
            before, after = (tuple(getattr(entry, kernel)) for entry in (old, new))
            ratios = {load: of[after] / of[before] for load, of in rows.items() if before in of}
            by_shape = {shape: geometric_mean(r for (of, _), r in ratios.items() if of == shape) for shape, _ in ratios}
            told = (f"{shape} {ratio:.2f}" for shape, ratio in by_shape.items())
            yield f"- tiles of {old.rows}, {kernel}: {after} ÷ {before}: {', '.join(told) or 'which do not run'}"
    best, shapes = find_best_times(times), list({shape: None for (shape, _), _ in times})
    yield "\nTime taken ÷ best, by the table as it is, and as chosen:\n"
    yield "| rows of an expert | tiles | " + " | ".join(shapes) + " |\n|---:|---|" + "---:|" * len(shapes)
    for rows in sorted({rows for _, rows in best}):
        loads = [(shape, rows) if (shape, rows) in best else None for shape in shapes]
        tried = (
            [f"{compute_regret(times, best, load, t):.2f}" for t in (entries, chosen)] if load else [] for load in loads
        )
        heights = [find_schedule(table, rows).rows for table in (entries, chosen)]
        yield f"| {rows} | {heights[0]}, {heights[1]} | " + " | ".join(map(", ".join, tried)) + " |"
    low = max((rows for _, rows in best if find_schedule(chosen, rows).rows <= 32), default=0)
    yield f"\n- `LOW`: tiles have up to 32 rows for experts of up to {low} rows"
    few = [
        (int(name.split()[1]), pair)
        for _, name, pair in results_of(found, "small kernels")
        if "rank_rows_kernel" in name
    ]
    loses = min((number for number, pair in few if pair["kernels"] > pair["operators"]), default=inf)
    wins = max((number for number, _ in few if number < loses), default=0)
    yield f"- `FEW`: plans without queues win for up to {wins} assignments" if few else "- `FEW` was not measured"


# ---- what loses ----


def list_losers(found: Found) -> Iterator[str]:
    """Kernels beside what serves without them, those of the gates first."""
    pairs = defaultdict(dict)
    for _, name, pair in results_of(found, "small kernels"):
        kernel, _, what = name.partition(": ")
        ratios = (pair[who + "kernels"] / pair[who + "operators"] for who in ("", "host of "))
        pairs[kernel][what] = tuple(ratios)
    for kernel, ratios in pairs.items():
        wins = [any(ratio[i] < 1 / MAX_TIED_RATIO for ratio in ratios.values()) for i in (0, 1)]
        verdict = "stays" if wins[0] else "**goes, unless launches matter**" if wins[1] else "**goes**"
        told = ", ".join(f"{what} {card:.2f}, host {host:.2f}" for what, (card, host) in ratios.items())
        yield f"- `{kernel}` {verdict}. Its time ÷ that without it: {told}"
    wins = {mode: [] for mode in MODES}
    timed = [(piece, record) for piece, _, record in results_of(found, "cases/") if OURS[1] in record["contestants"]]
    for piece, record in timed:
        times = {name: row["median_s"] for name, row in record["contestants"].items() if name in OURS[1:]}
        if times[OURS[1]] <= MAX_TIED_RATIO * min(times.values()):
            wins[record["mode"]].append(piece)
    if timed:
        verdict = "stays" if wins["train"] else "**goes but for inference**" if any(wins.values()) else "**goes**"
        told = ", ".join(itertools.chain.from_iterable(wins.values()))
        yield f"- `ffn.py` {verdict}. It is the fastest way in: {told or 'nothing'}"
