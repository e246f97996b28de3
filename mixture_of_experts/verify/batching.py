"""What else is in a batch changes nothing: padding, other sequences, later tokens; and batches at the edge of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mixture_of_experts.verify.properties import CASES, EVAL, SMALL, keeps
from mixture_of_experts.verify.trial import OF_TOKENS, Case, DoesNotApplyError, Gap, Gaps, Outcome, Trial, finite, gap

LONG, ALONE = Case(2, 1500, 6), (Case(64, 1, 0),)
MOST_LOST = 0.2  # of tokens: an expert of few ReLU units may be silent


def at(outcome: Outcome, index: Any) -> Outcome:
    """The same of some tokens or sequences."""
    return {name: tensor[index] if name in OF_TOKENS else tensor for name, tensor in outcome.items()}


def flat(outcome: Outcome) -> Outcome:
    """The same of all tokens, without their sequences."""
    return {name: tensor.flatten(0, 1) if name in OF_TOKENS else tensor for name, tensor in outcome.items()}


def padded(trial: Trial, number: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens and masks, with one number as padding: at the right, and anywhere beside a sequence of padding."""
    b, n, seed, _ = trial.case
    x, somewhere = trial.x(), torch.rand(b + 1, 2 * n + 8, generator=torch.Generator().manual_seed(seed))
    anywhere = somewhere.argsort(dim=-1) < n
    anywhere[b] = False
    for real in ((torch.arange(n + 1) < n).expand(b, n + 1), anywhere):
        mask = real.to(x.device)
        wide = x.new_full((*mask.shape, x.shape[-1]), number)
        wide[mask] = x.flatten(0, 1)
        yield wide, mask


@keeps("padding changes no output, loss, count or gradient", needs="mask", cases=CASES, steady=True)
def padding(trial: Trial) -> Gaps:
    alone = flat(trial.step())
    for x, mask in padded(trial, 3.0):
        yield gap(at(trial.step(x, mask), mask), alone, how=f", padded to {' x '.join(map(str, mask.shape))}")


@keeps("NaN in the padding reaches nothing", needs="mask", steady=True)
def nan_padding(trial: Trial) -> Gaps:
    for (x, mask), (zeros, _) in zip(padded(trial, float("nan")), padded(trial, 0.0), strict=True):
        yield gap(at(trial.step(x, mask), mask), at(trial.step(zeros, mask), mask))


@keeps("sequences in another order give the same", cases=(*CASES[2:], LONG), steady=True)
def order(trial: Trial) -> Gaps:
    turned = torch.arange(trial.case.sequences).roll(1)
    yield gap(trial.step(trial.x()[turned]), at(trial.step(), turned))


@keeps("a sequence alone gets the output that it gets in a batch", cases=CASES[2:], steady=True)
def batch(trial: Trial) -> Gaps:
    together = trial.forward()
    for i in range(trial.case.sequences):
        yield gap(trial.forward(trial.x()[[i]]), at(together, [i]), of="output")


@keeps("later tokens change no output of earlier ones", cases=CASES)
def causal(trial: Trial) -> Gaps:
    x, other, n = trial.x(), trial.x(1), trial.case.tokens
    wanted = trial.forward()
    for t in sorted({1, n // 2, n - 1}):
        earlier = (slice(None), slice(t))
        for later in (other[:, t:], x[:, t - 1 : t].expand(-1, n - t, -1)):
            found = trial.forward(torch.cat([x[earlier], later], dim=1))
            yield gap(at(found, earlier), at(wanted, earlier), "output", f", tokens from {t} on are changed")


@keeps("tokens one by one get the outputs that they get together", cases=CASES, modes=EVAL, steady=True)
def decoding(trial: Trial) -> Gaps:
    one_by_one = [trial.forward(token)["output"] for token in trial.x().split(1, dim=1)]
    yield gap({"output": torch.cat(one_by_one, dim=1)}, trial.forward(), of="output")


@keeps("a token's bits are the same alone and in any batch", cases=CASES, steady=True, limit=0.0, by_name=True)
def invariance(trial: Trial) -> Gaps:
    """Of outputs, and of the gradients of inputs by outputs alone; and of outputs without gradients."""
    x = trial.x()
    tokens, positions = x.flatten(0, 1), torch.arange(x.shape[:2].numel())
    some = [positions.flip(0)]
    for size in (1, 2, 3, 5, len(positions) - 1):
        pieces = positions.split(size)
        some += [pieces[0], pieces[len(pieces) // 2], pieces[-1]]
    for run in (trial.forward, partial(trial.step, of="output")):
        together = flat(run(x))
        for piece in some:
            found = at(run(tokens[None, piece]), 0)
            yield gap(found, at(together, piece), OF_TOKENS, f", of tokens {piece.tolist()}")
        for wide, mask in padded(trial, 3.0) if trial.mask is not None else ():
            yield gap(at(run(wide, mask), mask), together, OF_TOKENS, ", padded")


@keeps("each choice reaches its expert's weights", needs="router", cases=ALONE, steady=True, limit=MOST_LOST)
def every_choice(trial: Trial) -> Gaps:
    """A token that asks for an expert for which another does not ask reaches weights that the other does not reach."""
    x = trial.x()
    asked = trial.chosen(trial.fresh(), x)[:, 0]
    if asked.dtype != torch.bool:  # -1 is no expert
        asked = one_hot(asked + 1).sum(dim=1)[:, 1:]
    reached = beyond(torch.stack([weights_reached(trial.step(token, of="output")) for token in x.split(1)]))
    if not reached.any():
        raise DoesNotApplyError("no weights are one expert's alone")
    lost = (beyond(asked) & ~reached).any(dim=1).double().mean().item()
    yield Gap(lost, f"{lost:.1%} of the tokens lose a choice")


def beyond(sets: Tensor) -> Tensor:
    """`(t, t)` bool, whether one of the sets `(t, s)` has something that another has not."""
    sets = sets.double()
    return sets @ (1 - sets).T > 0


def weights_reached(outcome: Outcome) -> Tensor:
    """`(w)` bool, which parameters have a gradient; of those with three axes or more, which parts along the first."""
    grads = [tensor for name, tensor in outcome.items() if name.startswith("gradient")]
    return torch.cat([grad.reshape(len(grad) if grad.dim() > 2 else 1, -1).any(dim=-1) for grad in grads])


@keeps("a batch of no tokens gives finite numbers", cases=SMALL[:1])
def no_tokens(trial: Trial) -> Gaps:
    x = trial.x()
    yield finite(trial.step(x.new_empty(0, 3, trial.dim)), ", of no sequences")
    yield finite(trial.step(x.new_empty(2, 0, trial.dim)), ", of empty sequences")
    padding = x.new_zeros(2, 3, trial.dim)
    yield finite(trial.step(padding, padding[..., 0].bool()), ", of padding alone")


@keeps("a token alone, equal ones, zeros and large numbers give finite numbers")
def extremes(trial: Trial) -> Gaps:
    x = trial.x()
    yield finite(trial.step(x[:1, :1]), ", of one token")
    yield finite(trial.step(x[:1, :1].expand_as(x)), ", of equal tokens")
    for factor in (0, 100):
        yield finite(trial.step(factor * x), f", of tokens times {factor}")


@keeps("strided tokens and gradients give the same", steady=True)
def strides(trial: Trial) -> Gaps:
    x = trial.x()
    for strided in (torch.stack([x, x], dim=-1)[..., 0], x.mT.contiguous().mT):
        for run in (trial.step, trial.forward):
            yield gap(run(strided), run(x))
