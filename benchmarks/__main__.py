"""The command. Each half runs in a child process: torch reads THP_MEM_ALLOC_ENABLE when it is imported."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cases import HALVES, Case, select_cases

ROOT = Path(__file__).resolve().parents[1]
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
SUPPORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks", description="Time and memory beside rivals and yardsticks.")
    made.add_argument("--quick", action="store_true", help="the headline cases only, ordinary pages, no extra rivals")
    made.add_argument("--figures-only", action="store_true", help="without the rivals that no figure reads")
    made.add_argument("--only", metavar="PATTERN", help="cases whose name contains PATTERN (or matches its wildcards)")
    made.add_argument("--rounds", type=int, default=15, help="timed rounds; a figure needs at least 15 to count")
    made.add_argument("--attempts", type=int, default=3, help="most times a case is timed while A/A disagrees")
    made.add_argument("--processes", type=int, default=1, help="fresh processes, whose timed rounds count together")
    made.add_argument("--threads", type=int, help="torch.set_num_threads")
    made.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine, with --threads 1"
    )
    made.add_argument("--half", choices=HALVES, help="ordinary or huge pages only")
    made.add_argument("--count", action="store_true", help="FLOPs, bytes kept and peak memory instead")
    made.add_argument("--list", action="store_true", help="print the cases and stop")
    made.add_argument("--json", metavar="FILE", help="save everything; a file's other cases stay")
    made.add_argument("--plot", metavar="FILE", help="save the picture (needs matplotlib)")
    made.add_argument("--published", metavar="FOLDER", help="where mixture-of-experts 0.2.3 lies")
    made.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return made


def select_requested(options: argparse.Namespace) -> list[Case]:
    return select_cases(options.only, options.quick, options.figures_only)


def list_halves(options: argparse.Namespace) -> list[str]:
    """Which halves to run here."""
    if options.half:
        return [options.half]
    if options.quick or options.count:
        return ["ordinary"]
    if not SUPPORT.exists() or "[never]" in SUPPORT.read_text():
        print("no huge pages on this machine: that half is skipped")
        return ["ordinary"]
    return list(HALVES)


def make_environment(half: str, options: argparse.Namespace) -> dict[str, str]:
    """The child's environment: huge pages on or off whatever they are here, and where 0.2.3 is."""
    given = {key: value for key, value in os.environ.items() if key != HUGE_PAGES}
    given.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory talks of its starts and stops
    if half == "huge":
        given[HUGE_PAGES] = "1"
    if options.published:
        given["BENCHMARKS_PUBLISHED"] = str(Path(options.published).resolve())
    return given


def run_halves(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run the halves one after the other, save what they found."""
    result: dict = {"records": [], "counts": []}
    for half in list_halves(options):
        seeds = range(1 if options.count else options.processes)
        found = [run_child(options, [*arguments, "--half", half, "--seed", str(seed)], half) for seed in seeds]
        result |= {"machine": found[-1]["machine"]}
        result["records"] += pool_processes(found)
        result["counts"] += found[-1]["counts"]
    return save(result, options)


def run_child(options: argparse.Namespace, arguments: list[str], half: str) -> dict:
    """What a run in a process of its own found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.json"
        command = [sys.executable, "-m", "benchmarks", *arguments, "--child", str(path)]
        subprocess.run(command, cwd=ROOT, env=make_environment(half, options), check=True)
        return json.loads(path.read_text())


def pool_processes(found: list[dict]) -> list[dict]:
    """The records of one half, each with the rounds of all processes."""
    if len(found) == 1:
        return found[0]["records"]
    from benchmarks.report import case_block
    from benchmarks.run import pooled

    records = [pooled(each) for each in zip(*(run["records"] for run in found), strict=True)]
    print("\nall processes together", *map(case_block, records), sep="\n", flush=True)
    return records


def merge_results(result: dict, path: Path) -> dict:
    """The result with the file's earlier records of other cases and halves, if they are of the same machine."""
    earlier = json.loads(path.read_text()) if path.exists() else None
    if earlier is None or {**earlier["machine"], "date": ""} != {**result["machine"], "date": ""}:
        return result
    new = {(record["case"]["name"], record["half"]) for record in result["records"]}
    kept = [record for record in earlier["records"] if (record["case"]["name"], record["half"]) not in new]
    return result | {"records": kept + result["records"], "counts": result["counts"] or earlier["counts"]}


def save(result: dict, options: argparse.Namespace) -> int:
    whole = merge_results(result, Path(options.json)) if options.json else result
    if options.json:
        Path(options.json).write_text(json.dumps(whole, indent=1))
    if options.plot:
        from benchmarks.report import draw

        draw(whole, options.plot)
    if result["records"]:
        from benchmarks.report import summary

        print(summary(result["records"]))
    return 0


def run_half(options: argparse.Namespace) -> int:
    """Run one half in this process, printing as it goes."""
    import torch

    from benchmarks import counts, report, timing
    from benchmarks.run import run_case

    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict = {"machine": timing.machine(), "records": [], "counts": []}
    print(report.heading(result["machine"]), f"; {report.pages(options.half)}", sep="", flush=True)
    if options.count:
        for row in counts.iter_count_rows(options.only):
            print(report.count_line(row), flush=True)
            result["counts"].append(row)
    else:
        for case in select_requested(options):
            record = run_case(case, options.half, options.rounds, options.attempts, options.clock, options.seed)
            print(report.case_block(record), flush=True)
            result["records"].append(record)
    Path(options.child).write_text(json.dumps(result))
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        parser().error("--clock cpu counts threads that wait for each other: give it --threads 1")
    if options.processes < 1:
        parser().error(f"--processes must be at least 1, got {options.processes}")
    if options.list:
        print(
            "\n".join(
                f"{case.name:44} {case.mode:10} {', '.join(case.contestants)}" for case in select_requested(options)
            )
        )
        return 0
    if options.child:
        return run_half(options)
    if not options.count and not select_requested(options):
        print(f"no case matches {options.only!r}: --list shows them", file=sys.stderr)
        return 2
    try:
        return run_halves(options, arguments)
    except subprocess.CalledProcessError as error:  # the child has said what is wrong
        return error.returncode


if __name__ == "__main__":
    sys.exit(main())
