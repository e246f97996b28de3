"""The long run of the matrix: random configurations against the slow reference, as many as one likes.

    python -m tests.support.matrix --configurations 100000 --kind eager
    python -m tests.support.matrix --configurations 1000 --kind compiled
    python -m tests.support.matrix --configurations 1000 --kind exported
    python -m tests.support.matrix --summary

A line of the results, JSON, is a seed from which hypothesis drew so many configurations: what they came to, how often
each value of each axis was among them, and every mismatch as it is to be run again (`--configuration "..."`). What has
a line is not run again, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture.engine import ConjectureRunner

from . import configurations as matrix
from .configurations import Bank, Configuration, Router


def independent_examples() -> contextlib.AbstractContextManager:
    """Have hypothesis draw every configuration anew, not five like each other: the search for what goes wrong together
    is not the point where nothing goes wrong."""
    return mock.patch.object(ConjectureRunner, "generate_mutations_from")


def seed_examples(number: int, examples: int, *more: Phase) -> Callable[[Any], Any]:
    """Have hypothesis call a function with so many examples of this seed, whatever the tests' profile says."""
    run = settings(
        max_examples=examples,
        phases=[Phase.generate, *more],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    return lambda function: seed(number)(run(function))


KINDS = {"eager": 100, "compiled": 10, "exported": 10}  # configurations of one seed
RESULTS = Path("matrix.jsonl")


def run_seed(kind: str, number: int, count: int) -> dict[str, Any]:
    """A line of the results: `count` configurations of one seed."""
    found: collections.Counter = collections.Counter()
    axes: collections.Counter = collections.Counter()
    mismatches, seen, start = [], set(), time.perf_counter()

    @seed_examples(number, count)
    @given(matrix.configurations((kind,)))
    def run(c: Configuration) -> None:
        if repr(c) in seen:
            return
        seen.add(repr(c))
        try:
            outcome = matrix.check_configuration(c)
        except Exception as error:  # a mismatch, or a crash of either side
            outcome = "mismatch"
            mismatches.append({"configuration": repr(c), "error": f"{type(error).__name__}: {error}"[:500]})
        found[outcome] += 1
        axes.update(c.axes())

    with independent_examples():
        run()
    return {
        "kind": kind,
        "seed": number,
        "configurations": len(seen),
        **found,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "mismatches": mismatches,
        "axes": dict(axes),
    }


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: the last one may not be, of a run that was killed."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            yield json.loads(line)


def run_all_seeds(kind: str, configurations: int, path: Path, number: int = 0) -> None:
    """Seeds from `number` on, until there are so many configurations of this kind."""
    if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")  # a line that a killed run did not end
    lines = [line for line in read_lines(path) if line["kind"] == kind]
    done, total = {line["seed"] for line in lines}, sum(line["configurations"] for line in lines)
    while total < configurations:
        if number not in done:
            line = run_seed(kind, number, min(KINDS[kind], configurations - total))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            total += line["configurations"]
            print(f"{kind}, seed {number}: {total} configurations, {line.get('mismatch', 0)} mismatches", flush=True)
        number += 1
    if lines:
        print(f"{kind}: {sum(line['configurations'] for line in lines)} configurations were in {path} before")


def print_summary(paths: list[Path]) -> None:
    """What is in the results, in Markdown."""
    kinds: dict[str, collections.Counter] = {}
    axes: collections.Counter = collections.Counter()
    for line in (line for path in paths for line in read_lines(path)):
        totals = kinds.setdefault(line["kind"], collections.Counter())
        totals.update({name: line.get(name, 0) for name in ("configurations", *OUTCOMES)}, seeds=1)
        axes.update(line["axes"])
        for mismatch in line["mismatches"]:
            print(f"{line['kind']}, seed {line['seed']}: {mismatch['error']}\n    {mismatch['configuration']}")
    names = ("configurations", "seeds", *OUTCOMES)
    print("|  | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", sep="\n")
    for kind, totals in kinds.items():
        print(f"| {kind} | " + " | ".join(f"{totals[name]:,}" for name in names) + " |")
    print("\n" + "\n".join(f"{count:8,}  {name}" for name, count in sorted(axes.items())))


OUTCOMES = ("equal", "refused", "redrawn", "mismatch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="eager")
    parser.add_argument("--configurations", type=int, default=0, help="how many of this kind there are to be in all")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="others for a run beside this one, with its own results"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[RESULTS],
        help="the results, which a run goes on with; several to sum",
    )
    parser.add_argument("--configuration", help="run this one: what the results show of a mismatch")
    parser.add_argument("--summary", action="store_true", help="print what is in the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.configuration:
        names = {"Configuration": Configuration, "Router": Router, "Bank": Bank}
        print(matrix.check_configuration(eval(given.configuration, names)))
    if given.configurations:
        run_all_seeds(given.kind, given.configurations, given.results[0], given.first_seed)
    if given.summary:
        print_summary(given.results)


if __name__ == "__main__":
    main()
