"""On a GPU: first whether everybody computes the same, then times and peak memory beside rivals and yardsticks.

    python -m benchmarks --device cuda                       # every shape and mode
    python -m benchmarks --device cuda --only qwen3 --sweep  # and the sizes of blocks of the Triton kernels
    python -m benchmarks --device cuda --json gpu.json --plot gpu.png

Axes: t tokens, d model dim, h hidden dim, e experts, k choices. All experts are gated (SwiGLU), dropless, in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import MissingError
from benchmarks.kept import Tasks, attempt, following, told
from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

ROUNDS, WARMUP = 20, 5
PATIENCE = 6  # sizes of blocks, one after the other, that are no faster
CHECKED = 512  # tokens on which contestants are compared
TOLERANCE = 3e-2  # relative norm, for bfloat16
GAP = 0.05  # between the last logit chosen and the next: a router that rounds in bfloat16 may swap closer ones
WAYS = ("triton", "grouped", "lean")


@dataclass(frozen=True)
class Shape:
    """A layer and a call of it."""

    name: str
    t: int
    d: int
    h: int
    e: int
    k: int


SHAPES = (
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
    Shape("qwen3-30b-a3b", 32768, 2048, 768, 128, 8),
    Shape("olmoe", 32768, 2048, 1024, 64, 8),
    Shape("readme", 8192, 512, 2048, 16, 2),
)
MODES = ("forward", "train", "decode")


@dataclass
class Contestant:
    """`forward(x)` gives the tokens' outputs; `computes` says whether they are the layer's."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    computes: bool = True
    module: nn.Module | None = None  # of its own, whose mode it goes by
    weights: list[Tensor] = field(default_factory=list)  # whose gradients are compared: w1, w3, w2, if they lie alike


def make_layer(shape: Shape, device: str, dtype: torch.dtype) -> MoE:
    """The layer of this package, by which everybody's weights are drawn."""
    torch.manual_seed(0)
    gate = TopKGating(shape.d, shape.e, shape.k)
    with torch.device(device):
        experts = GatedExperts(shape.d, shape.e, shape.h)
    return MoE(shape.d, gate=gate, experts=experts).to(device, dtype)


def by_way(way: str) -> Callable[[Shape, MoE], Contestant]:
    def enter(shape: Shape, layer: MoE) -> Contestant:
        def forward(x: Tensor) -> Tensor:
            with ops.use(way):
                return layer(x)[0]

        experts = layer.experts
        return Contestant(forward, list(layer.parameters()), weights=[experts.w1, experts.w3, experts.w2])

    return enter


def transformers_block(backend: str) -> Callable[[Shape, MoE], Contestant]:
    def enter(shape: Shape, layer: MoE) -> Contestant:
        if importlib.util.find_spec("transformers") is None:
            raise MissingError("pip install transformers")
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        sizes = {"hidden_size": shape.d, "moe_intermediate_size": shape.h, "num_experts": shape.e}
        options = {"num_experts_per_tok": shape.k, "norm_topk_prob": True, "experts_implementation": backend}
        with torch.device(layer.experts.w1.device):
            block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, **options)).to(layer.experts.w1.dtype)
        experts = layer.experts
        gate_up = torch.cat([experts.w1, experts.w3], dim=-1).mT.contiguous()
        parts = {"gate.weight": layer.gate.w_gating.T.contiguous(), "experts.gate_up_proj": gate_up}
        block.load_state_dict(parts | {"experts.down_proj": experts.w2.mT.contiguous()})

        def forward(x: Tensor) -> Tensor:
            out = block(x)
            return out[0] if isinstance(out, tuple) else out

        return Contestant(forward, list(block.parameters()), module=block)

    return enter


