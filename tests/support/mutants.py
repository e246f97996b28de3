"""Mutation testing: small changes to the code that routes, each of which a test has to notice.

    python tests/support/mutants.py                    # all FILES; fails if one survives that SURVIVORS does not list
    python tests/support/mutants.py losses.py gating/  # some of them
    python tests/support/mutants.py --share 0.1        # a tenth of each, always the same

mutmut makes the mutants. pytest imports and collects the tests of ORACLE once, then each mutant has a process of its
own, forked from that: the function that was changed gets its new code, and the tests that call it run, those first that
killed most so far, and of others the shortest. Code that the import alone runs is changed before it, and all tests run.
Results are kept: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import json
import math
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import hypothesis  # noqa: F401  (what all processes need is imported before they are forked)
import libcst as cst  # pyright: ignore[reportMissingImports]
import pytest
import torch._decomp.decompositions_for_jvp
import torch._dynamo  # noqa: F401
from libcst.metadata import MetadataWrapper  # pyright: ignore[reportMissingImports]
from mutmut.mutation.file_mutation import MutationVisitor  # pyright: ignore[reportMissingImports]
from mutmut.mutation.mutators import mutation_operators  # pyright: ignore[reportMissingImports]
from mutmut.mutation.pragma_handling import IgnoredCode  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mixture_of_experts"
#: kernels, and what only they do: tests/test_triton.py
KERNELS = ["top2_by_kernel.py"]
FILES = [
    "losses.py",
    "gating/levels.py",
    *(f"dispatch/{name}.py" for name in ("queues", "routing", "plan", "decision", "moving")),
]
SURVIVORS = Path(__file__).with_suffix(".txt")
ORACLE = (
    "golden losses queues queue_kernels levels routing decision dispatch side_inputs errors arguments logits steps "
    "reference gates capacity own_router expert_bias balance_losses bias_rules variable_choices router_saving forcing "
    "replay recipes few_choices sparse_mixer balancing decode"
)
SLOWER = (
    "compiled or skewed or forward_mode or one_rule or capacity_factors or threads or trainer or "
    "few_rows or few_tokens or it_balances or once_for_each_step or sparsity_is or a_share_of"
)
OPTIONS = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
PYTEST = [*OPTIONS, "-k", f"not ({SLOWER})", *(f"tests/test_{name}.py" for name in ORACLE.split())]
FIRST = [*OPTIONS, "tests/test_arguments.py", "tests/test_errors.py"]  # of what constructors and settings refuse
SECONDS, MEMORY = 60, 16 << 30  # for a mutant that never ends
OWN_FAULT = 70  # the exit status of a process in which this file fails
KILLED = "killed by "  # in the log, before the name of a test


class Mutations(MutationVisitor):
    """mutmut's, also in decorated functions, which it leaves out. Left alone are annotations, names of types, and what
    errors, warnings and `repr` say."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return node.name.value == "extra_repr"
        if isinstance(node, cst.Subscript):
            return isinstance(node.value, cst.Name) and node.value.value == "Literal"
        if isinstance(node, cst.Call) and cst.Module([]).code_for_node(node.func) == "warnings.warn":
            return True
        return isinstance(node, cst.Raise) or super()._skip_node_and_children(node)


