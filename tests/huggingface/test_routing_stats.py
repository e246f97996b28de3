"""Routing statistics of models of transformers, their own sparse ones too, and in the logs of the Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from support.transformers_models import make_two_lengths
from torch import Tensor, nn
from transformers import TrainerCallback

from mixture_of_experts import MoE
from mixture_of_experts.huggingface import from_transformers, log_routing
from mixture_of_experts.stats import routing_of, track_routing

from .test_block_conversion import MODELS
from .test_block_conversion import build_model as build_sparse
from .test_losses import build_model, make_batch, make_trainer


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_of_an_encoder_and_decoder(compiled):
    """`generate` calls `model.encoder` by itself, which is a forward too, and then the model for each token; in a
    forward of the whole model the encoder is a part of it."""
    model, x = build_model("t5").eval(), torch.randint(3, 64, (2, 7))
    if compiled:
        model.compile(backend="eager")
    with track_routing(model) as stats, torch.no_grad():
        model.generate(x, max_new_tokens=3, min_new_tokens=3, attention_mask=torch.ones_like(x))
        model(input_ids=x, decoder_input_ids=x[:, :5])
        with pytest.raises(RuntimeError):
            model.encoder(x.float())  # a forward that raises has a number, and no record
        model.encoder(x)
    encoder, decoder = ([name for name in stats.layers if name.startswith(part)] for part in ("encoder", "decoder"))
    steps = {layer: [(record.step, record.tokens) for record in stats.records(layer)] for layer in stats.layers}
    assert len(encoder) == len(decoder) == 2
    assert all(steps[layer] == [(0, 14), (4, 14), (6, 14)] for layer in encoder), steps
    assert all(steps[layer] == [(1, 2), (2, 2), (3, 2), (4, 10)] for layer in decoder), steps


@pytest.mark.parametrize("name", MODELS)
def test_transformers_routers_have_equal_statistics(name):
    """Every measure is what the same layer of ours has on the same tokens and mask."""
    model, (_, batch) = build_sparse(name), make_two_lengths("right")
    inputs: list[Tensor] = []
    blocks = [model.get_submodule(f"model.layers.{i}.mlp") for i in range(2)]

    def keep(block, args, kwargs):
        inputs.append((*args, *kwargs.values())[0])

    for block in blocks:
        block.register_forward_pre_hook(keep, with_kwargs=True)
    with track_routing(model) as stats:
        model(**batch)
    assert len(stats.layers) == len(blocks) == 2
    mask = batch["attention_mask"].bool()
    for layer, block, x in zip(stats.layers, blocks, inputs, strict=True):
        moe = from_transformers(block, balance_over="group")
        with track_routing(moe) as expected_stats:
            moe(x, mask=mask)
        found, expected = stats.last(layer), expected_stats.last("gate")
        assert found.tokens == expected.tokens == int(mask.sum())
        assert torch.equal(found.load, expected.load)
        assert torch.equal(found.requested, expected.requested)
        for measure in ("dropped", "unseen", "entropy", "confidence"):
            assert getattr(found, measure) == pytest.approx(getattr(expected, measure), abs=1e-5), measure
        assert found.losses == pytest.approx(dict(expected.losses), rel=1e-4)
    assert f"{stats.layers[0]} " in stats.summary()
    stats.plot()
    stats.plot(stats.layers[0])
    described = routing_of(model, **batch)
    assert tuple(described) == stats.layers
    for layer in stats.layers:
        load = torch.bincount(described[layer].expert[described[layer].kept], minlength=described[layer].num_experts)
        assert torch.equal(load, stats.last(layer).load)


def test_generation_and_checkpointing_count_once():
    model, (_, batch) = build_sparse("Mixtral"), make_two_lengths("left")
    with track_routing(model) as stats:
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prompt = int(batch["attention_mask"].sum())
    assert stats.total(stats.layers[0]).tokens == prompt + 2 * 2  # two new tokens of two sequences are read
    model.train().activation_checkpointing_enable()
    with track_routing(model) as stats:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert stats.total(stats.layers[0]).forwards == 1
    assert stats.total(stats.layers[0]).tokens == prompt


class Reporter(TrainerCallback):
    """As TensorBoard's or any other."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("theirs", [False, True])
def test_the_trainer_logs_it(tmp_path, theirs):
    model = build_sparse("Mixtral").train() if theirs else build_model()
    reporter = Reporter()
    settings = dict(max_steps=3, logging_steps=1, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    made = make_trainer(model, make_batch(16), tmp_path, **settings)
    made.add_callback(reporter)
    callback = log_routing(made, layers=True)
    model.tower = MoE(8, 4)  # as for pictures, of which the second step alone has any
    pictures = iter([[], [], [torch.randn(2, 3, 8)], [], [], []])  # of micro-batches

    def see(*_) -> None:
        for picture in next(pictures) if model.training else []:
            model.tower(picture)

    model.lm_head.register_forward_hook(see)
    made.train()
    del model.zero_grad
    steps = [logs for logs in reporter.logs if "loss" in logs]
    assert ["routing/tower.gate/max_load" in logs for logs in steps] == [False, True, False]
    assert callback.stats is not None
    gates = [callback.stats.last(layer) for layer in callback.stats.layers if layer != "tower.gate"]
    assert steps[-1]["routing/entropy"] == pytest.approx(sum(gate.entropy for gate in gates) / len(gates))
    for logs, kept in zip(steps, [entry for entry in made.state.log_history if "loss" in entry], strict=True):
        assert kept.items() >= logs.items() - {"epoch": 0}.items()
        assert 0.9 < logs["routing/balance"] < 4
        assert 0 < logs["routing/entropy"] <= math.log(8)
        assert logs["routing/dropped"] == 0
        assert logs["routing/dead_experts"] >= 0
        assert logs["routing/max_load"] >= 1
        assert any(name.endswith("gate/max_load") for name in logs)
    last = callback.stats.last(callback.stats.layers[0])
    assert last.tokens == 2 * 2 * 8  # of one optimizer step: two micro-batches of two sequences
    assert last.forwards == 2
    assert not any("routing/balance" in logs for logs in reporter.logs if "eval_loss" in logs)


def test_forwards_without_gradients_are_not_logged(tmp_path):
    """GRPO samples in training mode, and the samples have a different load than the micro-batches."""
    made = make_trainer(build_model(), make_batch(16), tmp_path, max_steps=2, logging_steps=1)
    callback, step = log_routing(made), made.training_step

    def sample_first(model: nn.Module, inputs: dict[str, Tensor], *args) -> Tensor:
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, :3])
        return step(model, inputs, *args)

    made.training_step = sample_first
    made.train()
    assert callback.stats is not None
    last = callback.stats.last(callback.stats.layers[0])
    assert (last.forwards, last.tokens) == (1, 2 * 8)


def test_training_continues_without_router_forwards(tmp_path):
    """It is told once, and trained to its end."""
    made = make_trainer(build_model(), make_batch(16), tmp_path, max_steps=2, logging_steps=1)
    callback = log_routing(made)
    begin = callback.on_train_begin

    def without_hooks(*args, **kwargs):
        begin(*args, **kwargs)
        callback._hooks.close()  # as where a graph was compiled before

    callback.on_train_begin = without_hooks
    with pytest.warns(UserWarning, match="routing statistics are no longer logged") as described:
        made.train()
    assert len([each for each in described if "routing statistics are no longer logged" in str(each.message)]) == 1
    assert made.state.global_step == 2
