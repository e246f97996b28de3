"""What else is in a batch changes nothing: padding, other sequences, later tokens; and batches at the edge of sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mixture_of_experts.verify.properties import CASES, EVAL, SMALL, keeps
from mixture_of_experts.verify.trial import OF_TOKENS, Case, DoesNotApplyError, Gap, Gaps, Outcome, Trial, finite, gap

LONG = Case(2, 1500, 6)
ALONE = (Case(64, 1, 0),)
MOST_LOST = 0.2  # of choices: an expert of few ReLU units may be silent


def at(outcome: Outcome, index: Any) -> Outcome:
    """The same of some tokens or sequences."""
    return {name: tensor[index] if name in OF_TOKENS else tensor for name, tensor in outcome.items()}


def all_of(trial: Trial) -> Tensor:
    """The index of all tokens, without their sequences."""
    return torch.ones(trial.case[:2], dtype=torch.bool)


def padded(trial: Trial, number: float) -> tuple[Tensor, Tensor]:
    """The tokens anywhere among padding, which is one number, beside a sequence of padding alone; and their mask."""
    b, n, seed, _ = trial.case
    x, noise = trial.x(), torch.rand(b + 1, 2 * n + 8, generator=torch.Generator().manual_seed(seed))
    mask = (noise.argsort(dim=-1) < n).to(x.device)
    mask[b] = False
    wide = x.new_full((*mask.shape, trial.dim), number)
    wide[mask] = x.flatten(0, 1)
    return wide, mask


@keeps("padding changes no output, loss, gradient or buffer", needs="mask", cases=CASES, steady=True)
def padding(trial: Trial) -> Gaps:
    x, mask = padded(trial, 3.0)
    alone = at(trial.step(), all_of(trial))
    yield gap(at(trial.step(x, mask), mask), alone, how=f", padded to {' x '.join(map(str, mask.shape))}")


@keeps("NaN in the padding reaches nothing", needs="mask", steady=True)
def nan_padding(trial: Trial) -> Gaps:
    (x, mask), (zeros, _) = padded(trial, float("nan")), padded(trial, 0.0)
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
    n, wanted = trial.case.tokens, trial.forward()
    for t in (1, n // 2, n - 1):
        x, earlier = trial.x(), (slice(None), slice(t))
        x[:, t:] = x[:, t - 1 : t]  # they ask for what an earlier one asks for
        yield gap(at(trial.forward(x), earlier), at(wanted, earlier), "output", f", tokens from {t} on are changed")


@keeps("tokens one by one get the outputs that they get together", cases=CASES, modes=EVAL, steady=True)
def decoding(trial: Trial) -> Gaps:
    one_by_one = [trial.forward(token)["output"] for token in trial.x().split(1, dim=1)]
    yield gap({"output": torch.cat(one_by_one, dim=1)}, trial.forward(), of="output")


@keeps("a token's bits are the same alone and in any batch", cases=CASES, steady=True, limit=0.0, by_name=True)
def invariance(trial: Trial) -> Gaps:
    """Of outputs, and of the gradients of inputs by outputs alone; and of outputs without gradients."""
    x = trial.x()
    tokens = x.flatten(0, 1)
    count = len(tokens)
    some = [torch.randperm(count)[:size] for size in (1, 2, 3, 5, count - 1, count) * 3]
    for run in (trial.forward, partial(trial.step, of="output")):
        together = at(run(x), all_of(trial))
        for piece in some:
            found = at(run(tokens[None, piece]), 0)
            yield gap(found, at(together, piece), OF_TOKENS, f", of tokens {piece.tolist()}")
        if trial.mask is not None:
            wide, mask = padded(trial, 3.0)
            yield gap(at(run(wide, mask), mask), together, OF_TOKENS, ", padded")


@keeps("each choice reaches its expert's weights", needs="router", cases=ALONE, steady=True, limit=MOST_LOST)
def every_choice(trial: Trial) -> Gaps:
    module, alone = trial.fresh(), trial.x().split(1)
    asked = torch.cat([trial.chosen(module, token) for token in alone])[:, 0]
    if asked.dtype != torch.bool:  # -1 is no expert
        asked = one_hot(asked + 1).sum(dim=1)[:, 1:]
    asked = asked.float()  # (t, e)
    reached = torch.stack([weights_reached(trial.step(token, of="output")) for token in alone]).float()  # (t, w)
    # (w) how many tokens choose the expert of these weights, which no others reach
    choosing = torch.where(reached.T @ (1 - asked) == 0, asked.sum(dim=0), torch.inf).amin(dim=-1)
    own = choosing.isfinite() & reached.any(dim=0)
    if not own.any():
        raise DoesNotApplyError("no weights are one expert's alone")
    lost = 1 - (reached.sum(dim=0)[own].sum() / choosing[own].sum()).item()
    yield Gap(lost, f"{lost:.1%} of the choices reach no weights of their own")


def weights_reached(outcome: Outcome) -> Tensor:
    """`(w)` bool, which parameters have a gradient; of those with three axes or more, which parts along the first."""
    grads = [tensor for name, tensor in outcome.items() if name.startswith("gradient")]
    return torch.cat([grad.reshape(len(grad) if grad.dim() > 2 else 1, -1).any(dim=-1) for grad in grads])


@keeps("a batch of no tokens gives finite numbers", cases=SMALL[:1])
def no_tokens(trial: Trial) -> Gaps:
    x = trial.x()
    yield finite(trial.step(x[:0]), ", of no sequences")
    yield finite(trial.step(x[:, :0]), ", of empty sequences")
    yield finite(trial.step(x, torch.zeros_like(x[..., 0], dtype=torch.bool)), ", of padding alone")


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
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # a view without sequences is possible
    for run in (trial.step, trial.forward):
        yield gap(run(strided), run(x))
