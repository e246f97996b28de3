"""The loss of a training forward holds the auxiliary loss, exactly and once, in every way of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.transformers_models import ARCHITECTURES, VOCABULARY, disable_dropout
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mixture_of_experts.huggingface import aux_loss, replace_ffn
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards

COEFFICIENT = 0.5  # large, so that an error in the weight of the auxiliary loss shows


def build_model(name: str = "llama", **settings) -> nn.Module:
    model = disable_dropout(ARCHITECTURES[name].build(**settings)).train()
    replace_ffn(model, num_experts=4, loss_coef=COEFFICIENT)
    return model


def make_batch(rows: int, name: str = "llama", n: int = 8) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (rows, n))
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def compute_task_and_aux(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both losses by hand, from one forward without labels."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    task = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return task, aux_loss(model)


def compute_gradients(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    router = [grad.abs().max() for name, grad in expected.items() if name.endswith("w_gating")]
    assert min(router) > 1e-3, "the routers learn nothing"
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, atol=tolerance, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_training_forward(as_tuple):
    model, batch = build_model(), make_batch(3)
    task, aux = compute_task_and_aux(model, batch)
    expected = compute_gradients(model, task + aux)
    out = model(**batch, return_dict=not as_tuple)
    loss = out[0] if as_tuple else out.loss
    assert isinstance(out, tuple) == as_tuple
    torch.testing.assert_close(loss, task + aux)
    torch.testing.assert_close(aux_loss(model), aux)  # and can still be read
    assert_same(compute_gradients(model, loss), expected)


def test_evaluation_leaves_the_loss_alone():
    model, batch = build_model(), make_batch(3)
    task, _ = compute_task_and_aux(model, batch)
    torch.testing.assert_close(model.eval()(**batch).loss, task)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**batch).loss, task)


@pytest.mark.parametrize("load", [False, True])
def test_the_configuration_has_the_coefficient_of_the_layers(load, tmp_path):
    """Not 1.0, which no layer has. One that is set holds in its place, also after loading; 0 switches the loss off."""
    model, batch = build_model(), make_batch(3)
    assert model.config.router_aux_loss_coef == COEFFICIENT
    task, aux = compute_task_and_aux(model, batch)
    for coef in (COEFFICIENT, 0.01, 0.0):
        model.config.router_aux_loss_coef = coef
        if load:
            model.save_pretrained(tmp_path / str(coef))
            model = type(model).from_pretrained(tmp_path / str(coef)).train()
        torch.testing.assert_close(model(**batch).loss, task + coef / COEFFICIENT * aux)
        out = model(**batch, output_router_logits=True)
        torch.testing.assert_close(out.aux_loss * COEFFICIENT, aux)


def test_other_losses_without_a_balancing_loss():
    """Their factor is 1, and 0 switches them off."""
    model, batch = disable_dropout(ARCHITECTURES["llama"].build()).train(), make_batch(3)
    replace_ffn(model, num_experts=4, loss_coef=0.0, z_loss_coef=0.1)
    task, aux = compute_task_and_aux(model, batch)
    assert aux > 0
    torch.testing.assert_close(model(**batch).loss, task + aux)
    model.config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(model(**batch).loss, task)


def test_gradient_scaler_in_half_precision():
    """What comes out after unscaling is what an unscaled backward gives, the auxiliary loss's part too."""
    model, batch = build_model(), make_batch(3)
    with torch.autocast("cpu", dtype=torch.float16):
        expected = compute_gradients(model, sum(compute_task_and_aux(model, batch)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**batch).loss
    model.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = compute_gradients(model)
    for name, grad in expected.items():  # rounding of float16 by 1e-3; without the auxiliary loss it were 0.2 and more
        assert (found[name] - grad).norm() <= 3e-3 * grad.norm(), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_checkpointing(name):
    model, batch = build_model(name), make_batch(3)
    expected = compute_gradients(model, model(**batch).loss)
    model.activation_checkpointing_enable()
    out = model(**batch)
    aux = aux_loss(model)
    assert_same(compute_gradients(model, out.loss), expected)
    assert aux_loss(model) is aux or torch.equal(aux_loss(model), aux)  # the recomputation left it alone


def test_models_of_several_parts():
    """Encoder and decoder count, and a part that does not run adds nothing of an earlier forward."""
    model = build_model("t5")
    inputs = ARCHITECTURES["t5"].inputs()
    encoded = model.encoder(inputs["input_ids"])
    of_encoder = aux_loss(model)
    assert len(find_feed_forwards(model)) == 4
    model(**inputs)
    both = aux_loss(model)
    model(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"])
    torch.testing.assert_close(aux_loss(model) + of_encoder, both)


def test_aux_loss_without_forward_raises():
    with pytest.raises(RuntimeError, match=r"Llama.* no auxiliary loss; .* run a forward pass"):
        aux_loss(build_model())


# The Trainer, and accelerate


def make_trainer(model: nn.Module, rows: dict[str, Tensor], tmp_path: Path, **settings) -> Trainer:
    data = [{name: value[i] for name, value in rows.items()} for i in range(len(rows["input_ids"]))]
    plain = dict(per_device_train_batch_size=2, max_steps=1, learning_rate=0.0, optim="sgd", max_grad_norm=0.0, seed=0)
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    arguments = TrainingArguments(tmp_path, **{**plain, **quiet, **settings})
    made = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    made.found = []
    zero_grad = model.zero_grad

    def keep(*args, **kwargs):
        made.found.append(compute_gradients(model))
        return zero_grad(*args, **kwargs)

    model.zero_grad = keep
    return made


def compute_trained_gradients(
    model: nn.Module, rows: dict[str, Tensor], tmp_path: Path, **settings
) -> dict[str, Tensor]:
    """Those of the first optimizer step."""
    made = make_trainer(model, rows, tmp_path, **settings)
    made.train()
    del model.zero_grad
    return next(found for found in made.found if found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_is_the_whole_batch_at_once(tmp_path, name, checkpointing):
    model, rows = build_model(name), make_batch(8)
    whole = compute_gradients(model, model(**rows).loss)
    model.zero_grad()
    found = compute_trained_gradients(
        model, rows, tmp_path, gradient_accumulation_steps=4, activation_checkpointing=checkpointing
    )
    assert_same(found, whole)


@pytest.mark.parametrize(("name", "first"), [("llama", 1), ("t5", 0)])
def test_accumulation_weights_by_labels(tmp_path, name, first):
    """Micro-batches of unequal numbers of labels: each loss counts by its share of them, also of models whose own loss
    is a mean over the micro-batch."""
    model, rows = build_model(name), make_batch(4)
    rows["labels"] = rows["labels"].clone()
    rows["labels"][:3, 5:] = -100
    micro = [{name: value[i : i + 1] for name, value in rows.items()} for i in range(4)]
    labels = torch.tensor([(part["labels"][:, first:] != -100).sum() for part in micro])
    total = torch.zeros(())
    for part, share in zip(micro, labels / labels.sum(), strict=True):
        total = total + share * model(**part).loss
    expected = compute_gradients(model, total)
    model.zero_grad()
    found = compute_trained_gradients(
        model, rows, tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=1
    )
    assert_same(found, expected)


def test_a_micro_batch_without_labels_adds_nothing():
    model, batch = build_model(), make_batch(2)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=torch.tensor(9)).loss
    assert loss == 0
    assert all(not grad.any() for grad in compute_gradients(model, loss).values())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_share_of_a_batch_in_evaluation(name):
    """The loss of a micro-batch is its part of the sum, without the auxiliary loss."""
    model, batch = build_model(name).eval(), make_batch(2)
    number = (batch["labels"][:, 1 if name == "llama" else 0 :] != -100).sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=4 * number).loss, model(**batch).loss / 4)


@pytest.mark.slow
def test_label_smoothing_warns(tmp_path):
    model, rows = build_model(), make_batch(4)
    with pytest.warns(UserWarning, match=r"does not include it, or another loss .* aux_loss\(model\)"):
        compute_trained_gradients(model, rows, tmp_path, label_smoothing_factor=0.1, max_steps=2)

    class WithAuxLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + aux_loss(model)
            return (loss, out) if return_outputs else loss

    model = build_model()
    made = make_trainer(model, rows, tmp_path, label_smoothing_factor=0.1, max_steps=2)
    made.__class__ = WithAuxLoss
    made.train()
    del model.zero_grad
