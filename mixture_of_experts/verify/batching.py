"""What else is in a batch changes nothing: padding, other sequences, later tokens; and batches at the edge of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixture_of_experts.verify.properties import CASES, EVAL, SMALL, keeps
from mixture_of_experts.verify.subject import OF_TOKENS, Case, DoesNotApplyError, Gap, Outcome, Sample, Trial, gap

POOL = 2048  # tokens among which an even load is looked for
LONG = Case(2, 1500, 6)
MOST_LOST = 0.2  # of choices: an expert of few ReLU units may be silent


def at(outcome: Outcome, index: Any) -> Outcome:
    """The same of some tokens or sequences."""
    return {name: tensor[index] if name in OF_TOKENS else tensor for name, tensor in outcome.items()}


def real_positions(case: Case) -> Iterator[Tensor]:
    """Masks with n real tokens in each of b sequences: padding at the right, at the left, anywhere, and a sequence of
    padding alone."""
    b, n = case.sequences, case.tokens
    yield (torch.arange(n + 1) < n).expand(b, n + 1)
    yield (torch.arange(n + 3) >= 3).expand(b, n + 3)
    yield torch.rand(b, 2 * n + 8, generator=torch.Generator().manual_seed(case.seed)).argsort(dim=-1) < n
    yield (torch.arange(b + 1) < b).unsqueeze(1).expand(b + 1, n)


@keeps("padding changes no output, loss, count or gradient", "mask", cases=CASES, steady=True)
def padding(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    alone = at(trial.step(sample), torch.ones(sample.x.shape[:2], dtype=torch.bool))
    for real in real_positions(trial.case):
        found = at(trial.step(sample.padded(real)), real)
        yield gap(found, alone, how=f", padded to {' x '.join(map(str, real.shape))}")


@keeps("NaN in the padding reaches nothing", "mask", steady=True)
def nan_padding(trial: Trial) -> Iterator[Gap]:
    for real in real_positions(trial.case):
        found, wanted = (trial.step(trial.sample().padded(real, number)) for number in (float("nan"), 0.0))
        yield gap(at(found, real), at(wanted, real))


@keeps("sequences in another order give the same", cases=(*CASES[2:], LONG), steady=True)
def order(trial: Trial) -> Iterator[Gap]:
    sample, turned = trial.sample(), torch.arange(trial.case.sequences).roll(1)
    yield gap(trial.step(sample.at(turned)), at(trial.step(sample), turned))


@keeps("a sequence alone gets the output that it gets in a batch", cases=CASES[2:], steady=True)
def batch(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    together = trial.forward(sample)
    for i in range(trial.case.sequences):
        yield gap(trial.forward(sample.at([i])), at(together, [i]), of="output")


@keeps("later tokens change no output of earlier ones", cases=CASES)
def causal(trial: Trial) -> Iterator[Gap]:
    sample, other, n = trial.sample(), trial.sample(1), trial.case.tokens
    wanted = trial.forward(sample)
    for t in sorted({1, n // 2, n - 1}):
        for later in (other.x[:, t:], sample.x[:, t - 1 : t].expand(-1, n - t, -1)):
            found = trial.forward(replace(sample, x=torch.cat([sample.x[:, :t], later], dim=1)))
            earlier = (slice(None), slice(t))
            yield gap(at(found, earlier), at(wanted, earlier), "output", f", tokens from {t} on are changed")


@keeps("tokens one by one get the outputs that they get together", cases=CASES, modes=EVAL, steady=True)
def decoding(trial: Trial) -> Iterator[Gap]:
    sample, n = trial.sample(), trial.case.tokens
    one_by_one = [trial.forward(sample.at((slice(None), slice(t, t + 1))))["output"] for t in range(n)]
    yield gap({"output": torch.cat(one_by_one, dim=1)}, trial.forward(sample), of="output")


@keeps("a token's bits are the same alone and in any batch", cases=CASES, steady=True, limit=0.0, by_name=True)
def invariance(trial: Trial) -> Iterator[Gap]:
    """Of outputs, and of the gradients of inputs by outputs alone; and of outputs without gradients."""
    sample, (b, n) = trial.sample(), (trial.case.sequences, trial.case.tokens)
    alone = replace(sample, x=sample.x.flatten(0, 1)[None], cotangent=sample.cotangent.flatten(0, 1)[None])
    others = [(slice(None), torch.arange(b * n).flip(0))]  # all tokens in one sequence, backwards
    for size in {1, 2, 3, 5, n - 1} & {*range(1, n + 1)}:
        others += [(slice(None), slice(start, start + size)) for start in (0, n // 2, b * n - size)]
    padded = list(real_positions(trial.case)) if trial.subject.told.get("mask") is not None else []
    for run in (trial.forward, partial(trial.step, of="output")):
        together = run(sample)
        flat = {name: tensor.flatten(0, 1)[None] for name, tensor in together.items() if name in OF_TOKENS}
        for here in others:
            yield bits(run(alone.at(here)), at(flat, here), f", of tokens {here[1]}")
        for real in padded:
            yield bits(at(run(sample.padded(real)), real), at(flat, 0), ", padded")


def bits(found: Outcome, wanted: Outcome, how: str) -> Gap:
    """How many numbers of the tokens' outputs and gradients are not the same."""
    differ = {name: int((found[name] != wanted[name]).sum()) for name in wanted}
    return Gap(sum(differ.values()), f"other bits of {', '.join(name for name, count in differ.items() if count)}{how}")


