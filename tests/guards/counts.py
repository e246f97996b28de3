"""What a call costs, in numbers that do not depend on the machine's speed."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import mixture_of_experts
from mixture_of_experts import GatedExperts, HeirarchicalMoE, MoE, TopKGating, recipes
from tests.support import fake_cuda, paths

PACKAGE = str(Path(mixture_of_experts.__file__).parent)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "MoE(64, 8)": lambda: MoE(64, 8),
    "top-k of gated": lambda: MoE(64, gate=TopKGating(64, 8), experts=GatedExperts(64, 8, 128)),
    "qwen3": lambda: recipes.qwen3(256, 16, 128, k=4),
    "deepseek_v3": lambda: recipes.deepseek_v3(256, 16, 128, k=4, num_groups=4, top_groups=2),
    "two levels": lambda: HeirarchicalMoE(64, (4, 4)),
}


class CallSettings(NamedTuple):
    """Tokens of a call, and the mode."""

    sequences: int
    length: int
    training: bool


CALLS = {
    "training, 128 tokens": CallSettings(2, 64, True),
    "training, 512 tokens": CallSettings(1, 512, True),
    "eval, 512 tokens": CallSettings(1, 512, False),
    "eval, a token": CallSettings(1, 1, False),
}


def of_calls() -> dict[str, int]:
    """Operators, our functions, files and objects, and bytes, of every layer in every call."""
    found: dict[str, int] = {}
    for layer_name, make in LAYERS.items():
        for call_name, call in CALLS.items():
            torch.manual_seed(0)
            layer = make().train(call.training)
            x = torch.randn(call.sequences, call.length, layer.dim, requires_grad=call.training)
            with torch.set_grad_enabled(call.training):
                counts = of_call(lambda layer=layer, x=x: layer(x), call.training)
            found |= {f"{layer_name}, {call_name}: {what}": number for what, number in counts.items()}
    return found


def of_call(call: Callable[[], tuple[Tensor, Tensor]], training: bool) -> dict[str, int]:
    for _ in range(2):
        call()
    with Operators() as forward:
        out, aux_loss = call()
    found = {"operators of the forward": forward.number}
    if training:
        loss = out.square().sum() + aux_loss
        with Operators() as backward:
            loss.backward()
        found["operators of the backward"] = backward.number
    with entered() as seen:
        call()
    found |= {"functions": len(seen.functions), "files": len({file for file, _ in seen.functions})}
    found |= {"objects": seen.objects.total(), "types of objects": len(+seen.objects)}
    return found | {"peak bytes": peak_bytes(call, training)}


class Operators(TorchDispatchMode):
    """Counts the operators that torch dispatches."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class Seen(NamedTuple):
    """Our functions that ran, by file and line, and how many objects of each of our types were made."""

    functions: set[tuple[str, int]]
    objects: Counter[str]


@contextmanager
def entered() -> Iterator[Seen]:
    """What a call enters and makes. An object is made where a constructor of its class runs: `__init__`, or for tuples
    with names `__new__`, `_make` and `_replace`."""
    seen, made = Seen(set(), Counter()), {}  # made: by id, kept alive, so that no id comes twice

    def watch(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            seen.functions.add((code.co_filename, code.co_firstlineno))
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_name in ("<lambda>", "_make") and inspect.isclass(first) and issubclass(first, tuple):
            seen.objects[first.__qualname__] += first.__module__.startswith("mixture_of_experts")
        elif code.co_name == "__init__" and id(first) not in made:  # a base's constructor is of the same object
            seen.objects[type(first).__qualname__] += type(first).__module__.startswith("mixture_of_experts")
            made[id(first)] = first

    sys.setprofile(watch)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def peak_bytes(call: Callable[[], tuple[Tensor, Tensor]], training: bool) -> int:
    """The most bytes of tensors alive in a step, above those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        out, aux_loss = call()
        if training:
            (out.square().sum() + aux_loss).backward()
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def graphs() -> dict[str, int]:
    """Graphs that `torch.compile` makes for five lengths, of each gate with and without a mask."""
    lengths, found = (6, 9, 12, 5, 20), {}
    for name in paths.ROUTERS:
        for variant in ("plain", "masked"):
            torch._dynamo.reset()
            layer, made = paths.layer_with_router(name), Counter()

            def backend(graph: Any, _: Any, made: Counter = made) -> Any:
                made["graphs"] += 1
                return graph

            compiled = torch.compile(layer, backend=backend)
            for length in lengths:
                paths.run(compiled, *paths.Path("MoE", "Experts", "dropless", variant).inputs(2, length))
            found[f"graphs, {name}, {variant}"] = made["graphs"]
    return found


def launches() -> dict[str, float]:
    """Launches on a GPU and what they keep and move, by operators on fake CUDA tensors."""
    with fake_cuda.fake_cuda() as process:
        return process.submit(launches_on_fake_cuda).result()


def launches_on_fake_cuda() -> dict[str, float]:
    from tests.support import fake_cuda_checks as checks

    found = {}
    for way in ("grouped", "triton", "batched", "plain"):
        found |= {f"GPU, {way}: {what}": value for what, value in checks.costs(way).items()}
        found |= {f"GPU, {way}, capacity: {what}": value for what, value in checks.costs_with_capacity(way).items()}
        found |= {f"GPU, {way}: decoding, {t} tokens": checks.launches_of_decoding(way, t) for t in (1, 64)}
    return found


def compare(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """What rose, in lines; all counts that changed are printed."""
    rose = []
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one is None or other is None or abs(other - one) > 1e-3 * abs(one):
            print(f"    {name:64} {one} -> {other}")
        if one is None or other is None or other > one * 1.001:
            rose.append(f"{name}: {one} -> {other}")
    return rose
