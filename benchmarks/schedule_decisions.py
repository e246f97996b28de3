"""What the times of kernels decide: the sizes of blocks in the schedule, and the costs by which it selects tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import inf, log

from benchmarks.blocks import KERNELS
from benchmarks.case_results import MAX_TIED_RATIO, Found, geometric_mean, list_failures
from benchmarks.tasks import find_failure
from mixture_of_experts.ops.triton.schedule import Schedule, find_schedule

Load = tuple[str, int]  # a shape, and the mean number of rows per expert
Row = dict[str, dict[tuple[int, ...], float]]  # seconds of each kernel with different blocks
Times = dict[tuple[Load, int], Row]  # by load and height of tiles

MAX_SERVED_RATIO = 1.1  # an entry is chosen for the loads on which its height takes at most this times the best time
SEPARATOR = " rows, tiles of "


def collect_times(found: Found) -> Times:
    """Return the times of loads for which every suitable height of tiles was measured. A height without a time has not
    lost, so the other heights of its load cannot be compared either."""
    prefix = "kernels/"
    incomplete = {(piece, name.partition(SEPARATOR)[0]) for piece, name, *_ in list_failures(found, prefix)}
    times: Times = {}
    for piece, results in found.items():
        for name, value in results.items() if piece.startswith(prefix) else ():
            rows, separator, height = name.partition(SEPARATOR)
            if separator and (piece, rows) not in incomplete:
                times[(piece.removeprefix(prefix), int(rows)), int(height)] = {
                    kernel: {tuple(sizes): time for sizes, time in tried if isinstance(time, float)}
                    for kernel, tried in value.items()
                }
    return times


def compute_total(row: Row, entry: Schedule | None = None) -> float:
    """Return the seconds of all kernels with the blocks of an entry, or of each kernel with its best blocks."""
    if entry is None:
        return sum(min(tried.values(), default=inf) for tried in row.values())
    return sum(tried.get(tuple(getattr(entry, kernel)), inf) for kernel, tried in row.items())


def choose_blocks(entry: Schedule, times: Times) -> Schedule:
    """Return the entry with the best blocks over the loads that its height serves best. Its own blocks are kept if they
    are almost as fast."""
    best, rows = find_best_times(times), {load: row for (load, height), row in times.items() if height == entry.rows}
    served = {load: row for load, row in rows.items() if compute_total(row) <= MAX_SERVED_RATIO * best[load]}
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
    """Return the shortest time of each load, over all heights and blocks."""
    return {load: min(compute_total(row) for (of, _), row in times.items() if of == load) for load, _ in times}


def compute_regret(times: Times, best: dict[Load, float], load: Load, table: tuple[Schedule, ...]) -> float:
    """Return the time with a table, relative to the best one, or infinity if the height that it selects is unsuitable
    for the load."""
    entry = find_schedule(table, load[1])
    row = times.get((load, entry.rows))
    return inf if row is None else compute_total(row, entry) / best[load]


def fit_costs(entries: tuple[Schedule, ...], times: Times) -> tuple[Schedule, ...]:
    """Return the entries with costs that select the best heights over all loads; among equally good costs, with those
    nearest to the present ones."""
    best = find_best_times(times)

    def with_costs(costs: tuple[float, ...]) -> tuple[Schedule, ...]:
        return tuple(entry._replace(cost=cost) for entry, cost in zip(entries, (*costs, 1.0), strict=True))

    def rate(costs: tuple[float, ...]) -> tuple[float, float]:
        distance = sum(abs(log(cost / entry.cost)) for cost, entry in zip(costs, entries, strict=False))
        table = with_costs(costs)
        return round(sum(log(compute_regret(times, best, load, table)) for load in best), 4), distance

    grid = [[entry.cost, *(round(1.12**i, 2) for i in range(18))] for entry in entries[:-1]]
    falling = (costs for costs in itertools.product(*grid) if list(costs) == sorted(costs, reverse=True))
    return with_costs(min(falling, key=rate))


def choose_schedule(found: Found, entries: tuple[Schedule, ...]) -> Iterator[str]:
    """Yield the entries to paste into the schedule, and what they gain."""
    for piece, name, _, reason in list_failures(found, "kernels/"):
        if SEPARATOR in name:
            yield f"- {piece.removeprefix('kernels/')}, {name}: not measured ({reason}), so this load does not count"
    if not (times := collect_times(found)):
        return
    chosen = fit_costs(tuple(choose_blocks(entry, times) for entry in entries), times)
    yield "\n".join(["\nOne choice for all shapes, with fitted costs:", "", "```python"])
    yield "\n".join([*(f"{entry}," for entry in chosen), "```", ""])
    for old, new in zip(entries, chosen, strict=True):
        for kernel in (kernel for kernel in KERNELS if getattr(old, kernel) != getattr(new, kernel)):
            yield describe_change(times, old, new, kernel)
    yield from describe_regrets(times, entries, chosen)
    low = max((rows for _, rows in find_best_times(times) if find_schedule(chosen, rows).rows <= 32), default=0)
    yield f"\n- `MAX_LOW_MEAN_ROWS`: tiles have up to 32 rows for experts with up to {low} rows"
    yield describe_comparison(found)


def describe_change(times: Times, old: Schedule, new: Schedule, kernel: str) -> str:
    """Return how the time of a kernel changes with the chosen blocks, for each shape."""
    rows = {load: row.get(kernel, {}) for (load, height), row in times.items() if height == old.rows}
    before, after = (tuple(getattr(entry, kernel)) for entry in (old, new))
    ratios = {load: of[after] / of[before] for load, of in rows.items() if before in of}
    by_shape = {shape: geometric_mean(r for (of, _), r in ratios.items() if of == shape) for shape, _ in ratios}
    described = ", ".join(f"{shape} {ratio:.2f}" for shape, ratio in by_shape.items())
    return f"- tiles of {old.rows}, {kernel}: {after} ÷ {before}: {described or 'the latter do not run'}"


def describe_regrets(times: Times, entries: tuple[Schedule, ...], chosen: tuple[Schedule, ...]) -> Iterator[str]:
    """Yield a table of the times with the present and the chosen entries, relative to the best."""
    best, shapes = find_best_times(times), list({shape: None for (shape, _), _ in times})
    yield "\nTime ÷ the best, with the present and the chosen entries:\n"
    yield "| rows per expert | tiles | " + " | ".join(shapes) + " |\n|---:|---|" + "---:|" * len(shapes)
    for rows in sorted({rows for _, rows in best}):
        cells = [
            ", ".join(f"{compute_regret(times, best, (shape, rows), table):.2f}" for table in (entries, chosen))
            if (shape, rows) in best
            else ""
            for shape in shapes
        ]
        heights = [find_schedule(table, rows).rows for table in (entries, chosen)]
        yield f"| {rows} | {heights[0]}, {heights[1]} | " + " | ".join(cells) + " |"


def describe_comparison(found: Found) -> str:
    """Return up to how many assignments a permutation by comparison is faster than one by queues."""
    pairs = {
        int(name.split()[1]): pair
        for name, pair in found.get("small kernels", {}).items()
        if "rank_rows_kernel" in name and not find_failure(pair)
    }
    if not pairs:
        return "- `MAX_COMPARED_ASSIGNMENTS` was not measured"
    loses = min((number for number, pair in pairs.items() if pair["kernels"] > pair["operators"]), default=inf)
    wins = max((number for number in pairs if number < loses), default=0)
    return f"- `MAX_COMPARED_ASSIGNMENTS`: permutations by comparison win for up to {wins} assignments"