def scattermoe(shape: Shape, layer: MoE) -> Contestant:
    """ScatterMoE's gated network behind this package's router."""
    if importlib.util.find_spec("scattermoe") is None:
        raise MissingError("pip install git+https://github.com/shawntan/scattermoe")
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    experts = layer.experts
    network = GLUMLP(shape.d, shape.h, shape.e, shape.k, activation=nn.SiLU()).to(experts.w1.device, experts.w1.dtype)
    with torch.no_grad():  # it halves its product into what is multiplied, and the gate
        network.experts.weight.copy_(torch.cat([experts.w3, experts.w1], dim=-1).mT)
        network.output_experts.weight.copy_(experts.w2.mT)

    def forward(x: Tensor) -> Tensor:
        routing = layer.gate(x)
        expert, weight = (tensor.view(-1, shape.k) for tensor in (routing.expert, routing.weight))
        return network(x.flatten(0, 1), weight.to(x.dtype), expert).view(x.shape)

    return Contestant(forward, [*layer.gate.parameters(), *network.parameters()])


def sonicmoe(shape: Shape, layer: MoE) -> Contestant:
    """SonicMoE's layer, with weights of its own: timed, not compared."""
    if importlib.util.find_spec("sonicmoe") is None:
        raise MissingError("pip install sonic-moe (Hopper or Blackwell)")
    import sonicmoe as package  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    options = {"activation_function": ActivationType.SWIGLU, "add_bias": False, "std": 0.02}
    module = package.MoE(shape.e, shape.k, shape.d, shape.h, **options).to(layer.experts.w1.device, torch.bfloat16)
    return Contestant(lambda x: module(x)[0], list(module.parameters()), computes=False, module=module)


