"""What is known of a forward belongs to that forward: threads, nested calls and interrupted ones do not mix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from support.concurrent_calls import run_in_threads
from support.transformers_models import ARCHITECTURES, disable_dropout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import MoE, TopKGating, collect_aux
from mixture_of_experts.huggingface import aux_loss, replace_ffn
from mixture_of_experts.stats import track_routing

from .test_block_conversion import build_model as build_sparse
from .test_losses import compute_gradients, make_batch
from .test_padding import build_model

THREADS = 3


def make_batches(number: int = THREADS) -> list[dict[str, Tensor]]:
    """Each with another mask, and of another shape every second."""
    made = []
    for i in range(number):
        tokens = torch.randint(3, 64, (2, 9 + i % 2))
        mask = torch.ones_like(tokens)
        mask[i % 2, 3 + i :] = 0
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.where(mask.bool(), tokens, -100)})
    return made


def train_sparse(name: str = "llama", **settings) -> nn.Module:
    model = disable_dropout(ARCHITECTURES[name].build(**settings)).train()
    replace_ffn(model, num_experts=4, loss_coef=0.5)
    return model


# Threads


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [False, True])
def test_statistics_count_every_thread_once(theirs):
    """Each forward under its number, with its own mask, also where others are under way or checkpointing runs again."""
    model = build_sparse("Mixtral").train() if theirs else train_sparse()
    model.activation_checkpointing_enable()
    given = make_batches()
    with track_routing(model) as expected:
        for batch in given:
            model(**batch)

    def work(number: int) -> None:
        for _ in range(5):
            model(**given[number]).loss.backward()

    with track_routing(model) as found:
        run_in_threads(work, THREADS)
    for layer in found.layers:
        assert [record.forwards for record in found.records(layer)] == [1] * 5 * THREADS
        seen = sorted(tuple(record.load.tolist()) for record in found.records(layer))
        assert seen == sorted(5 * [tuple(record.load.tolist()) for record in expected.records(layer)])


# Calls within calls, interrupted ones, and those that raise


def run_once(act: Callable[[], object]) -> Callable[..., None]:
    """A forward hook that acts when it is called first."""
    left = [act]

    def hook(*_: object) -> None:
        if left:
            left.pop()()

    return hook


class Siamese(nn.Module):
    """One model, called twice in one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
        return self.model(**first).logits.logsumexp(-1).mean() + self.model(**second).logits.logsumexp(-1).mean()


def make_siamese(**settings) -> Siamese:
    model = Siamese(disable_dropout(ARCHITECTURES["llama"].build())).train()
    replace_ffn(model, num_experts=4, loss_coef=0.5, **settings)
    return model


def drop_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_a_model_that_is_called_twice_in_one_forward():
    """Both calls are in the loss that the forward returns."""
    model = make_siamese()
    pair = [drop_labels(batch) for batch in make_batches(2)]
    parts, task = [], torch.zeros(())
    for batch in pair:
        task = task + model.model(**batch).logits.logsumexp(-1).mean()
        parts.append(aux_loss(model))
    loss = model(*pair)
    torch.testing.assert_close(aux_loss(model), sum(parts))
    torch.testing.assert_close(loss, task + sum(parts))


def test_a_model_that_is_called_within_itself():
    """By a hook: the outer call keeps its mask, and its loss is its own."""
    model, (outer, inner) = build_model("llama").train(), make_batches(2)
    for module in model.modules():
        if isinstance(module, MoE):
            module.loss_coef = 0.5
    expected, alone = model(**outer), model(**inner)
    found = []
    model.model.layers[0].self_attn.register_forward_hook(run_once(lambda: found.append(model(**inner))))
    out = model(**outer)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(found[0].loss, alone.loss)


def test_inner_call_losses_reach_the_caller():
    model, (outer, inner) = train_sparse(), make_batches(2)
    model(**inner)
    of_inner, expected = aux_loss(model), model(**outer).loss
    for gradients_of_inner in (True, False):  # without gradients it has no loss to give

        def within(on: bool = gradients_of_inner) -> None:
            with torch.set_grad_enabled(on):
                model(**drop_labels(inner))

        hook = model.model.layers[0].self_attn.register_forward_hook(run_once(within))
        torch.testing.assert_close(model(**outer).loss, expected + of_inner * gradients_of_inner)
        hook.remove()


def test_retried_submodule_counts_once():
    class Tries(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            for _ in range(2):
                with contextlib.suppress(ArithmeticError):
                    return self.model(**batch).logits.logsumexp(-1).mean()
            raise AssertionError

    model, batch = Tries(disable_dropout(ARCHITECTURES["llama"].build())).train(), drop_labels(make_batches(1)[0])
    replace_ffn(model, num_experts=4, loss_coef=0.5)
    expected, failed = model(batch), []

    def fail() -> None:
        failed.append(None)
        raise ArithmeticError

    model.model.model.layers[1].register_forward_hook(run_once(fail))
    with collect_aux(model):
        torch.testing.assert_close(model(batch), expected)
    assert failed
    torch.testing.assert_close(aux_loss(model), expected - model.model(**batch).logits.logsumexp(-1).mean())


def test_nested_backward_recomputes_outside_forward():
    """With a checkpoint of one's own: its recomputation is no part of the forward around the backward."""

    class Step(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            self.model(tokens, use_cache=False).logits.logsumexp(-1).mean().backward()
            return tokens.sum()

    model, tokens = train_sparse(), make_batches(1)[0]["input_ids"]
    model(tokens)
    expected = aux_loss(model)
    for layer in model.get_submodule("model.layers").children():
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    with collect_aux(step := Step(model)) as aux, track_routing(step) as stats:
        step(tokens)
    torch.testing.assert_close(aux.take(), expected)
    torch.testing.assert_close(aux_loss(model), expected)
    assert stats.last(stats.layers[0]).forwards == 1


def test_evaluation_between_two_steps_is_not_collected():
    model, given = train_sparse(), make_batches(3)
    model(**given[0])
    expected = aux_loss(model)
    with collect_aux(model) as aux:
        for step in range(2):
            model.train()(**given[0])
            with torch.no_grad():
                model.eval()(**given[1])
                model.train()(**given[2])  # as in sampling
            torch.testing.assert_close(aux.take(), expected, msg=lambda m, step=step: f"step {step}: {m}")
        model.eval()(**given[1])
        assert aux.take() > 0  # where nothing else is asked for


# The warning


def test_unused_loss_warns():
    """A trainer that computes its own loss from the logits, though it gives labels."""
    model, batch = train_sparse(), make_batches(1)[0]
    for _ in range(2):
        model(**batch).loss.backward()
        (model(**drop_labels(batch)).logits.logsumexp(-1).mean() + aux_loss(model)).backward()
    model(**batch).logits.logsumexp(-1).mean().backward()
    with pytest.warns(UserWarning, match="gradients reached the outputs .* but not their auxiliary loss"):
        model(**batch)
    model(**batch).logits.sum().backward()
    model(**batch)  # it warns once


def test_no_warning_without_loss():
    model = disable_dropout(ARCHITECTURES["llama"].build()).train()
    replace_ffn(model, gate=lambda d, e: TopKGating(d, e), loss_coef=0.0)
    for _ in range(2):
        model(**drop_labels(make_batch(2))).logits.sum().backward()
    assert compute_gradients(model)
