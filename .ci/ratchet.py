"""Holds the project's size and cost to what .ci/ratchet.tsv has: a number that rises needs a line there that says why.

    python .ci/ratchet.py                        # measure and compare; what fell is told, to be lowered in the file
    python .ci/ratchet.py --lower                # write the numbers that fell into the file
    python .ci/ratchet.py --cpu-seconds 350      # also those that the README's test command took
    python .ci/ratchet.py --coverage             # minutes: run that command's tests, and compare each module's coverage

A line of the file has a number, what it counts, and why it is so. Tokens are those of Python 3.11, without comments and
docstrings.
"""

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS, COVERAGE = ROOT / ".ci/ratchet.tsv", ROOT / ".ci/coverage.tsv"
PAGES = ("*.md", "benchmarks/README.md", "docs/*.md", "docs/distributed/*.md")
SPACE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYERS, CALLS = ("MoE(64, 8)", "qwen3", "deepseek_v3"), ("training, 128 tokens", "eval, a token")
COUNTED = ("operators of the forward", "functions", "files", "types of objects")
OF_TESTS = "CPU seconds of the README's test command"
NOISE = {OF_TESTS: 1.5}  # machines differ
LEAST_LOSS = 0.5  # of a module's coverage, in percent: threads and timing move some branches


def tokens_of(path: Path) -> int:
    """Tokens of Python code; of any other file its words and signs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".py", ".pyi"):
        return len(re.findall(r"\w+|[^\w\s]", text))
    documented = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
    strings = [node.body[0] for node in documented if ast.get_docstring(node, clean=False) is not None]
    lines = {line for string in strings for line in range(string.lineno, (string.end_lineno or 0) + 1)}
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in SPACE and token.start[0] not in lines for token in found)


def sizes() -> Iterator[tuple[str, int]]:
    package = [path for path in (ROOT / "mixture_of_experts").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    if sys.version_info[:2] == (3, 11):
        yield "tokens of the package, data files included", sum(map(tokens_of, package))
    tests = (ROOT / "tests").rglob("*.py")
    yield "lines of tests", sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests)
    pages = (path for pattern in PAGES for path in ROOT.glob(pattern))
    yield "words of the pages", sum(len(path.read_text(encoding="utf-8").split()) for path in pages)


def costs() -> Iterator[tuple[str, int]]:
    """Operators, our functions, files and types of objects of some calls."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler tells when it starts
    warnings.simplefilter("ignore")  # of decoding with a capacity
    import torch

    from tests.guards.counts import of_calls

    torch.set_num_threads(1)  # the CPU's way has other batches for other numbers of threads
    for name, number in of_calls().items():
        layer, call, what = re.fullmatch("(.*), (.*, .*): (.*)", name).groups()  # type: ignore[union-attr]
        if layer in LAYERS and call in CALLS and what in COUNTED:
            yield name, number


def read(path: Path) -> dict[str, tuple[float, str]]:
    """Number and reason by name."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: (float(number), reason) for number, name, reason in lines}


def write(path: Path, found: dict[str, tuple[float, str]]) -> None:
    lines = [f"{number:g}\t{name}\t{reason}\n" for name, (number, reason) in found.items()]
    path.write_text("".join(lines).replace("e+06", "000000"), encoding="utf-8")


def compare(found: dict[str, float], lower: bool) -> int:
    """The number of what rose, or has no line."""
    limits, worse = read(LIMITS), 0
    for name, number in found.items():
        limit, reason = limits.get(name, (-1.0, ""))
        rose = number > limit * NOISE.get(name, 1)
        worse += rose
        if rose or number < limit:
            print(f"{'ROSE' if rose else 'fell':5} {name}: {limit:g} -> {number:g}")
        if lower and number < limit:
            limits[name] = number, reason
    if lower:
        write(LIMITS, limits)
    if worse:
        print(f"What rose costs every user or reader: save it elsewhere, or write the number and why into {LIMITS}")
    return worse


def covered() -> dict[str, float]:
    """The branch coverage of each module in percent, by the tests of the README's command."""
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "data", Path(folder) / "report.json"
        run = [sys.executable, "-m", "coverage"]
        given = ["--branch", f"--data-file={data}", "--source=mixture_of_experts"]
        subprocess.run([*run, "run", *given, "-m", "pytest", "-q"], cwd=ROOT, check=True)
        subprocess.run([*run, "json", f"--data-file={data}", "-o", str(report)], cwd=ROOT, check=True)
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
    return {name: round(part["summary"]["percent_covered"], 1) for name, part in sorted(files.items())}


def compare_coverage(lower: bool) -> int:
    found, before = covered(), read(COVERAGE) if COVERAGE.exists() else {}
    lost = {name for name, number in found.items() if number < before.get(name, (0.0, ""))[0] - LEAST_LOSS}
    for name in sorted(lost):
        print(f"LOST {name}: {before[name][0]:g} -> {found[name]:g} % of its branches are tested")
    if lower:
        write(COVERAGE, {name: (number, "") for name, number in found.items()})
    return len(lost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", action="store_true")
    parser.add_argument("--cpu-seconds", type=float)
    parser.add_argument("--coverage", action="store_true")
    given = parser.parse_args()
    if given.coverage:
        return compare_coverage(given.lower)
    parts: list[Callable[[], Iterator[tuple[str, float]]]] = [sizes, costs]
    found = {name: float(number) for part in parts for name, number in part()}
    if given.cpu_seconds is not None:
        found[OF_TESTS] = given.cpu_seconds
    return compare(found, given.lower)


if __name__ == "__main__":
    sys.exit(main())