def even_products(grouped: bool) -> Callable[[Shape, MoE], Contestant]:
    """The experts' products alone, every expert with as many rows: cuBLAS batched, or torch's grouped product."""

    def enter(shape: Shape, layer: MoE) -> Contestant:
        w1, w3, w2 = (w.detach().requires_grad_() for w in (layer.experts.w1, layer.experts.w3, layer.experts.w2))

        def forward(x: Tensor) -> Tensor:
            each = max(x[..., 0].numel() * shape.k // shape.e, 1)
            rows = x.detach().flatten(0, 1).repeat(shape.k, 1)[: each * shape.e].requires_grad_(x.requires_grad)
            if not grouped:
                slots = rows.view(shape.e, each, shape.d)
                return torch.bmm(F.silu(torch.bmm(slots, w1)) * torch.bmm(slots, w3), w2)
            ends = torch.arange(each, each * shape.e + 1, each, device=x.device, dtype=torch.int32)
            gate, up = F.grouped_mm(rows, w1, offs=ends), F.grouped_mm(rows, w3, offs=ends)
            return F.grouped_mm(F.silu(gate) * up, w2, offs=ends)

        return Contestant(forward, [w1, w3, w2], computes=False)

    return enter


def dense(shape: Shape, layer: MoE) -> Contestant:
    """One gated FFN of as many FLOPs."""
    with torch.device(layer.experts.w1.device):
        up, gate = (nn.Linear(shape.d, shape.k * shape.h, bias=False) for _ in range(2))
        down = nn.Linear(shape.k * shape.h, shape.d, bias=False)
    network = nn.ModuleList([up, gate, down]).to(layer.experts.w1.dtype)
    return Contestant(lambda x: down(F.silu(gate(x)) * up(x)), list(network.parameters()), computes=False)


CONTESTANTS: dict[str, Callable[[Shape, MoE], Contestant]] = {
    "layer": by_way("auto"),
    **{f"layer, {way}": by_way(way) for way in WAYS},
    "transformers grouped_mm": transformers_block("grouped_mm"),
    "transformers eager": transformers_block("eager"),
    "ScatterMoE": scattermoe,
    "SonicMoE": sonicmoe,
    "products, batched": even_products(grouped=False),
    "products, grouped": even_products(grouped=True),
    "dense": dense,
}


def step_of(contestant: Contestant, x: Tensor, mode: str) -> Callable[[], Tensor]:
    """One call; in training with the backward, whose gradients are dropped outside the time."""

    @torch.no_grad()
    def forward() -> Tensor:
        return contestant.forward(x)

    def train() -> Tensor:
        out = contestant.forward(x)
        out.backward(torch.ones_like(out))
        return out

    return train if mode == "train" else forward


def check(contestant: Contestant, layer: MoE, shape: Shape, device: str) -> float | None:
    """Relative error against the plain way in float32, of outputs and of the gradients that can be compared; of tokens
    whose choices are clear."""
    if not contestant.computes:
        return None
    torch.manual_seed(1)
    x = torch.randn(1, min(CHECKED, shape.t), shape.d, device=device, dtype=layer.experts.w1.dtype)
    exact = make_layer(shape, device, torch.float32)
    exact.load_state_dict(layer.state_dict())
    x = x[:, clear(exact, x.float(), shape)].contiguous()
    if x.numel() == 0:
        raise MissingError("no token's choices are clear at this size: nothing is compared")
    leaves = [x.clone().requires_grad_(), *contestant.weights]
    wide = [x.float().requires_grad_(), *([exact.experts.w1, exact.experts.w3, exact.experts.w2][: len(leaves) - 1])]
    out = contestant.forward(leaves[0])
    with ops.use("plain"):
        wanted = exact(wide[0])[0]
    pairs = [(out, wanted)]
    pairs += zip(
        *(torch.autograd.grad(o.square().sum(), tensors) for o, tensors in ((out, leaves), (wanted, wide))), strict=True
    )
    return max(float(((got.float() - want).norm() / want.norm()).detach()) for got, want in pairs)


@torch.no_grad()
def clear(exact: MoE, x: Tensor, shape: Shape) -> Tensor:
    """`(t,)` bool: the tokens of `(1, t, d)` whose choices do not hang on how a router rounds."""
    if shape.k == shape.e:
        return torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    best = (x[0] @ exact.gate.w_gating).topk(shape.k + 1).values  # type: ignore[operator]
    return best[:, -2] - best[:, -1] > GAP


def seconds(
    steps: dict[str, Callable[[], Tensor]], parameters: dict[str, list[Tensor]], device: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Every contestant once a round, timed by the device's own events; and what ended those that raise."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    ended: dict[str, str] = {}
    for turn in range(WARMUP + ROUNDS):
        for name in [name for name in steps if name not in ended]:
            try:
                found = timed(steps[name], device)
            except Exception as reason:  # of a compiler, a driver, a rival's assert
                ended[name] = told(reason)
                continue
            finally:
                for parameter in parameters[name]:
                    parameter.grad = None
            if turn >= WARMUP:
                samples[name].append(found)
    return {name: found for name, found in samples.items() if name not in ended}, ended


def timed(step: Callable[[], Tensor], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def peak_bytes(step: Callable[[], Tensor], device: str) -> int | None:
    """The most that a step holds beyond what stood before it."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(shape: Shape, mode: str, device: str = "cuda") -> dict[str, Any]:
    """The record of one shape and mode."""
    dtype = torch.bfloat16
    layer = make_layer(shape, device, dtype).train(mode == "train")
    tokens = 8 if mode == "decode" else shape.t
    x = torch.randn(1, tokens, shape.d, device=device, dtype=dtype, requires_grad=mode == "train")
    record: dict[str, Any] = {"shape": asdict(shape), "mode": mode, "contestants": {}, "missing": {}, "wrong": {}}
    steps, parameters = {}, {}
    for name, enter in CONTESTANTS.items():
        try:
            contestant = enter(shape, layer)
            if contestant.module is not None:
                contestant.module.train(mode == "train")
            error = check(contestant, layer, shape, device)
            step = step_of(contestant, x, mode)
            peak = peak_bytes(step, device)
        except Exception as reason:  # errors of Triton derive from nothing else, and rivals assert
            record["missing"][name] = told(reason)
            continue
        if error is not None and not error < TOLERANCE:
            record["wrong"][name] = error
            continue
        steps[name], parameters[name] = step, [x, *contestant.parameters]
        record["contestants"][name] = {"error": error, "peak_bytes": peak}
    samples, ended = seconds(steps, parameters, device)
    for name, found in samples.items():
        record["contestants"][name] |= {"median_s": median(found), "seconds": found}
    for name, reason in ended.items():
        record["missing"][name] = reason
        del record["contestants"][name]
    return record


def lines(record: dict[str, Any]) -> Iterator[str]:
    """A table of a record, in Markdown; times as parts of the better products alone."""
    found = record["contestants"]
    alone = min((found[name]["median_s"] for name in found if name.startswith("products")), default=None)
    shape = Shape(**record["shape"])
    yield f"\n{shape.name}, {record['mode']}: t {shape.t}, d {shape.d}, h {shape.h}, e {shape.e}, k {shape.k}\n"
    yield "| | ms | of the products | peak MiB | error |"
    yield "|---|---:|---:|---:|---:|"
    for name, row in found.items():
        part = "" if alone is None else f"{row['median_s'] / alone:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        yield f"| {name} | {row['median_s'] * 1e3:.2f} | {part} | {peak} | {error} |"
    yield from (f"\n{name} is WRONG: relative error {error:.2e}" for name, error in record["wrong"].items())
    yield from (f"\n{name} is missing: {reason}" for name, reason in record["missing"].items())


# ---- the sizes of blocks ----


def sweep(shape: Shape, device: str = "cuda", height: int | None = None) -> Tasks:
    """One field of the schedule's entry after the other, the best of some sizes by forward and backward. Sizes come in
    the order of a model of time, and a field ends after some that are no faster."""
    from mixture_of_experts.ops.triton import operators, schedule

    step = None
    for entry in operators.entries_for(torch.device(device), torch.bfloat16):
        if height not in (None, entry.rows):
            continue
        if step is None:
            layer = make_layer(shape, device, torch.bfloat16)
            x = torch.randn(1, shape.t, shape.d, device=device, dtype=torch.bfloat16, requires_grad=True)
            step = step_of(by_way("triton")(shape, layer), x, "train")
        best, best_time = entry, (yield f"tiles of {entry.rows}, as they are", partial(time_of, entry, step, device))
        for name in schedule.Schedule._fields[2:]:
            slower = 0
            for blocks in candidates(getattr(entry, name), entry.rows):
                tried = best._replace(**{name: blocks})
                if tried == best:
                    continue
                told = f"tiles of {entry.rows}, {name} {tuple(blocks)}"
                found = yield told, partial(time_if_it_compiles, tried, step, device, best_time)
                if isinstance(found, float) and not (isinstance(best_time, float) and best_time <= found):
                    best, best_time, slower = tried, found, 0
                else:
                    slower += 1
                if slower == PATIENCE:
                    break
        said = f"{shape.name}, {shape.t * shape.k // shape.e} rows an expert: {best_time} ms with {best}"
        yield f"tiles of {entry.rows}, best", partial(str, said)


def candidates(blocks: Any, height: int) -> list[Any]:
    """Sizes of blocks whose sums registers can hold, in the order of what a model says of them."""
    found = [
        blocks._replace(n=n, c=c, warps=warps, stages=stages)
        for n in (64, 128, 256)
        for c in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3, 4, 5)
    ]
    fitting = [one for one in found if (getattr(one, "m", height) * one.n) / (32 * one.warps) <= 128]
    return sorted(fitting, key=lambda one: modelled(one, height))


def modelled(blocks: Any, height: int) -> float:
    """What a multiplication reads, by the share of a multiprocessor's time that some programs at once hide; programs
    are bound by shared memory of 200 KB, and by registers."""
    m = getattr(blocks, "m", height)
    shared = 2 * blocks.stages * blocks.c * (m + blocks.n) / 1024
    programs = min(200 // shared, 65536 // (m * blocks.n + 2048 * blocks.warps), 64 // blocks.warps)
    hidden = min(1.0, (programs * (blocks.stages - 1) * blocks.c) / 256)
    return (1 / m + 1 / blocks.n) / max(hidden, 0.01)


@contextmanager
def with_entry(entry: Any, launch: Callable[..., None] | None = None) -> Iterator[None]:
    """Where every call has this entry of the schedule, and kernels are launched so."""
    from mixture_of_experts.ops.triton import operators

    before = operators.schedule_for, operators.launch
    operators.schedule_for, operators.launch = lambda x, mean_rows: entry, launch or operators.launch
    try:
        yield
    finally:
        operators.schedule_for, operators.launch = before


def compiles(entry: Any, step: Callable[[], Tensor]) -> bool:
    """Whether every kernel compiles with this entry, fits the card and spills no register; nothing is launched."""

    def compile_only(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        compiled = kernel.warmup(grid=grid, enable_fp_fusion=True, **arguments)
        compiled._init_handles()  # which raises where shared memory is too little
        if compiled.n_spills:
            raise RuntimeError("registers are spilled")

    try:
        with with_entry(entry, compile_only):
            step()
    except Exception as reason:
        print(f"  {entry} is left out: {told(reason)}", flush=True)
        return False
    return True


def time_of(entry: Any, step: Callable[[], Tensor], device: str = "cuda", best: float | None = None) -> float | None:
    """Median milliseconds of a step with this entry; None where it does not run, or is far slower than the best."""
    try:
        with with_entry(entry):
            times = [timed(step, device) for _ in range(WARMUP + 1)][WARMUP:]
            if best is None or 1e3 * times[0] < 1.3 * best:
                times += [timed(step, device) for _ in range(ROUNDS)]
                return 1e3 * median(times)
    except Exception as reason:
        print(f"  {entry} does not run: {told(reason)}", flush=True)
    return None


def time_if_it_compiles(entry: Any, step: Callable[[], Tensor], device: str, best: float | None) -> float | None:
    return time_of(entry, step, device, best) if compiles(entry, step) else None


# ---- the command ----


def plot(records: list[dict[str, Any]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(records), 1, figsize=(8, 2.2 * len(records)), squeeze=False)
    for axis, record in zip(axes[:, 0], records, strict=True):
        names = list(record["contestants"])
        axis.barh(names, [1e3 * record["contestants"][name]["median_s"] for name in names])
        axis.set_title(f"{record['shape']['name']}, {record['mode']}, ms", loc="left", fontsize=9)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("there is no GPU here: torch.cuda.is_available() is False")
        return 2
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    print(f"{name}, compute capability {capability}, torch {torch.__version__}", flush=True)
    records = []
    memory = torch.cuda.get_device_properties(0).total_memory
    for shape in (fitting(shape, memory) for shape in SHAPES):
        for mode in MODES:
            if options.only and not fnmatch(f"{shape.name}/{mode}", f"*{options.only}*"):
                continue
            records.append(run(shape, mode))
            print("\n".join(lines(records[-1])), flush=True)
        if options.sweep and (not options.only or options.only.split("/")[0] in shape.name):
            tasks, result = sweep(shape), None
            while (task := following(tasks, result)) is not None:
                result = attempt(task[1])
                print(f"{task[0]}: {result}", flush=True)
    if options.json:
        machine = {"gpu": name, "capability": capability, "torch": torch.__version__}
        Path(options.json).write_text(json.dumps({"machine": machine, "records": records}, indent=1))
    if options.plot:
        plot(records, options.plot)
    return int(any(record["wrong"] for record in records))


def fitting(shape: Shape, memory: int) -> Shape:
    """The shape, made smaller until a card of so many bytes holds the weights of a few contestants with gradients and
    a float32 copy, and what a call makes of its rows."""
    while 3 * shape.e * shape.d * shape.h * 2 * 16 > memory:
        shape = replace(shape, h=shape.h // 2)
    while shape.t * shape.k * (2 * shape.d + 4 * shape.h) * 2 * 4 > memory:
        shape = replace(shape, t=shape.t // 2)
    return shape


def small(shape: Shape) -> Shape:
    """A shape of the same kind that a test can run anywhere."""
    return replace(shape, t=24, d=32, h=32, e=4, k=2)
