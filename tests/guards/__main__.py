from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from . import BASE, __doc__, bits, counts
from .sides import Sides, sides


def guard_bits(both: Sides, given: argparse.Namespace) -> str | None:
    return bits.compare(both, given.examples)


def guard_ranks(both: Sides, given: argparse.Namespace) -> str | None:
    before, now = both.ask("ranks.digests")
    print(f"ranks: {len(before)} layers and layouts, {sum(map(len, before.values())):,} tensors")
    if gone := before.keys() - now.keys():
        print(f"ranks: only there are {', '.join(sorted(gone))}")
    for name in before.keys() & now.keys():
        if changed := bits.differences(before[name], now[name]):
            return f"{', '.join(changed)} differ in {name}"
    return None


def guard_counts(both: Sides, given: argparse.Namespace) -> str | None:
    rose = []
    for function in ("of_calls", "graphs", "launches"):
        rose += counts.compare(*both.ask(f"counts.{function}"))
    return "\n    ".join(["rose:", *rose]) if rose else None


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
