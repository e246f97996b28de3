"""The first hour on a card, by one command: what only a GPU can show, in pieces of ten minutes at most, and one report.

    python -m benchmarks.first_hour                       # into the folder first_hour/, report.md last
    python -m benchmarks.first_hour --only "cases/*"      # pieces whose name matches
    python -m benchmarks.first_hour --list

Each piece runs in a process of its own, which may end as it likes: the others run all the same. What is there already
is not run again, so that the same command goes on where it was interrupted; remove a file to have its piece run anew.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu
from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds of a piece
WAYS = ("triton", "grouped", "lean")
LAYOUTS = ("plain", "gated", "concatenated", "interleaved")
DTYPES = ("bfloat16", "float16", "float32")


class Device:
    """What the pieces need of a card. A test stands a CPU in its place."""

    name = "cuda"

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "card": properties.name,
            "capability": (properties.major, properties.minor),
            "memory": properties.total_memory,
            "torch": torch.__version__,
            "triton": __import__("triton").__version__,
        }

    def shapes(self) -> list[gpu.Shape]:
        return [gpu.fitting(shape, self.describe()["memory"]) for shape in gpu.SHAPES]

    def tests(self) -> list[str]:
        """Arguments of pytest."""
        return ["-m", "cuda", "tests/test_cuda.py"]

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """A call as a graph: what replays it, and where its result is written."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        return graph.replay, out


def pieces(device: Device) -> dict[str, Callable[[Device], Any]]:
    """All pieces by name, in the order in which they run: what is right before what is fast."""
    made: dict[str, Callable[[Device], Any]] = {"tests": run_tests}
    made |= {f"canary/{layout}": lambda device, layout=layout: run_canary(device, layout) for layout in LAYOUTS}
    for index, shape in enumerate(device.shapes()):
        for mode in gpu.MODES:
            made[f"cases/{shape.name}/{mode}"] = lambda device, i=index, mode=mode: run_case(device, i, mode)
    made["decoding"] = run_decoding
    made["training"] = run_training
    for index, shape in enumerate(device.shapes()):
        for height in (128, 64, 32, 16):
            made[f"sweep/{shape.name}/{height}"] = lambda device, i=index, h=height: run_sweep(device, i, h)
    return made


def run_tests(device: Device) -> dict[str, Any]:
    """The tests that need a card."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *device.tests()], cwd=ROOT, capture_output=True, text=True
    )
    return {"passed": done.returncode == 0, "lines": done.stdout.splitlines()[-40:]}


def run_canary(device: Device, layout: str) -> dict[str, Any]:
    """Every form of one layout: what the kernels' own check says, entry by entry of the schedule."""
    from mixture_of_experts.ops.triton import canary, operators
    from mixture_of_experts.ops.triton.form import Form

    names = [*canary.ACTIVATIONS, "gelu_tanh"] if layout in ("plain", "gated") else ["silu", "gelu"]
    names += ["clamped_swiglu"] if layout != "plain" else []
    found = {}
    for dtype in (getattr(torch, name) for name in DTYPES):
        entries = operators.entries_for(torch.device(device.name), dtype)
        for activation in names:
            for odd in (0, 16):
                options = ((bool(odd), bool(odd)), (bool(odd), not odd), (odd, odd, odd))
                kind = canary.Kind(0, dtype, Form(layout, activation, 1.702, 7.0), *options, 0 if odd else 2)
                for entry in entries:
                    canary.forget()  # one that is wrong is not to hide the others
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        wrong = canary.judge(kind, torch.device(device.name), entries, (entry,))
                    found[f"{dtype}, {activation}, sizes {odd} past 64, tiles of {entry.rows}"] = wrong
    return {"right": sum(wrong is None for wrong in found.values()), "wrong": {k: v for k, v in found.items() if v}}


def run_case(device: Device, index: int, mode: str) -> dict[str, Any]:
    """A shape and mode, beside rivals and yardsticks."""
    return gpu.run(device.shapes()[index], mode, device.name)


def run_sweep(device: Device, index: int, height: int) -> list[str]:
    """The sizes of blocks for tiles of one height, but those that do not compile, fit or spill."""
    return list(gpu.sweep(device.shapes()[index], device.name, height))


