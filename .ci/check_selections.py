"""Shows that no test falls between the runs: what pytest collects by default, what is slow and what is exhaustive are
all that it collects without a mark, each test once; and that the order is the same in every process, which pytest-xdist
requires. `check_selections.py [FILE ...]`, with the tests' Python.
"""

import os
import subprocess
import sys
from collections import Counter

RUNS = {"default": [], "slow": ["-m", "slow and not exhaustive"], "exhaustive": ["-m", "exhaustive"]}


def start(seed: int, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", *arguments]
    command += sys.argv[1:]
    hashes = {"PYTHONHASHSEED": str(seed)}  # by which the order of sets differs between processes
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **hashes})


def collected(process: subprocess.Popen[str]) -> list[str]:
    """The node ids that the process prints."""
    printed = process.communicate()[0]
    if process.returncode not in (0, 5):  # 5: none
        raise SystemExit(printed)
    return [line for line in printed.splitlines() if "::" in line]


processes = {name: start(seed, arguments) for seed, (name, arguments) in enumerate({**RUNS, "all": ["-m", ""]}.items())}
tests = {name: collected(process) for name, process in processes.items()}
everything = tests.pop("all")
times = Counter(test for some in tests.values() for test in some)
known = set(everything)
wrong = sorted(test for test in {*everything, *times} if times[test] != 1 or test not in known)
for test in wrong:
    print(f"in {times[test]} of the runs {', '.join(RUNS)}: {test}", file=sys.stderr)
for some in tests.values():
    chosen = set(some)
    for found, wanted in zip(some, (test for test in everything if test in chosen), strict=False):
        if found != wanted:
            wrong.append(found)
            print(f"the order of tests is another in the next process: {found} or {wanted}", file=sys.stderr)
            break
print(", ".join(f"{len(some)} {name}" for name, some in tests.items()), f"of {len(everything)} tests")
sys.exit(bool(wrong))
