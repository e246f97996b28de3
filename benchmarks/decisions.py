"""What the results of a first hour decide: the default implementations, and which kernels can be deleted.

All of it is a function of the stored results. Nothing is decided about anything that was not measured: the verdict
names it, with the reason.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from math import inf
from typing import Any

from benchmarks.case_results import (
    MAX_TIED_RATIO,
    CaseResults,
    Found,
    collect_cases,
    geometric_mean,
    join_reasons,
    list_failures,
)
from benchmarks.gpu_cases import GPUCase
from benchmarks.gpu_contestants import (
    IMPLEMENTATIONS,
    OWN,
    OWN_WITH_ROUTER_KERNELS,
    RIVALS,
    WITH_ROUTER_KERNELS,
)
from benchmarks.nvidia_smi import CONSTANT
from benchmarks.schedule_decisions import choose_schedule
from benchmarks.tasks import find_failure, run_task
from mixture_of_experts.ops.triton.schedule import Schedule

DEFAULT, TRITON = "layer", "layer, triton"
OURS = (*OWN, *OWN_WITH_ROUTER_KERNELS)


def lines(found: Found, cases: Sequence[GPUCase], entries: tuple[Schedule, ...]) -> Iterator[str]:
    """Yield the decisions as Markdown.

    Args:
        found: results by piece, and by the names of tasks.
        cases: all cases of the comparison.
        entries: entries of the schedule for this GPU.
    """
    results = collect_cases(found, cases)
    for title, part in (
        ("Faults", partial(list_faults, found, results)),
        ("The fastest of each case", partial(list_winners, results)),
        ("Default implementations: `DEFAULT_FAMILIES`, `DECODING_FAMILIES`", partial(choose_defaults, results)),
        ("Kernels of routers and queues: `ROUTER_FAMILIES`", partial(judge_router_kernels, results)),
        ("Decoding as a CUDA graph: `triton` ÷ the fastest other implementation", partial(judge_decoding, found)),
        ("`ops/triton/schedule.py`", partial(choose_schedule, found, entries)),
        ("Kernels to delete, unless they win on another GPU", partial(list_losers, found, results)),
    ):
        written = run_task(lambda part=part: list(part()))  # an error in one section must not suppress the others
        written = [f"This section failed: {failure[1]}"] if (failure := find_failure(written)) else written
        yield from ["", f"## {title}", "", *(written or ["Nothing was measured."])]


def list_faults(found: Found, cases: list[CaseResults]) -> Iterator[str]:
    """Yield kernels and contestants that are wrong, and tasks that failed. A contestant that cannot run in this
    environment is not a fault."""
    verdicts = [
        (piece, name, said)
        for piece, results in found.items()
        for name, said in (results.items() if piece.startswith("checks/") else ())
        if name != "programs" and not find_failure(said)
    ]
    passed = sum(said == "right" for *_, said in verdicts)
    yield f"{passed} of {len(verdicts)} checks of kernels passed." if verdicts else "No kernels were checked."
    yield from (f"- {piece}, {name}: {said}" for piece, name, said in verdicts if said != "right")
    for piece, results in found.items():
        if isinstance(programs := results.get("programs"), list):
            yield from (f"- {piece}: a program does not compile: {reason}" for reason in programs)
    for piece, name, status, reason in list_failures(found):
        if status != "missing":
            yield f"- {piece}, {name}: {'wrong' if status == 'wrong' else 'failed'}: {reason}"
    for case in cases:
        for name in (name for name in case.contestants if name in case.results):
            reason = case.unmeasured_reason(name)
            if reason and not find_failure(case.results[name]):
                yield f"- cases/{case.name}, {name}: {reason}"
    states = [state for case in cases for name in case.measured for state in case.results[name]["state"]]
    for setting in CONSTANT:
        if len(values := {state[setting] for state in states if setting in state}) > 1:
            yield f"- {setting} changed between contestants: {', '.join(sorted(values))}"


def list_winners(cases: list[CaseResults]) -> Iterator[str]:
    """Yield a table with the time of the layer, and the fastest of our implementations and of the rivals."""
    ran = [case for case in cases if case.results]
    if not ran:
        return
    yield "| case | judged by | `layer`, ms | the fastest of ours | the fastest rival | `layer` ÷ rival |"
    yield "|---|---|---:|---|---|---:|"
    for case in ran:
        own, ours, rival = (case.find_fastest(names) for names in ((DEFAULT,), OURS, RIVALS))
        ratio = f"{case.time(own).median / case.time(rival).median:.2f}" if own and rival else "not measured"
        cells = (format_time(case, own), *(f"{format_time(case, name)} {name or ''}".strip() for name in (ours, rival)))
        judged = "GPU" if case.case.is_graph else "GPU or host"
        yield f"| {case.name} | {judged} | {' | '.join(cells)} | {ratio} |"
    yield ""
    for case in ran:
        if missing := case.describe_unmeasured((*OURS, *RIVALS)):
            yield f"- {case.name}: not measured: {missing}"


def format_time(case: CaseResults, name: str | None) -> str:
    """Return the median and the quartiles of a contestant in milliseconds."""
    if name is None:
        return "not measured"
    q1, median, q3 = (1e3 * seconds for seconds in case.time(name))
    return f"{median:.3g} ({q1:.3g}–{q3:.3g})"


# ---- defaults ----


def group_cases(cases: list[CaseResults]) -> dict[str, list[CaseResults]]:
    """Return the cases that share the choice of a default implementation."""
    groups = defaultdict(list)
    for case in cases:
        groups[case.case.group].append(case)
    return groups


def choose_defaults(cases: list[CaseResults]) -> Iterator[str]:
    """Yield whether another implementation should be the default, for each group of cases."""
    for group, members in group_cases(cases).items():
        if not any(case.results for case in members):
            yield f"- {group}: not measured (it was not run)"
            continue
        unmeasured = {
            name: join_reasons({case.name: reason for case in members if (reason := case.unmeasured_reason(name))})
            for name in OWN
        }
        undecided = "".join(
            f"\n  - not decided for `{name}`: not measured in {where}{compare_measured(members, name)}"
            for name, where in unmeasured.items()
            if where and name != DEFAULT
        )
        if where := unmeasured[DEFAULT]:
            yield f"- {group}: not decided: `{DEFAULT}` was not measured in {where}{undecided}"
        else:
            names = [name for name, where in unmeasured.items() if not where]
            yield f"- {group}: {compare_with_default(members, names)}{undecided}"


def compute_cost(cases: list[CaseResults], name: str) -> float:
    """Return the mean time of a contestant over cases, relative to that of the layer."""
    return geometric_mean(case.time(name).median / case.time(DEFAULT).median for case in cases)


def compare_measured(cases: list[CaseResults], name: str) -> str:
    """Return the time of a contestant in those of the cases in which it was measured."""
    both = [case for case in cases if name in case.measured and DEFAULT in case.measured]
    return f"; elsewhere {compute_cost(both, name):.2f}x the time of `{DEFAULT}`" if both else ""


def compare_with_default(cases: list[CaseResults], names: list[str]) -> str:
    """Return the verdict on the default among contestants that were measured in all of these cases."""
    costs = {name: compute_cost(cases, name) for name in names}
    best = min(costs, key=costs.__getitem__)
    # the slower quartile of one and the faster quartile of the other
    pessimistic = geometric_mean(case.time(best).q3 / case.time(DEFAULT).q1 for case in cases)
    verdict = "the default stays"
    if costs[best] * MAX_TIED_RATIO < 1:
        verdict = (
            f"**make `{best}` the default**" if pessimistic < 1 else f"{verdict}: times vary more than they differ"
        )
    described = ", ".join(f"`{name}` {cost:.2f}" for name, cost in costs.items())
    return f"{verdict} (time ÷ that of `{DEFAULT}`, mean over {len(cases)} cases: {described})"


def judge_router_kernels(cases: list[CaseResults]) -> Iterator[str]:
    """Yield the times with the kernels of routers and queues, relative to those with torch's operators, for the same
    implementation of experts."""
    for group, members in group_cases([case for case in cases if case.results]).items():
        for name in OWN:
            kernels, ratios, unmeasured = f"{name}{WITH_ROUTER_KERNELS}", [], []
            for case in (case for case in members if kernels in case.contestants):
                if missing := case.describe_unmeasured((name, kernels)):
                    unmeasured.append(f"{case.name}: {missing}")
                else:
                    ratios.append(case.time(kernels).median / case.time(name).median)
            if unmeasured:
                yield f"- {group}, `{name}`: not decided: not measured in {'; '.join(unmeasured)}"
            elif ratios:
                ratio = geometric_mean(ratios)
                verdict = "**faster**" if ratio * MAX_TIED_RATIO < 1 else "not faster"
                yield f"- {group}, `{name}`: {verdict}: {ratio:.2f}x the time without them in {len(ratios)} cases"


def judge_decoding(found: Found) -> Iterator[str]:
    """Yield the ratios of a decoding step as a graph, and up to which number of rows Triton wins."""
    ratios: list[tuple[float, float]] = []
    for piece, results in found.items():
        described = []
        for name in results if piece.startswith("decoding/") else ():
            tokens, _, implementation = name.partition(", ")
            if implementation != "triton":
                continue
            rows = {other: results.get(f"{tokens}, {other}", {"ended": "it was not run"}) for other in IMPLEMENTATIONS}
            reasons = {other: failure[1] for other, row in rows.items() if (failure := find_failure(row))}
            missing = "".join(f", {other} was not measured ({reason})" for other, reason in reasons.items())
            others = [row["graph"] for other, row in rows.items() if other not in ("triton", *reasons)]
            if "triton" not in reasons and others:
                ratios.append((rows["triton"]["rows"], rows["triton"]["graph"] / min(others)))
            decided = "triton" not in reasons and others
            described.append(f"{tokens} {f'{ratios[-1][1]:.2f}' if decided else 'not decided'}{missing}")
        if described:
            yield f"- {piece.removeprefix('decoding/')}: {'; '.join(described)}"
    if ratios:
        loses = min((rows for rows, ratio in ratios if ratio > MAX_TIED_RATIO), default=inf)
        wins = max((rows for rows, _ in ratios if rows < loses), default=0)
        yield f"- `triton` wins up to {wins:g} rows per expert, see `MAX_LOW_MEAN_ROWS` and `DECODING_FAMILIES`"


# ---- kernels to delete ----


def list_losers(found: Found, cases: list[CaseResults]) -> Iterator[str]:
    """Yield the verdicts on each kernel of gates and queues, and on those of experts."""
    yield from judge_small_kernels(found)
    if any(case.results for case in cases):
        yield f"- The kernels of experts (`kernels/ffn.py`): {judge_expert_kernels(cases)}"


def judge_small_kernels(found: Found) -> Iterator[str]:
    """Yield the verdict on each kernel of gates and queues, from its times and those of torch's operators."""
    by_kernel: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, result in found.get("small kernels", {}).items():
        kernel, _, size = name.partition(": ")
        by_kernel[kernel][size] = result
    for kernel, results in by_kernel.items():
        failures = {size: failure[1] for size, result in results.items() if (failure := find_failure(result))}
        ratios = {
            size: tuple(pair[who + "kernels"] / pair[who + "operators"] for who in ("", "host of "))
            for size, pair in results.items()
            if size not in failures
        }
        wins = [any(ratio[i] * MAX_TIED_RATIO < 1 for ratio in ratios.values()) for i in (0, 1)]
        verdict = "stays" if wins[0] else "**can go, unless launches matter**" if wins[1] else "**can go**"
        if failures and not wins[0]:
            verdict = "is not decided"
        described = ", ".join(f"{size} {card:.2f}, host {host:.2f}" for size, (card, host) in ratios.items())
        missing = "".join(f"; {size} was not measured ({reason})" for size, reason in failures.items())
        yield f"- `{kernel}` {verdict}. Its time ÷ that without it: {described or 'none'}{missing}"