@torch.no_grad()
def run_decoding(device: Device) -> dict[str, Any]:
    """Microseconds of a layer on some tokens in eval, as it is launched and as a graph, by every way."""
    found: dict[str, Any] = {}
    shape = device.shapes()[1]
    layer = gpu.make_layer(shape, device.name, torch.bfloat16).eval()
    for tokens in (1, 8, 64):
        x = torch.randn(tokens, 1, shape.d, device=device.name, dtype=torch.bfloat16)
        for way in ("auto", *WAYS):
            try:
                with ops.use(way):  # type: ignore[arg-type]

                    def call() -> Tensor:
                        return layer(x)[0]  # noqa: B023  (it is called in this turn)

                    wanted = call()
                    replay, out = device.capture(call)
                    replay()
                    row = {"error": float((out.float() - wanted.float()).norm() / wanted.float().norm())}
                    for name, step in (("launched", call), ("graph", replay)):
                        times = [gpu.timed(step, device.name) for _ in range(gpu.WARMUP + gpu.ROUNDS)]  # type: ignore[arg-type]
                        row[name] = 1e6 * sorted(times)[len(times) // 2]
            except Exception as reason:
                row = {"ended": gpu.told(reason)}
            found[f"{tokens} tokens, {way}"] = row
    return found


def run_training(device: Device) -> dict[str, Any]:
    """A layer learns another one's outputs, by every way from the same start: losses have to agree."""
    steps, dim = (200, 256) if device.name == "cuda" else (4, 32)
    found = {}
    for way in ("auto", *WAYS):
        torch.manual_seed(0)
        layer = MoE(dim, gate=TopKGating(dim, 16, 2), experts=GatedExperts(dim, 16, dim)).to(device.name)
        teacher = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)).to(device.name)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
        generator = torch.Generator(device.name).manual_seed(1)
        losses, start = [], time.perf_counter()
        try:
            with ops.use(way):  # type: ignore[arg-type]
                for _ in range(steps):
                    x = torch.randn(8, 128, dim, device=device.name, generator=generator)
                    with torch.autocast(device.name, torch.bfloat16):
                        out, aux_loss = layer(x)
                    loss = (out.float() - teacher(x).detach()).square().mean() + aux_loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
            first, last = float(losses[0]), float(torch.stack(losses[-10:]).mean())
            found[way] = {"first": first, "last": last, "seconds": time.perf_counter() - start}
        except Exception as reason:
            found[way] = {"ended": gpu.told(reason)}
    return found


# ---- the command ----


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '.')}.json"


def run_piece(name: str, folder: Path, device: Device) -> None:
    """In the process of a piece: what it found, in its file."""
    found = pieces(device)[name](device)
    half = file_of(folder, name).with_suffix(".half")  # what is interrupted leaves no file that looks whole
    half.write_text(json.dumps({"found": found}, default=str))
    half.replace(file_of(folder, name))


def run_all(folder: Path, only: str | None, device: Device, command: list[str], limit: float = LIMIT) -> list[str]:
    """Run every piece that is not there yet; returns the names of those that ended badly."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(device.describe()))
    bad = []
    for name in pieces(device):
        if file_of(folder, name).exists() or (only and not fnmatch(name, only)):
            continue
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        log = file_of(folder, name).with_suffix(".log")
        with log.open("w") as file:
            try:
                ended = subprocess.run(
                    [*command, "--piece", name, "--folder", str(folder)],
                    cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False,
                ).returncode  # fmt: skip
                reason = None if ended == 0 else f"it ended with {ended}"
            except subprocess.TimeoutExpired:
                reason = f"it took more than {limit:.0f} seconds"
        if reason:
            bad.append(name)
            print(f"  {reason}: {log}", flush=True)
    return bad


def report(folder: Path, device: Device) -> str:
    """One page of all that is there."""
    return "\n".join(lines(folder, device)) + "\n"


def lines(folder: Path, device: Device) -> Iterator[str]:
    machine = json.loads((folder / "machine.json").read_text())
    yield f"# First hour on {machine['card']}\n"
    yield ", ".join(f"{key} {value}" for key, value in machine.items())
    for name in pieces(device):
        path = file_of(folder, name)
        yield f"\n## {name}\n"
        if not path.exists():
            log = path.with_suffix(".log")
            said = log.read_text().strip().splitlines()[-5:] if log.exists() else []
            yield "\n".join(["did not end" if log.exists() else "was not run", *said])
            continue
        found = json.loads(path.read_text())["found"]
        if name.startswith("cases/"):
            yield from gpu.lines(found)
        elif isinstance(found, dict):
            yield from (f"- {key}: {told(value)}" for key, value in found.items())
        else:
            yield from (f"- {line}" for line in found)


def told(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {told(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return "\n  " + "\n  ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None, device: Device | None = None, command: list[str] | None = None) -> int:
    made = argparse.ArgumentParser("python -m benchmarks.first_hour", description="What only a GPU can show.")
    made.add_argument("--folder", type=Path, default=Path("first_hour"), help="where results are kept")
    made.add_argument("--only", metavar="PATTERN", help="pieces whose name matches")
    made.add_argument("--list", action="store_true", help="print the pieces and stop")
    made.add_argument("--piece", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if device is None:
        if not torch.cuda.is_available():
            print("there is no GPU here: torch.cuda.is_available() is False")
            return 2
        device = Device()
    folder = options.folder.resolve()
    if options.list:
        print("\n".join(pieces(device)))
    elif options.piece:
        run_piece(options.piece, folder, device)
    else:
        bad = run_all(folder, options.only, device, command or [sys.executable, "-m", "benchmarks.first_hour"])
        text = report(folder, device)
        (folder / "report.md").write_text(text)
        print(text)
        return int(bool(bad))
    return 0


if __name__ == "__main__":
    sys.exit(main())
