from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from . import BASE, __doc__, bits, counts
from .outcomes import Outcomes, Uncomputed
from .sides import Sides, sides


def guard_bits(both: Sides, given: argparse.Namespace) -> str | None:
    return bits.compare(both, given.examples)


def guard_ranks(both: Sides, given: argparse.Namespace) -> str | None:
    outcomes = Outcomes()
    before, now = both.ask("ranks.digests")
    if isinstance(before, Uncomputed):
        outcomes.leave_out("all layers and layouts", before)
        before = {}
    if gone := before.keys() - now.keys():
        print(f"ranks: only there are {', '.join(sorted(gone))}")
    differ = {name: outcomes.compare(name, before[name], now[name]) for name in before.keys() & now.keys()}
    empty = outcomes.report("ranks")
    return next((f"{', '.join(changed)} differ in {name}" for name, changed in differ.items() if changed), empty)


def guard_counts(both: Sides, given: argparse.Namespace) -> str | None:
    wrong = [line for kind in counts.KINDS for line in counts.guard(kind, both)]
    return "\n    ".join(["rose, or could not be counted:", *wrong]) if wrong else None


GUARDS: dict[str, Callable[[Sides, argparse.Namespace], str | None]] = {
    "bits": guard_bits,
    "ranks": guard_ranks,
    "counts": guard_counts,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guards", nargs="*", metavar="GUARD", help=f"{', '.join(GUARDS)}; all of them by default")
    parser.add_argument("--against", default=BASE, metavar="COMMIT", help="the earlier commit, %(default)s by default")
    parser.add_argument(
        "--examples", type=int, default=1500, help="situations that `bits` draws, %(default)s by default"
    )
    given, failed = parser.parse_args(), []
    if unknown := set(given.guards) - set(GUARDS):
        parser.error(f"no guard {', '.join(sorted(unknown))}: there are {', '.join(GUARDS)}")
    for name in given.guards or GUARDS:
        start = time.perf_counter()
        with sides(given.against) as both:
            found = GUARDS[name](both, given)
        print(f"{name}: {found or 'equal'} ({time.perf_counter() - start:.0f} s)", flush=True)
        failed += [name] if found else []
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
