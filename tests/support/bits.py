"""What of a layer is the same to the last bit, whatever stands beside a token: the table of docs/trust.md.

    python -m tests.support.bits

For every way of computing on this machine's CPU, and each question, it prints in how many cases not a bit differs: of
the outputs of one sequence, and of the gradients of its inputs (where all of the call is compared, of all parameters
too). A case is a dtype, a size of the layer, a shape of the call and one change.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

WAYS = ("cpu", "grouped", "batched", "plain")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = ((8, 16, 4), (64, 96, 8), (256, 512, 8))  # d, h, e
MANY, FEW = (6, 16), (6, 2)  # sequences and their lengths: an expert has a dozen rows or more, or 3 to 6 on average

# What every way keeps, and what those do besides whose products have shapes that no value decides
ALWAYS = ("run to run", "run to run, two threads")
OF_EQUAL_SHAPES = ("other sequences beside it", "one thread or two")
KEPT = {
    "cpu": ALWAYS,
    "grouped": ALWAYS,
    "batched": (*ALWAYS, *OF_EQUAL_SHAPES, "another place in the batch"),
    "plain": (*ALWAYS, *OF_EQUAL_SHAPES),
}


class Outcome(NamedTuple):
    """Outputs `(b, n, d)`, gradients of the inputs `(b, n, d)`, and of all parameters."""

    out: Tensor
    grad: Tensor
    of_parameters: tuple[Tensor, ...] = ()

    def part(self, *index: int | slice) -> Outcome:
        return Outcome(self.out[index], self.grad[index])


class Equal(NamedTuple):
    """Whether two outcomes are the same to the last bit."""

    out: bool
    gradients: bool


def equal(one: Outcome, other: Outcome) -> Equal:
    pairs = zip([one.grad, *one.of_parameters], [other.grad, *other.of_parameters], strict=True)
    return Equal(torch.equal(one.out, other.out), all(torch.equal(a, b) for a, b in pairs))


class Case:
    """A dropless layer of two choices, as Mixtral's, with inputs and a weight for every output."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, shape: tuple[int, int]) -> None:
        (d, h, e), gen = size, torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.layer = MoE(d, gate=TopKGating(d, e), experts=GatedExperts(d, e, h)).to(dtype)
        self.x, self.weigh, self.others = (torch.randn(*shape, d, generator=gen).to(dtype) for _ in range(3))

    def run(self, x: Tensor | None = None, weigh: Tensor | None = None, call: Callable | None = None) -> Outcome:
        """Forward and backward. The losses are left out: they are means over all tokens, and so are their gradients."""
        x = (self.x if x is None else x).detach().requires_grad_()
        out, _ = (self.layer if call is None else call)(x)
        loss = (out * (self.weigh if weigh is None else weigh)).sum()
        grad, *of_parameters = torch.autograd.grad(loss, [x, *self.layer.parameters()])
        return Outcome(out.detach(), grad, tuple(of_parameters))

    def answers(self) -> Iterator[tuple[str, Equal]]:
        """Each question, with what came out; one thread, where nothing else is said."""
        x, weigh = self.x, self.weigh
        with threads(1):
            whole = self.run()
            first = whole.part(0)
            yield "run to run", equal(self.run(), whole)
            others = torch.cat([x[:1], self.others[1:]])
            yield "other sequences beside it", equal(self.run(others).part(0), first)
            moved = self.run(x.roll(3, 0), weigh.roll(3, 0))
            yield "another place in the batch", equal(moved.part(3), first)
            for number in (1, 2, 5):
                fewer = self.run(x[:number], weigh[:number])
                yield "another number of sequences", equal(fewer.part(0), first)
            for stop in (1, 7):
                alone = self.run(x[:1, :stop], weigh[:1, :stop])
                yield "a prefix alone", equal(alone.part(0), first.part(slice(stop)))
        with threads(2):
            two = self.run()
            yield "one thread or two", equal(two, whole)
            yield "run to run, two threads", equal(self.run(), two)

    def compiled(self) -> Equal:
        torch._dynamo.reset()
        with threads(1):
            return equal(self.run(call=torch.compile(self.layer, backend="aot_eager")), self.run())

    def decoding(self) -> Iterator[tuple[str, Equal]]:
        """A token of each sequence, in eval without gradients: a few rows go a way of their own."""
        layer, x = self.layer.eval(), self.x[:, :1]
        with torch.no_grad(), threads(1):
            whole = layer(x)[0]
            yield "decoding: run to run", Equal(torch.equal(layer(x)[0], whole), True)
            for number in (1, 2, 5):
                same = torch.equal(layer(x[:number])[0][0], whole[0])
                yield "decoding: another number of sequences", Equal(same, True)
        layer.train()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure() -> dict[tuple[str, str], collections.Counter]:
    """For each (question, way): the number of cases, and in how many outputs and gradients are equal."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)

    def note(question: str, way: str, found: Equal) -> None:
        counts[question, way].update(cases=1, out=found.out, gradients=found.gradients)

    for dtype in DTYPES:
        for size in SIZES:
            for shape in (MANY, FEW):
                case = Case(size, dtype, shape)
                for way in WAYS:
                    with ops.use(way):
                        for question, found in case.answers():
                            note(question, way, found)
                        if way != "cpu" and (size, shape) == (SIZES[1], MANY):  # no graph reads numbers, as "cpu" does
                            note("compiled (aot_eager) or not", way, case.compiled())
                for question, found in case.decoding():
                    note(question, "auto", found)
    return counts


def main() -> None:
    for (question, way), found in sorted(measure().items()):
        print(f"{question:40} {way:8} outputs {found['out']:3}, gradients {found['gradients']:3} of {found['cases']}")


if __name__ == "__main__":
    main()
