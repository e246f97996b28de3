"""The pieces of the first hour on a card: what each measures, as tasks whose results are kept one by one.

Axes: t tokens, d model dim, h hidden dim, e experts, k choices.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.kept import Tasks
from mixture_of_experts import GatedExperts, MoE, Top2Gating, TopKGating, ops

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("triton", "grouped", "lean")
LAYOUTS = ("plain", "gated", "concatenated", "interleaved")
DTYPES = ("bfloat16", "float16", "float32")
MEANS = (4, 8, 16, 32, 64, 128, 256, 512)  # rows of an expert for which heights of tiles are compared
HEIGHTS = (128, 64, 32, 16)
INPUTS = 16  # of decoding, in turn: the weights that one chooses would stay in the cache


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

    def others(self) -> list[str]:
        """Names of the other cards."""
        return [f"cuda:{i}" for i in range(1, torch.cuda.device_count())]

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

    def compiled(self, layer: MoE) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A layer as `torch.compile` makes CUDA graphs of it."""
        torch._dynamo.reset()
        return torch.compile(layer, mode="reduce-overhead", fullgraph=True)


def pieces(device: Device) -> dict[str, Callable[[Device], Tasks]]:
    """All pieces by name, in the order in which they run: what is right before what is fast."""
    made: dict[str, Callable[[Device], Tasks]] = {"tests": tests}
    made |= {f"kernels/{layout}": partial(check_kernels, layout=layout) for layout in LAYOUTS}
    made |= {"capacity": capacity, "other cards": other_cards, "decoding": decoding}
    shapes = [shape.name for shape in device.shapes()]
    for index, name in enumerate(shapes):
        for mode in gpu.MODES:
            made[f"cases/{name}/{mode}"] = partial(case, index=index, mode=mode)
    made |= {f"profile/{name}": partial(profile, index=index) for index, name in enumerate(shapes)}
    made["training"] = training
    made |= {f"heights/{name}": partial(heights, index=index) for index, name in enumerate(shapes)}
    for index, name in enumerate(shapes):
        made |= {f"sweep/{name}/{height}": partial(sweep, index=index, height=height) for height in HEIGHTS}
    return made


def tests(device: Device) -> Tasks:
    """The tests that need a card."""

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", *device.tests()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return {"passed": done.returncode == 0, "lines": done.stdout.splitlines()[-40:]}

    yield "tests", run


def check_kernels(device: Device, layout: str) -> Tasks:
    """Every form of one layout: what the kernels' own check says, entry by entry of the schedule."""
    from mixture_of_experts.ops.triton import operators, self_check
    from mixture_of_experts.ops.triton.form import Form

    def judge(kind: self_check.Kind, entries: Any, entry: Any) -> str:
        self_check.forget()  # one that is wrong is not to hide the others
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self_check.judge(kind, torch.device(device.name), entries, (entry,)) or "right"

    names = [*self_check.ACTIVATIONS, "gelu_tanh"] if layout in ("plain", "gated") else ["silu", "gelu"]
    names += ["clamped_swiglu"] if layout != "plain" else []
    for dtype in (getattr(torch, name) for name in DTYPES):
        entries = operators.entries_for(torch.device(device.name), dtype)
        for activation in names:
            for odd in (0, 16):
                options = ((bool(odd), bool(odd)), (bool(odd), not odd), (odd, odd, odd), 0 if odd else 2, False)
                kind = self_check.Kind(0, dtype, Form(layout, activation, 1.702, 7.0), *options)
                for entry in entries:
                    name = f"{dtype}, {activation}, sizes {odd} past 64, tiles of {entry.rows}"
                    yield name, partial(judge, kind, entries, entry)


def case(device: Device, index: int, mode: str) -> Tasks:
    """A shape and mode, beside rivals and yardsticks."""
    yield "record", lambda: gpu.run(device.shapes()[index], mode, device.name)