class Mutant(NamedTuple):
    path: Path
    change: str  # the lines that go, and those that come
    number: int  # among the same changes of other lines
    source: str

    @property
    def file(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()

    @property
    def key(self) -> str:
        return sha256(f"{self.file}\n{self.change}\n{self.number}".encode()).hexdigest()[:16]


def mutants(path: Path, share: float) -> Iterator[Mutant]:
    """Mutants of a file of the package, all or a share that is drawn with seed 0."""
    source = path.read_text()
    visitor = Mutations(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(cst.parse_module(source)).visit(visitor)
    made, seen = visitor.mutations, Counter[str]()
    for index in sorted(random.Random(0).sample(range(len(made)), math.ceil(share * len(made)))):
        mutation = made[index]
        mutated = cst.ensure_type(module.deep_replace(mutation.original_node, mutation.mutated_node), cst.Module).code
        lines = list(difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0))[2:]
        change = "\n".join(f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "+-")
        yield Mutant(path, change, seen[change], mutated)
        seen[change] += 1


def functions(code: CodeType) -> list[CodeType]:
    """The functions and methods of a module."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return [found for each in inner for found in ([each] if each.co_flags & CO_OPTIMIZED else functions(each))]


def essence(code: CodeType, within: bool = True) -> tuple:
    """What code does, whatever its lines; without that of functions if not `within`."""
    inside = within or not code.co_flags & CO_OPTIMIZED
    consts = [essence(c, within) if isinstance(c, CodeType) else (type(c), repr(c)) for c in code.co_consts]
    return (code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, *consts) if inside else ()


@cache
def compiled(path: Path) -> CodeType:
    """The code of a file as it is."""
    return compile(path.read_text(), str(path), "exec")


def changes_import(mutant: Mutant) -> bool:
    """Whether a mutant changes what no function does."""
    return essence(compiled(mutant.path), False) != essence(compile(mutant.source, "", "exec"), False)


def changed_function(mutant: Mutant) -> tuple[int, CodeType] | None:
    """The number of the function that a mutant changes, and its new code; None if none does anything else."""
    after = compile(mutant.source, str(mutant.path), "exec")
    pairs = enumerate(zip(functions(compiled(mutant.path)), functions(after), strict=True))
    return next(((i, code) for i, (one, code) in pairs if essence(one) != essence(code)), None)


def in_a_fork(log: Path, work: Callable[[], int], limited: bool = True) -> bool:
    """Whether work ends with 0 in a process of its own; False if it returns something else or has to be stopped."""
    sys.stdout.flush()
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OWN_FAULT:
            raise RuntimeError(log.read_text())
        return status == 0
    result = OWN_FAULT
    try:
        if limited:
            signal.alarm(10 * SECONDS)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        result = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(result)


def import_and_test(mutant: Mutant) -> int:
    """Run all tests with another source of one file."""
    get_code = SourceFileLoader.get_code

    def get_mutated(self: SourceFileLoader, name: str) -> Any:
        return compile(mutant.source, self.path, "exec") if self.path == str(mutant.path) else get_code(self, name)

    SourceFileLoader.get_code = get_mutated
    return pytest.main(FIRST) or pytest.main(PYTEST)


def run(items: list[pytest.Item]) -> int:
    """Run tests in this order, to the first that fails."""
    for item, following in zip(items, [*items[1:], None], strict=False):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            print(f"\n{KILLED}{item.nodeid}")
            return 1
    return 0


def record_calls(items: list[pytest.Item], paths: list[Path], file: Path) -> int:
    """Run all tests, and write down which of them call a function, the shortest first."""
    code_of = {str(path): functions(compiled(path)) for path in paths}
    number = {code: f"{path}:{i}" for path, found in code_of.items() for i, code in enumerate(found)}
    called: dict[str, dict[int, float]] = {name: {} for name in number.values()}
    now: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename in code_of and (name := number.get(frame.f_code)):
            now.add(name)

    for index, item in enumerate(items):
        start = time.perf_counter()
        sys.setprofile(profile)
        result = run([item])
        sys.setprofile(None)
        if result:
            return result
        for name in now:
            called[name][index] = time.perf_counter() - start
        now.clear()
    file.write_text(json.dumps({name: sorted(tests, key=lambda i: tests[i]) for name, tests in called.items()}))
    return 0


class Trials:
    """A plugin of pytest that runs what was collected for one mutant after the other; but for those of functions that
    the import calls, and no test."""

    def __init__(self, todo: list[Mutant], log: Path, report: Callable[[Mutant, bool], None]) -> None:
        self.todo, self.log, self.report = todo, log, report
        self.called_at_import: set[CodeType] = set()

    def run(self) -> int:
        def profile(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
                self.called_at_import.add(frame.f_code)

        sys.setprofile(profile)
        return pytest.main(PYTEST, [self])

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        sys.setprofile(None)
        paths = sorted({m.path for m in self.todo})
        state = sha256(
            "".join(p.read_text() for p in [*paths, *sorted((ROOT / "tests").glob("*.py"))]).encode()
        ).hexdigest()
        calls = self.log.with_name(f"calls-{state[:16]}.json")
        if not calls.exists() and not in_a_fork(self.log, lambda: record_calls(session.items, paths, calls)):
            raise RuntimeError(f"the tests fail without a mutant, see {self.log}")
        called, live = json.loads(calls.read_text()), defaultdict(list)
        for function in (f for f in gc.get_objects() if type(f) is FunctionType):
            live[function.__code__].append(function)
        gc.freeze()  # no collection in a fork copies what they share
        killers = Counter[str]()
        for mutant in self.todo:
            changed = changed_function(mutant)
            if changed is None:
                self.report(mutant, True)
                continue
            number, code = changed
            items = [session.items[i] for i in called.get(f"{mutant.path}:{number}", [])]
            items.sort(key=lambda item: -killers[item.nodeid])
            before = functions(compiled(mutant.path))[number]
            if not items and before in self.called_at_import:
                continue
            self.report(mutant, in_a_fork(self.log, partial(try_out, live[before], code, items)))
            killers.update(self.log.read_text().partition(KILLED)[2].split("\n")[:1])
        return True


def try_out(found: list[FunctionType], code: CodeType, items: list[pytest.Item]) -> int:
    """Run tests with functions of another code."""
    try:
        for function in found:
            function.__code__ = code
    except ValueError:  # it has no longer the variables of the function around it
        return 1
    return run(items)


def reasons() -> dict[tuple[str, str], str]:
    """Why mutants may survive, by file and change. A paragraph is `FILE: KIND, REASON` and the changes below it."""
    found = {}
    for paragraph in SURVIVORS.read_text().split("\n\n")[1:]:
        head, *lines = paragraph.strip().splitlines()
        file, _, reason = head.partition(": ")
        change: list[str] = []
        for line, following in zip(lines, [*lines[1:], "-"], strict=True):
            change.append(line)
            if line[0] == "+" and following[0] == "-":
                found[file, "\n".join(change)], change = reason, []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each file, drawn with seed 0")
    parser.add_argument("--again", action="store_true", help="also those that survived before, without a reason")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    results, log = arguments.results, arguments.results.with_suffix(".log")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.touch()
    lines = results.read_text().splitlines()
    number_before, survived = len(lines), {line["key"]: line["survived"] for line in map(json.loads, lines)}
    paths: dict[Path, None] = {}  # each once, in this order
    for name in arguments.files:
        paths |= dict.fromkeys(sorted((PACKAGE / name).glob("*.py")) if name.endswith("/") else [PACKAGE / name])
    drawn = [mutant for path in paths if path.name not in KERNELS for mutant in mutants(path, arguments.share)]
    allowed = reasons()
    again = {m.key for m in drawn if arguments.again and survived.get(m.key) and (m.file, m.change) not in allowed}
    todo = [m for m in drawn if m.key not in survived or m.key in again]
    print(f"{len(drawn)} mutants, {len(todo)} to try", flush=True)

    def report(mutant: Mutant, survives: bool) -> None:
        survived[mutant.key] = survives
        with results.open("a") as file:
            line = {"key": mutant.key, "survived": survives, "file": mutant.file, "change": mutant.change}
            print(json.dumps(line), file=file)

    at_import = [m for m in todo if changes_import(m)]
    if in_functions := [m for m in todo if m not in at_import]:
        if not in_a_fork(log.with_suffix(".session"), Trials(in_functions, log, report).run, False):
            sys.exit(f"see {log}")
        tried = [json.loads(line) for line in results.read_text().splitlines()[number_before:]]
        survived |= {line["key"]: line["survived"] for line in tried}
        at_import += [m for m in in_functions if m.key not in {line["key"] for line in tried}]
    for mutant in at_import:
        report(mutant, in_a_fork(log, lambda: import_and_test(mutant)))  # noqa: B023

    counts, new = {m.file: Counter[str](mutants=0) for m in drawn}, []
    for mutant in drawn:
        reason = allowed.get((mutant.file, mutant.change), "new") if survived[mutant.key] else "killed"
        counts[mutant.file].update(["mutants", reason.split(",")[0]])
        new += [mutant] if reason == "new" else []
    for file, count in {**counts, "all": sum(counts.values(), Counter())}.items():
        print(f"{file}:", ", ".join(f"{number} {what}" for what, number in count.items()))
    for mutant in new:
        print(f"\n{mutant.file}\n{mutant.change}")
    sys.exit(f"{len(new)} mutants survive, and {SURVIVORS.name} does not say why" if new else 0)


if __name__ == "__main__":
    main()
