"""What a call costs, in numbers that do not depend on the machine's speed."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import mixture_of_experts
from mixture_of_experts import GatedExperts, HeirarchicalMoE, MoE, TopKGating, recipes
from tests.support import fake_cuda, layer_variants

from .outcomes import Outcomes, Uncomputed, described
from .sides import Sides

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


Counts = dict[str, float]
Case = tuple[str, Callable[[], Counts]]  # its name, and what counts


def of_calls() -> Counts:
    """Operators, our functions, files and objects, and bytes, of every layer in every call."""
    return {name: number for _, count in calls() for name, number in count().items()}


def calls() -> Iterator[Case]:
    for layer_name, make in LAYERS.items():
        for call_name, call in CALLS.items():
            name = f"{layer_name}, {call_name}"
            yield name, partial(count_call, name, make, call)


def count_call(name: str, make: Callable[[], nn.Module], call: CallSettings) -> Counts:
    torch.manual_seed(0)
    layer = make().train(call.training)
    x = torch.randn(call.sequences, call.length, layer.dim, requires_grad=call.training)
    with torch.set_grad_enabled(call.training):
        counts = of_call(lambda: layer(x), call.training)
    return {f"{name}: {what}": number for what, number in counts.items()}


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


def graphs() -> Iterator[Case]:
    """Graphs that `torch.compile` makes for five lengths, of each gate with and without a mask."""
    for router in layer_variants.ROUTERS:
        for variant in ("plain", "masked"):
            name = f"graphs, {router}, {variant}"
            yield name, partial(count_graphs, name, router, variant)


def count_graphs(name: str, router: str, variant: str) -> Counts:
    torch._dynamo.reset()
    layer, made = layer_variants.make_layer_with_router(router), Counter()

    def backend(graph: Any, _: Any) -> Any:
        made["graphs"] += 1
        return graph

    compiled = torch.compile(layer, backend=backend)
    for length in (6, 9, 12, 5, 20):
        layer_variants.run_layer(
            compiled, *layer_variants.LayerVariant("MoE", "Experts", "dropless", variant).inputs(2, length)
        )
    return {name: made["graphs"]}


def launches() -> Iterator[Case]:
    """Launches on a GPU and what they keep and move, by operators on fake CUDA tensors."""
    with fake_cuda.fake_cuda() as process:
        for way in ("grouped", "triton", "batched", "plain"):
            yield f"GPU, {way}", lambda way=way: process.submit(count_launches, way).result()


def count_launches(way: str) -> Counts:
    """In a process of fake CUDA."""
    from tests.support import fake_cuda_checks as checks

    found = {f"GPU, {way}: {what}": value for what, value in checks.measure_costs(way).items()}
    found |= {f"GPU, {way}, capacity: {what}": value for what, value in checks.measure_costs_with_capacity(way).items()}
    return found | {f"GPU, {way}: decoding, {t} tokens": checks.count_decoding_launches(way, t) for t in (1, 64)}


#: kinds of counts, each a guard's question
KINDS: dict[str, Callable[[], Iterator[Case]]] = {"calls": calls, "graphs": graphs, "launches": launches}


def attempted(kind: str) -> tuple[Counts, dict[str, str]]:
    """The counts of a kind, and why those of some cases could not be had, by case."""
    found, failed = {}, {}
    for name, count in KINDS[kind]():
        counts = attempt(count)
        if isinstance(counts, Uncomputed):
            failed[name] = counts
        else:
            found |= counts
    return found, failed


def attempt(count: Callable[[], Counts]) -> Counts | Uncomputed:
    try:
        return count()
    except Exception as error:
        return Uncomputed(described(error))


def guard(kind: str, both: Sides) -> list[str]:
    """What is wrong with a kind, in lines."""
    outcomes = Outcomes()
    before, (now, failures) = both.ask("counts.attempted", kind)
    before, uncomputed = ({}, {kind: before}) if isinstance(before, Uncomputed) else before
    for case, reason in uncomputed.items():
        outcomes.leave_out(case, reason)
    outcomes.computed = len(before.keys() & now.keys())
    left_out = tuple(case if case != kind else "" for case in uncomputed)
    now = {name: number for name, number in now.items() if name in before or not name.startswith(left_out)}
    wrong = [f"{case} fails in this tree: {reason}" for case, reason in failures.items()]
    wrong += compare(before, now)
    return [*wrong, *filter(None, [outcomes.report(f"counts, {kind}")])]


def compare(before: Counts, now: Counts) -> list[str]:
    """What rose, in lines; all counts that changed are printed."""
    rose = []
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one is None or other is None or abs(other - one) > 1e-3 * abs(one):
            print(f"    {name:64} {one} -> {other}")
        if one is None or other is None or other > one * 1.001:
            rose.append(f"{name}: {one} -> {other}")
    return rose
