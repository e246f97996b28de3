"""Measures batching properties: results are independent of padding, other sequences and later tokens, and edge cases
work."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mixture_of_experts.verify.properties import CASES, EVAL_ONLY, SMALL_CASES, layer_property
from mixture_of_experts.verify.trial import (
    TOKEN_TENSORS,
    Case,
    Deviation,
    Deviations,
    NotApplicableError,
    Outcome,
    Trial,
    compare_outcomes,
    count_non_finite,
    layer_packing_unsupported_reason,
)

LONG_CASE = Case(2, 1500, 6)
SINGLE_TOKEN_CASES = (Case(64, 1, 0),)
# maximum fraction of lost choices; an expert with few ReLU units may output zeros
MAX_LOST_CHOICE_SHARE = 0.2


def select_tokens(outcome: Outcome, index: Any) -> Outcome:
    """Select tokens or sequences from an outcome."""
    return {name: tensor[index] if name in TOKEN_TENSORS else tensor for name, tensor in outcome.items()}


def mark_all_tokens(trial: Trial) -> Tensor:
    """Return a bool mask that selects all tokens. Indexing a batch with this mask flattens the sequences."""
    return torch.ones(trial.case[:2], dtype=torch.bool)


def make_padded_batch(trial: Trial, number: float) -> tuple[Tensor, Tensor]:
    """Return a padded batch and its mask. The tokens are scattered among constant padding, and the last sequence
    consists only of padding."""
    b, n, seed, _ = trial.case
    x, noise = trial.make_tokens(), torch.rand(b + 1, 2 * n + 8, generator=torch.Generator().manual_seed(seed))
    mask = (noise.argsort(dim=-1) < n).to(x.device)
    mask[b] = False
    wide = x.new_full((*mask.shape, trial.dim), number)
    wide[mask] = x.flatten(0, 1)
    return wide, mask


@layer_property(
    "padding does not change outputs, losses, gradients or buffers",
    needs="mask",
    cases=CASES,
    is_deterministic_only=True,
)
def padding(trial: Trial) -> Deviations:
    x, mask = make_padded_batch(trial, 3.0)
    alone = select_tokens(trial.step(), mark_all_tokens(trial))
    yield compare_outcomes(
        select_tokens(trial.step(x, mask), mask), alone, context=f", padded to {' x '.join(map(str, mask.shape))}"
    )


@layer_property("NaN in the padding does not spread", needs="mask", is_deterministic_only=True)
def nan_padding(trial: Trial) -> Deviations:
    (x, mask), (zeros, _) = make_padded_batch(trial, float("nan")), make_padded_batch(trial, 0.0)
    yield compare_outcomes(select_tokens(trial.step(x, mask), mask), select_tokens(trial.step(zeros, mask), mask))


@layer_property(
    "documents packed into a row get the same outputs, losses and gradients as in separate rows",
    needs="segment_ids",
    cases=CASES,
    is_deterministic_only=True,
)
def packing(trial: Trial) -> Deviations:
    if (reason := layer_packing_unsupported_reason(trial.module)) is not None:
        raise NotApplicableError(reason)
    x, (b, n, seed, _) = trial.make_tokens(), trial.case
    ids = torch.randperm(b * n, generator=torch.Generator().manual_seed(seed)) // n
    place = ids.argsort(stable=True)  # token positions, sorted by document
    packed, ids = x.flatten(0, 1)[place.argsort()].unsqueeze(0), ids.unsqueeze(0).to(x.device)
    found = select_tokens(trial.step(packed, segment_ids=ids), (0, place))
    yield compare_outcomes(found, select_tokens(trial.step(), mark_all_tokens(trial)), context=f", {b} in a row")


@layer_property("reordering the sequences changes no result", cases=(*CASES[2:], LONG_CASE), is_deterministic_only=True)
def order(trial: Trial) -> Deviations:
    turned = torch.arange(trial.case.num_sequences).roll(1)
    yield compare_outcomes(trial.step(trial.make_tokens()[turned]), select_tokens(trial.step(), turned))


@layer_property("a sequence alone gets the same output as in a batch", cases=CASES[2:], is_deterministic_only=True)
def batch(trial: Trial) -> Deviations:
    together = trial.forward()
    for i in range(trial.case.num_sequences):
        yield compare_outcomes(trial.forward(trial.make_tokens()[[i]]), select_tokens(together, [i]), names="output")


@layer_property("later tokens do not change outputs of earlier ones", cases=CASES)
def causal(trial: Trial) -> Deviations:
    n, wanted = trial.case.num_tokens, trial.forward()
    for t in (1, n // 2, n - 1):
        x, earlier = trial.make_tokens(), (slice(None), slice(t))
        x[:, t:] = x[:, t - 1 : t]  # tokens from t on request the same experts as token t - 1
        yield compare_outcomes(
            select_tokens(trial.forward(x), earlier),
            select_tokens(wanted, earlier),
            "output",
            f", tokens from {t} on are changed",
        )


@layer_property(
    "tokens decoded one by one get the same outputs as together",
    cases=CASES,
    modes=EVAL_ONLY,
    is_deterministic_only=True,
)
def decoding(trial: Trial) -> Deviations:
    one_by_one = [trial.forward(token)["output"] for token in trial.make_tokens().split(1, dim=1)]
    yield compare_outcomes({"output": torch.cat(one_by_one, dim=1)}, trial.forward(), names="output")


@layer_property(
    "a token's result is bitwise the same alone and in any batch",
    cases=CASES,
    is_deterministic_only=True,
    limit=0.0,
    is_opt_in=True,
)
def invariance(trial: Trial) -> Deviations:
    """Compare the outputs of a forward pass. Also compare the outputs and input gradients of a step without the
    auxiliary loss."""
    x = trial.make_tokens()
    tokens = x.flatten(0, 1)
    count = len(tokens)
    some = [torch.randperm(count)[:size] for size in (1, 2, 3, 5, count - 1, count) * 3]
    for run in (trial.forward, partial(trial.step, loss_from="output")):
        together = select_tokens(run(x), mark_all_tokens(trial))
        for piece in some:
            found = select_tokens(run(tokens[None, piece]), 0)
            yield compare_outcomes(
                found, select_tokens(together, piece), TOKEN_TENSORS, f", of tokens {piece.tolist()}"
            )
        if trial.mask is not None:
            wide, mask = make_padded_batch(trial, 3.0)
            yield compare_outcomes(select_tokens(run(wide, mask), mask), together, TOKEN_TENSORS, ", padded")


@layer_property(
    "each choice affects the gradients of its expert's weights",
    needs="router",
    cases=SINGLE_TOKEN_CASES,
    is_deterministic_only=True,
    limit=MAX_LOST_CHOICE_SHARE,
)
def every_choice(trial: Trial) -> Deviations:
    module, alone = trial.copy_module(), trial.make_tokens().split(1)
    asked = torch.cat([trial.read_choices(module, token) for token in alone])[:, 0]
    if asked.dtype != torch.bool:  # -1 means no expert
        asked = one_hot(asked + 1).sum(dim=1)[:, 1:]
    asked = asked.float()  # (t, e)
    rows, grads = [], []
    for token in alone:
        grads = split_weight_gradients(trial.step(token, loss_from="output"))
        rows.append([bool(grad.any()) for grad in grads])
    reached = torch.tensor(rows).to(asked)  # (t, w)
    # (w): number of tokens that choose the weight's expert, that is, the expert chosen by all tokens that reach the
    # weight
    candidates = torch.where(reached.T @ (1 - asked) == 0, asked.sum(dim=0), torch.inf)  # (w, e)
    choosing = candidates.amin(dim=-1)
    own = choosing.isfinite() & reached.any(dim=0)
    if not own.any():
        raise NotApplicableError("the module has no weights that belong to a single expert")
    owners = (candidates == choosing.unsqueeze(-1))[own].any(dim=0)  # (e)
    idle = count_idle_experts([grad.shape for grad in grads], own, ~reached.any(dim=0), int(owners.sum()))
    # identity experts own no weights either, so count the choices of the least chosen experts
    idle_choices = asked.sum(dim=0)[~owners].sort().values[:idle].sum()
    wanted = choosing[own].sum() + idle_choices * own.sum() / owners.sum()
    lost = 1 - (reached.sum(dim=0)[own].sum() / wanted).item()
    yield Deviation(lost, f"{lost:.1%} of the choices reach no weights of their own")


def split_weight_gradients(outcome: Outcome) -> list[Tensor]:
    """Return the gradients of a module's weights. A parameter has one weight for each slice along its first dimension
    if it has three or more dimensions, and a single weight otherwise."""
    grads = [tensor for name, tensor in outcome.items() if name.startswith("gradient")]
    return [each for grad in grads for each in (grad if grad.dim() > 2 else grad.unsqueeze(0))]


def count_idle_experts(shapes: list[torch.Size], own: Tensor, unused: Tensor, num_owners: int) -> int:
    """Return the number of experts that no token reaches. Their weights have the shapes of weights that belong to other
    experts.

    Args:
        shapes, own, unused: each weight's shape, whether it belongs to an expert, and whether no token reaches it.
        num_owners: number of experts that own weights.
    """
    owned, idle = (Counter(compress(shapes, mask)) for mask in (own, unused))
    return min(idle[shape] * num_owners // count for shape, count in owned.items())


@layer_property("an empty batch gives finite numbers", cases=SMALL_CASES[:1])
def no_tokens(trial: Trial) -> Deviations:
    x = trial.make_tokens()
    yield count_non_finite(trial.step(x[:0]), ", of no sequences")
    yield count_non_finite(trial.step(x[:, :0]), ", of empty sequences")
    yield count_non_finite(trial.step(x, torch.zeros_like(x[..., 0], dtype=torch.bool)), ", of padding alone")


@layer_property("a single token, equal tokens, zeros and large numbers give finite numbers")
def extremes(trial: Trial) -> Deviations:
    x = trial.make_tokens()
    yield count_non_finite(trial.step(x[:1, :1]), ", of one token")
    yield count_non_finite(trial.step(x[:1, :1].expand_as(x)), ", of equal tokens")
    for factor in (0, 100):
        yield count_non_finite(trial.step(factor * x), f", of tokens times {factor}")


@layer_property("strided tokens and gradients give the same results", is_deterministic_only=True)
def strides(trial: Trial) -> Deviations:
    x = trial.make_tokens()
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # (b, n) can still be flattened to a view
    for run in (trial.step, trial.forward):
        yield compare_outcomes(run(strided), run(x))
