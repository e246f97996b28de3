"""What of a layer is the same to the last bit, whatever stands beside a token: the table of docs/trust.md.

    python -m tests.support.bits

For every way of computing on this machine's CPU, and each question, it prints in how many of the cases not a bit of the
outputs, or of the inputs' gradients, of one sequence differs. A case is a dtype, a size of the layer and one change.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_experts import GatedExperts, MoE, TopKGating, ops

WAYS = ("cpu", "grouped", "lean", "plain")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = ((8, 16, 4), (64, 96, 8), (256, 512, 8))  # d, h, e
BATCH, LENGTH = 6, 32


class Outcome(NamedTuple):
    """Outputs `(b, n, d)`, gradients of the inputs `(b, n, d)`, and of all parameters."""

    out: Tensor
    grad: Tensor
    of_parameters: list[Tensor]

    def sequence(self, index: int) -> Outcome:
        return Outcome(self.out[index], self.grad[index], [])

    def tokens(self, stop: int) -> Outcome:
        return Outcome(self.out[:stop], self.grad[:stop], [])


def layer_of(size: tuple[int, int, int], dtype: torch.dtype) -> MoE:
    """A dropless layer of two choices: what Mixtral has."""
    d, h, e = size
    torch.manual_seed(0)
    return MoE(d, gate=TopKGating(d, e), experts=GatedExperts(d, e, h)).to(dtype)


def run(layer: Callable, x: Tensor, weigh: Tensor, parameters: list[Tensor]) -> Outcome:
    """Forward and backward; each token's output is weighed as it is elsewhere."""
    x = x.detach().requires_grad_()
    out, _ = layer(x)  # the losses are means over all tokens, and so are their gradients
    grad, *others = torch.autograd.grad((out * weigh).sum(), [x, *parameters])
    return Outcome(out.detach(), grad, others)


def decoded(layer: MoE, x: Tensor) -> Tensor:
    """The outputs of eval without gradients, where a few tokens are computed in another way."""
    with torch.no_grad():
        return layer.eval()(x)[0]


def comparisons(layer: MoE, compiled: Callable, x: Tensor, weigh: Tensor) -> Iterator[tuple[str, Outcome, Outcome]]:
    """Each question, with two results in which the same is asked for."""
    parameters = list(layer.parameters())

    def of(x: Tensor, weigh: Tensor, module: Callable = layer) -> Outcome:
        return run(module, x, weigh, parameters)

    torch.set_num_threads(1)
    whole = of(x, weigh)
    yield "run to run", of(x, weigh), whole
    others = torch.cat([x[:1], torch.randn_like(x[1:])])
    yield "other sequences beside it", of(others, weigh).sequence(0), whole.sequence(0)
    yield "another place in the batch", of(x.roll(3, 0), weigh.roll(3, 0)).sequence(3), whole.sequence(0)
    for number in (1, 2, 5):
        yield "another number of sequences", of(x[:number], weigh[:number]).sequence(0), whole.sequence(0)
    for stop in (1, 7):
        alone = of(x[:1, :stop], weigh[:1, :stop]).sequence(0)
        yield "a prefix of it alone", alone, whole.sequence(0).tokens(stop)
    torch.set_num_threads(2)
    yield "one thread or two", of(x, weigh), whole
    yield "run to run, two threads", of(x, weigh), of(x, weigh)
    torch.set_num_threads(1)
    yield "compiled (aot_eager) or not", of(x, weigh, compiled), whole


def is_equal(one: Outcome, other: Outcome, gradients: bool) -> bool:
    if not gradients:
        return torch.equal(one.out, other.out)
    pairs = zip([one.grad, *one.of_parameters], [other.grad, *other.of_parameters], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def measure(ways: tuple[str, ...]) -> dict[tuple[str, str], collections.Counter]:
    """How many cases there are for each (question, way), and in how many outputs and gradients are equal."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for dtype in DTYPES:
        for size in SIZES:
            layer, generator = layer_of(size, dtype), torch.Generator().manual_seed(1)
            x, weigh = (torch.randn(BATCH, LENGTH, size[0], generator=generator).to(dtype) for _ in range(2))
            for way in ways:
                torch._dynamo.reset()
                compiled = torch.compile(layer, backend="aot_eager") if way != "cpu" else layer
                with ops.use(way):
                    for question, one, other in comparisons(layer.train(), compiled, x, weigh):
                        of_case = counts[question, way]
                        of_case["cases"] += 1
                        for name, gradients in (("out", False), ("grad", True)):
                            of_case[name] += is_equal(one, other, gradients)
                            if not is_equal(one, other, gradients):
                                of_case[f"{name} differs: {dtype} {size}"] += 1
            for number in (1, 2, 5):
                tokens = x[:, :1]
                of_case = counts["decoding: another number of sequences", "cpu"]
                of_case["cases"] += 1
                of_case["out"] += torch.equal(decoded(layer, tokens[:number])[0], decoded(layer, tokens)[0])
            again = counts["decoding: run to run", "cpu"]
            again["cases"] += 1
            again["out"] += torch.equal(decoded(layer, x[:, :1]), decoded(layer, x[:, :1]))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--details", action="store_true")
    details = parser.parse_args().details
    counts = measure(WAYS)
    for (question, way), found in counts.items():
        print(f"{question:40} {way:8} out {found['out']:3}, gradients {found['grad']:3} of {found['cases']}")
        if details:
            print("".join(f"    {name}: {number}\n" for name, number in found.items() if "differs" in name), end="")


if __name__ == "__main__":
    main()