def capacity(device: Device) -> Tasks:
    """A layer with slots and more than 2,048 assignments, by every way: its error, and the time of a step."""
    shape = device.shapes()[-1]

    def run(way: Any) -> dict[str, float]:
        torch.manual_seed(0)
        gate = Top2Gating(shape.d, shape.e, second_policy_train="all")
        layer = MoE(shape.d, gate=gate, experts=GatedExperts(shape.d, shape.e, shape.h)).to(device.name)
        x = torch.randn(4, max(shape.t // 4, 512), shape.d, device=device.name)
        with ops.use("plain"):
            wanted = layer(x)[0]
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16).requires_grad_()

        def step() -> Tensor:
            with ops.use(way):
                out = layer(x)[0]
                out.backward(torch.ones_like(out))
            return out

        error = (step().float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).mean()
        return {"median error of a token": float(error.median()), "ms": 1e3 * typical(step, device)}

    for way in ("auto", *WAYS):
        yield way, partial(run, way)


def other_cards(device: Device) -> Tasks:
    """On another card than the current one a layer computes what it does on the first."""

    def run(other: str) -> dict[str, Any]:
        layer, found = gpu.make_layer(gpu.small(gpu.SHAPES[1]), "cpu", torch.bfloat16), {}
        x = torch.randn(2, 100, layer.dim, dtype=torch.bfloat16)
        for way in ("auto", *WAYS):
            with ops.use(way):  # type: ignore[arg-type]
                one, two = (layer.to(name)(x.to(name))[0].float().cpu() for name in (device.name, other))
            found[way] = float((one - two).norm() / one.norm())
        return found

    for other in device.others():
        yield other, partial(run, other)


@torch.no_grad()
def decode(device: Device, layer: MoE, tokens: int, way: Any) -> dict[str, float]:
    """Microseconds of a layer on some tokens in eval: as it is launched, as a graph, and compiled."""
    inputs = torch.randn(INPUTS, tokens, 1, layer.dim, device=device.name, dtype=torch.bfloat16)
    x, row = inputs[0].clone(), {}

    def call() -> Tensor:
        return layer(x)[0]

    with ops.use(way):
        wanted = call()
        replay, out = device.capture(call)
        replay()
        row["error of the graph"] = float((out.float() - wanted.float()).norm() / wanted.float().norm())
        compiled = device.compiled(layer)
        for name, step in (("launched", call), ("graph", replay), ("reduce-overhead", lambda: compiled(x)[0])):
            times = []
            for turn in range(gpu.WARMUP + max(gpu.ROUNDS, 3)):
                x.copy_(inputs[turn % INPUTS])
                times.append(gpu.timed(step, device.name))  # type: ignore[arg-type]
            row[name] = 1e6 * median(times[gpu.WARMUP :])
    return row


def decoding(device: Device) -> Tasks:
    """Decoding by every way."""
    layer = None
    for tokens in (1, 8, 64):
        for way in ("auto", *WAYS):
            layer = layer or gpu.make_layer(device.shapes()[1], device.name, torch.bfloat16).eval()
            yield f"{tokens} tokens, {way}", partial(decode, device, layer, tokens, way)


def training(device: Device) -> Tasks:
    """A layer learns another one's outputs, by every way from the same start: losses have to agree."""
    steps, dim = (200, 256) if device.name == "cuda" else (4, 32)

    def run(way: Any) -> dict[str, float]:
        torch.manual_seed(0)
        layer = MoE(dim, gate=TopKGating(dim, 16, 2), experts=GatedExperts(dim, 16, dim)).to(device.name)
        teacher = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)).to(device.name)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
        generator = torch.Generator(device.name).manual_seed(1)
        losses, start = [], time.perf_counter()
        with ops.use(way):
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
        return {"first": first, "last": last, "seconds": time.perf_counter() - start}

    for way in ("auto", *WAYS):
        yield way, partial(run, way)


# ---- the kernels ----


def step_of(device: Device, shape: gpu.Shape) -> Callable[[], Tensor]:
    """Forward and backward of a layer by the kernels."""
    layer = gpu.make_layer(shape, device.name, torch.bfloat16)
    x = torch.randn(1, shape.t, shape.d, device=device.name, dtype=torch.bfloat16, requires_grad=True)
    return gpu.step_of(gpu.by_way("triton")(shape, layer), x, "train")


def typical(step: Callable[[], Any], device: Device) -> float:
    """Median seconds."""
    return median([gpu.timed(step, device.name) for _ in range(gpu.WARMUP + gpu.ROUNDS)][gpu.WARMUP :])


def profile(device: Device, index: int) -> Tasks:
    """Each launch of a step alone: microseconds, TFLOP/s, and GB/s of what goes into and out of it once."""
    yield "launches", lambda: list(launches(step_of(device, device.shapes()[index]), device))


def launches(step: Callable[[], Tensor], device: Device) -> Iterator[str]:
    from mixture_of_experts.ops.triton import operators

    launch, told = operators.launch, []

    def timed(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        seconds = typical(lambda: launch(kernel, grid, **arguments), device)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        moved, flops = sum(value.numel() * value.element_size() for value in tensors), flops_of(arguments)
        speed = f"{1e6 * seconds:.1f} us, {flops / seconds / 1e12:.1f} TFLOP/s, {moved / seconds / 1e9:.0f} GB/s"
        told.append(f"{kernel.fn.__name__}: {speed}")

    step()
    operators.launch = timed
    try:
        step()
    finally:
        operators.launch = launch
    yield from told


def flops_of(arguments: dict[str, Any]) -> int:
    """Of a launch of a product, for as many rows as there are; 0 of another kernel."""
    if "BLOCK_C" not in arguments or "BLOCK_M" not in arguments:
        return 0
    rows, columns = arguments["token"].shape[0] if arguments.get("token") is not None else 0, arguments["N"]
    rows = rows or next(arguments[name].shape[0] for name in ("x", "grad_pre") if name in arguments)
    length = arguments["C"] if "C" in arguments else arguments["M"]
    pairs = 2 if any(arguments.get(f"{name}_up") is not None for name in ("weight", "out")) else 1
    return 2 * rows * length * columns * (2 if arguments.get("INTERLEAVED") and "x" in arguments else pairs)


def heights(device: Device, index: int) -> Tasks:
    """Milliseconds of a step with tiles of every height, for few and many rows of an expert."""
    from mixture_of_experts.ops.triton import operators, schedule

    shape = device.shapes()[index]
    entries = operators.entries_for(torch.device(device.name), torch.bfloat16)
    for mean in MEANS:
        at, step = replace(shape, t=max(mean * shape.e // shape.k, 1)), None
        if at.t > shape.t:
            continue
        taken = schedule.find_schedule(entries, mean)
        for entry in entries:
            step = step or step_of(device, at)
            name = f"{mean} rows, tiles of {entry.rows}" + (", as they are" if entry is taken else "")
            yield name, partial(gpu.time_of, entry, step, device.name)


def sweep(device: Device, index: int, height: int) -> Tasks:
    """The sizes of blocks for tiles of one height, but those that do not compile, fit or spill."""
    yield from gpu.sweep(device.shapes()[index], device.name, height)