def judge_expert_kernels(cases: list[CaseResults]) -> str:
    """Return whether the kernels of experts can be deleted: only if they were measured in all cases, and lost."""
    wins: dict[str, list[str]] = {"train": [], "inference": []}
    undecided: dict[str, dict[str, str]] = {"train": {}, "inference": {}}
    others = [f"layer, {name}" for name in IMPLEMENTATIONS if name != "triton"]
    for case in cases:
        kind = "train" if case.case.mode == "train" else "inference"
        best, reason = case.find_fastest(others), case.unmeasured_reason(TRITON)
        if reason is None and best is None:
            reason = f"no other implementation: {case.describe_unmeasured(others)}"
        if reason is not None or best is None:
            undecided[kind][case.name] = str(reason)
        elif case.time(TRITON).median <= MAX_TIED_RATIO * case.time(best).median:
            wins[kind].append(case.name)
    missing = {kind: f"not measured in {join_reasons(where)}" for kind, where in undecided.items() if where}
    if wins["train"]:
        verdict = "they stay"
    elif "train" in missing:
        verdict = f"not decided: {missing['train']}"
    elif wins["inference"]:
        verdict = "**those of the backward can go**"
    else:
        verdict = f"not decided: {missing['inference']}" if "inference" in missing else "**they can go**"
    fastest = ", ".join(itertools.chain.from_iterable(wins.values()))
    return f"{verdict}. Cases in which they are the fastest: {fastest or 'none'}"
