"""What of a layer is the same to the last bit, whatever stands beside a token: the table of docs/correctness.md.

    python -m tests.support.bitwise

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

IMPLEMENTATIONS = ("cpu", "grouped", "batched", "plain")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = ((8, 16, 4), (64, 96, 8), (256, 512, 8))  # d, h, e
LONG_SHAPE, SHORT_SHAPE = (
    (6, 16),
    (6, 2),
)  # sequences and their lengths: an expert has a dozen rows or more, or 3 to 6 on average

# What every way keeps, and what those do besides whose products have shapes that no value decides
KEPT_BY_ALL = ("run to run", "run to run, two threads")
KEPT_WITH_EQUAL_SHAPES = ("other sequences beside it", "one thread or two")
EXPECTED = {
    "cpu": KEPT_BY_ALL,
    "grouped": KEPT_BY_ALL,
    "batched": (*KEPT_BY_ALL, *KEPT_WITH_EQUAL_SHAPES, "another place in the batch"),
    "plain": (*KEPT_BY_ALL, *KEPT_WITH_EQUAL_SHAPES),
}


class Outcome(NamedTuple):
    """Outputs `(b, n, d)`, gradients of the inputs `(b, n, d)`, and of all parameters."""

    out: Tensor
    grad: Tensor
    parameter_grads: tuple[Tensor, ...] = ()

    def select(self, *index: int | slice) -> Outcome:
        return Outcome(self.out[index], self.grad[index])


class Equal(NamedTuple):
    """Whether two outcomes are the same to the last bit."""

    out: bool
    gradients: bool


def compare_bits(one: Outcome, other: Outcome) -> Equal:
    pairs = zip([one.grad, *one.parameter_grads], [other.grad, *other.parameter_grads], strict=True)
    return Equal(torch.equal(one.out, other.out), all(torch.equal(a, b) for a, b in pairs))


class Case:
    """A dropless layer of two choices, as Mixtral's, with inputs and a weight for every output."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, shape: tuple[int, int]) -> None:
        (d, h, e), gen = size, torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.layer = MoE(d, gate=TopKGating(d, e), experts=GatedExperts(d, e, h)).to(dtype)
        self.x, self.output_weights, self.others = (torch.randn(*shape, d, generator=gen).to(dtype) for _ in range(3))

    def run(self, x: Tensor | None = None, weigh: Tensor | None = None, call: Callable | None = None) -> Outcome:
        """Forward and backward. The losses are left out: they are means over all tokens, and so are their gradients."""
        x = (self.x if x is None else x).detach().requires_grad_()
        out, _ = (self.layer if call is None else call)(x)
        loss = (out * (self.output_weights if weigh is None else weigh)).sum()
        grad, *of_parameters = torch.autograd.grad(loss, [x, *self.layer.parameters()])
        return Outcome(out.detach(), grad, tuple(of_parameters))

    def compare_all(self) -> Iterator[tuple[str, Equal]]:
        """Each question, with what came out; one thread, where nothing else is said."""
        x, weigh = self.x, self.output_weights
        with use_threads(1):
            whole = self.run()
            first = whole.select(0)
            yield "run to run", compare_bits(self.run(), whole)
            others = torch.cat([x[:1], self.others[1:]])
            yield "other sequences beside it", compare_bits(self.run(others).select(0), first)
            moved = self.run(x.roll(3, 0), weigh.roll(3, 0))
            yield "another place in the batch", compare_bits(moved.select(3), first)
            for number in (1, 2, 5):
                fewer = self.run(x[:number], weigh[:number])
                yield "another number of sequences", compare_bits(fewer.select(0), first)
            for stop in (1, 7):
                alone = self.run(x[:1, :stop], weigh[:1, :stop])
                yield "a prefix alone", compare_bits(alone.select(0), first.select(slice(stop)))
        with use_threads(2):
            two = self.run()
            yield "one thread or two", compare_bits(two, whole)
            yield "run to run, two threads", compare_bits(self.run(), two)

    def compiled(self) -> Equal:
        torch._dynamo.reset()
        with use_threads(1):
            return compare_bits(self.run(call=torch.compile(self.layer, backend="aot_eager")), self.run())

    def decoding(self) -> Iterator[tuple[str, Equal]]:
        """A token of each sequence, in eval without gradients: a few rows go a way of their own."""
        layer, x = self.layer.eval(), self.x[:, :1]
        with torch.no_grad(), use_threads(1):
            whole = layer(x)[0]
            yield "decoding: run to run", Equal(torch.equal(layer(x)[0], whole), True)
            for number in (1, 2, 5):
                same = torch.equal(layer(x[:number])[0][0], whole[0])
                yield "decoding: another number of sequences", Equal(same, True)
        layer.train()


@contextlib.contextmanager
def use_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_equal_bits() -> dict[tuple[str, str], collections.Counter]:
    """For each (question, way): the number of cases, and in how many outputs and gradients are equal."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)

    def note(question: str, way: str, found: Equal) -> None:
        counts[question, implementation].update(cases=1, out=found.out, gradients=found.gradients)

    for dtype in DTYPES:
        for size in SIZES:
            for shape in (LONG_SHAPE, SHORT_SHAPE):
                case = Case(size, dtype, shape)
                for implementation in IMPLEMENTATIONS:
                    with ops.use(implementation):
                        for question, found in case.compare_all():
                            note(question, implementation, found)
                        if implementation != "cpu" and (size, shape) == (
                            SIZES[1],
                            LONG_SHAPE,
                        ):  # no graph reads numbers, as "cpu" does
                            note("compiled (aot_eager) or not", implementation, case.compiled())
                for question, found in case.decoding():
                    note(question, "auto", found)
    return counts


def main() -> None:
    for (question, implementation), found in sorted(count_equal_bits().items()):
        print(
            f"{question:40} {implementation:8} outputs {found['out']:3}, gradients {found['gradients']:3} of "
            f"{found['cases']}"
        )


if __name__ == "__main__":
    main()