@keeps("at an even load no choice is dropped", "router", cases=(Case(1, 96, 0),), steady=True, limit=0.0)
def even_load(trial: Trial) -> Iterator[Gap]:
    pool = trial.subject.sample(Case(POOL, 1, trial.case.seed))
    sample = pool.at(evenly(asked_alone(trial, pool), trial.case.tokens))
    alone = trial.forward(sample)["output"][:, 0]
    together = trial.forward(replace(sample, x=sample.x.transpose(0, 1)))["output"][0]
    lost = (together - alone).abs().amax(dim=-1) > trial.subject.limit * alone.abs().max()
    yield Gap(lost.double().mean().item(), f"{lost.double().mean():.1%} of the tokens lose a choice")


@keeps("each choice reaches its expert's weights", "router", cases=(Case(64, 1, 0),), steady=True, limit=MOST_LOST)
def every_choice(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    asked = asked_alone(trial, sample).float()  # (t, e)
    reached = torch.stack([weights_of(trial.step(sample.at([t]), of="output")) for t in range(len(asked))]).float()
    # (w) how many tokens choose the expert of these weights, which no others reach
    choosing = torch.where(reached.T @ (1 - asked) == 0, asked.sum(dim=0), torch.inf).amin(dim=-1)
    own = choosing.isfinite() & reached.any(dim=0)
    if not own.any():
        raise DoesNotApplyError("no weights are one expert's alone")
    lost = 1 - reached.sum(dim=0)[own].sum() / choosing[own].sum()
    yield Gap(lost.item(), f"{lost:.1%} of the choices reach no weights of their own")


def weights_of(outcome: Outcome) -> Tensor:
    """`(w)` bool, which parameters have a gradient; of those with three axes or more, which parts along the first."""
    grads = [tensor for name, tensor in outcome.items() if name.startswith("gradient")]
    return torch.cat([(g if g.dim() > 2 else g[None, None]).flatten(1).any(dim=-1).cpu() for g in grads])


def asked_alone(trial: Trial, sample: Sample) -> Tensor:
    """`(b, e)` bool, the experts of each sequence's one token."""
    asked = trial.subject.chosen(trial.fresh(), sample.x)[:, 0].cpu()
    if asked.all(dim=-1).any():
        raise DoesNotApplyError("a token alone is computed by every expert")
    return asked


def evenly(asked: Tensor, count: int) -> list[int]:
    """Tokens of `asked` `(t, e)` bool that ask all experts for the same number of choices."""
    load, cost, picked = torch.zeros(asked.shape[-1]), torch.zeros(len(asked)), []
    for _ in range(count):
        picked.append(int((cost + (load * asked).sum(-1) / asked.sum(-1).clamp(min=1)).argmin()))
        cost[picked[-1]] = 1e9
        load += asked[picked[-1]]
        if load.min() == load.max() and len(picked) >= count // 2:
            return picked
    raise DoesNotApplyError(f"no even load was found among {POOL} tokens")


@keeps("a batch of no tokens gives finite numbers", cases=SMALL[:1])
def no_tokens(trial: Trial) -> Iterator[Gap]:
    first, second = (trial.subject.sample(case) for case in (Case(0, 3, 0), Case(2, 0, 0)))
    for sample in (first, second, second.padded(torch.zeros(2, 3, dtype=torch.bool))):
        yield finite(trial.step(sample))


@keeps("a single token gives finite numbers")
def one_token(trial: Trial) -> Iterator[Gap]:
    yield finite(trial.step(trial.sample().at((slice(1), slice(1)))))


@keeps("tokens that are all the same give finite numbers", cases=CASES)
def one_expert(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    yield finite(trial.step(replace(sample, x=sample.x[:1, :1].expand_as(sample.x))))


@keeps("tokens of zeros, and 100 times as large, give finite numbers")
def magnitude(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    for factor in (0, 100):
        yield finite(trial.step(replace(sample, x=factor * sample.x)), how=f", of tokens times {factor}")


@keeps("strided tokens and gradients give the same")
def strides(trial: Trial) -> Iterator[Gap]:
    sample = trial.sample()
    strided = Sample(torch.stack([sample.x] * 2, dim=-1)[..., 0], sample.cotangent.mT.contiguous().mT)
    for run in (trial.step, trial.forward):
        yield gap(run(strided), run(sample))


def finite(outcome: Outcome, how: str = "") -> Gap:
    """How many numbers of an outcome are not finite, and in which of its tensors."""
    wrong = {name: int((~tensor.isfinite()).sum()) for name, tensor in outcome.items()}
    return Gap(sum(wrong.values()), f"not finite: {', '.join(name for name, count in wrong.items() if count)}{how}")
