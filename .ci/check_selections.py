"""Shows that no test falls between the runs: what pytest collects by default, what is slow and what is exhaustive are
all that it collects without a mark, each test once. `check_selections.py [FILE ...]`, with the tests' Python.
"""

import subprocess
import sys
from collections import Counter

RUNS = {"default": [], "slow": ["-m", "slow and not exhaustive"], "exhaustive": ["-m", "exhaustive"]}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", *arguments]
    command += sys.argv[1:]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def collected(process: subprocess.Popen[str]) -> set[str]:
    """The node ids that the process prints."""
    printed = process.communicate()[0]
    if process.returncode not in (0, 5):  # 5: none
        raise SystemExit(printed)
    return {line for line in printed.splitlines() if "::" in line}


processes = {name: start(arguments) for name, arguments in {**RUNS, "all": ["-m", ""]}.items()}
tests = {name: collected(process) for name, process in processes.items()}
everything = tests.pop("all")
times = Counter(test for some in tests.values() for test in some)
wrong = sorted(test for test in everything | set(times) if times[test] != 1 or test not in everything)
for test in wrong:
    print(f"in {times[test]} of the runs {', '.join(RUNS)}: {test}", file=sys.stderr)
print(", ".join(f"{len(some)} {name}" for name, some in tests.items()), f"of {len(everything)} tests")
sys.exit(bool(wrong))
