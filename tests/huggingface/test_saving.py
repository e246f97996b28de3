"""What is saved of a swapped model is what is loaded, here and in another process, or nothing is."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.transformers_families import build_model as build_family
from support.transformers_models import ARCHITECTURES, DIM
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from mixture_of_experts import ExpertChoiceGating, NoisyTopKGating, Top2Gating, TopKGating, force_routing
from mixture_of_experts.gating import ReLUGating, SparseMixerGating, TopPGating
from mixture_of_experts.huggingface import from_pretrained, from_transformers, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.private_transformers import clear_weight_conversions
from mixture_of_experts.huggingface.replacement.replace import set_attribute
from mixture_of_experts.huggingface.saving import layer_settings
from mixture_of_experts.wrappers import GatedSharedExpert

from .test_losses import build_model, make_batch, make_trainer

pytestmark = pytest.mark.slow

GATES = {
    "Top2Gating": lambda d, e: Top2Gating(d, e, second_policy_eval="threshold", second_threshold_eval=0.3),
    "TopKGating": lambda d, e: TopKGating(
        d, e, 2, score="sigmoid", scale=2.5, num_groups=2, top_groups=1, expert_bias=True, bias=True, normalize=False
    ),
    "NoisyTopKGating": lambda d, e: NoisyTopKGating(d, e, 3, capacity_factor_train=1.5, priority="token"),
    "ExpertChoiceGating": lambda d, e: ExpertChoiceGating(d, e, capacity_factor=1.5),
    "TopPGating": lambda d, e: TopPGating(d, e, 3, p=0.6, normalize=True, capacity_factor_train=1.5),
    "ReLUGating": lambda d, e: ReLUGating(d, e, 3, mean_choices=1.5, expert_bias=True),
    "SparseMixerGating": lambda d, e: SparseMixerGating(d, e, 3, tolerance=0.3, min_expert_capacity=2),
}


class CustomGate(TopKGating):
    """Not of the package."""


def same_weights(found: nn.Module, expected: nn.Module) -> None:
    found_state, state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == state.keys()
    for name, value in state.items():
        assert found_state[name].dtype == value.dtype, name
        assert torch.equal(found_state[name], value), name


def as_before(model: Any, folder: Path) -> None:
    """Save a model with layers as earlier versions did, by the names of its class's checkpoints."""
    model = copy.deepcopy(model)
    for inner in model.modules():
        clear_weight_conversions(inner)
    model.save_pretrained(folder)


@pytest.mark.parametrize("cast", [False, True])
def test_bfloat16_is_saved_to_the_bit(cast, tmp_path):
    """But for the frequencies of a position embedding: a cast of the model rounds them, loading does not."""
    dense = tmp_path / "dense"
    ARCHITECTURES["llama"].build().save_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval()
    upcycle(model, num_experts=4, noise=0.1)
    if cast:
        model.bfloat16()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.randint(64, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits) != cast
    again.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_every_gate_of_the_package_can_be_described():
    """Those with an entry in `GATES` here; `HashGating`, which reads ids, in test_token_ids.py. No dense model hands on
    the state of a `DepthAveragedGating`."""
    assert layer_settings.GATE_CLASSES.keys() == GATES.keys() | {"HashGating", "DepthAveragedGating"}


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_saved(gate, tmp_path):
    """With all that they were made with: the same decisions on the same tokens, in training mode too."""
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4, gate=GATES[gate])
    bias = getattr(find_feed_forwards(model)[0].moe.gate, "expert_bias", None)
    if bias is not None:
        bias.normal_()
    for parameter in find_feed_forwards(model)[0].moe.gate.parameters():
        nn.init.normal_(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    same_weights(again, model)
    x = torch.randn(3, 12, DIM, dtype=torch.bfloat16)
    for mode in (True, False):
        decisions = []
        for its in (model, again):
            router = find_feed_forwards(its)[0].moe.gate.train(mode)
            assert repr(router) == repr(find_feed_forwards(model)[0].moe.gate)
            torch.manual_seed(5)
            decisions.append(router(x))
        assert torch.equal(decisions[0].weight, decisions[1].weight)
        assert torch.equal(decisions[0].kept, decisions[1].kept)


class WrappedGate(nn.Module):
    """A module of one's own with two models."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].build()


@pytest.mark.parametrize("with_config", [False, True])
def test_model_in_custom_module(with_config, tmp_path):
    model, inputs = WrappedGate().eval(), ARCHITECTURES["llama"].inputs()
    if with_config:
        model.config = model.first.config
    assert upcycle(model, num_experts=4, layers=["first.model.layers.1.mlp"]) == ["first.model.layers.1.mlp"]
    for name, part in (("first", model.first), ("second", model.second)):
        part.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again(**inputs).logits, part(**inputs).logits)


CHANGES = {"moe.loss_coef": 0.5, "moe.loss_coefs": {"balance_batch": 0.25}, "moe.group_size": 6, "moe.gate.k": 1}
CHANGES |= {"moe.gate.jitter": 0.125, "moe.experts.dropout": 0.25, "moe.gate.capacity_factor_train": 1.5}


def make_model(kind: str) -> nn.Module:
    model = build_family("mixtral") if kind == "block" else ARCHITECTURES["gpt2"].build()
    if kind == "block":
        return from_transformers(model)
    replace_ffn(model, num_experts=4, gate=CustomGate if kind == "own gate" else None)
    return model


def read_config_file(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return (folder / "config.json").read_text()


@pytest.mark.parametrize("kind", ["network", "own gate", "block"])
def test_assigned_settings_are_saved(kind, tmp_path):
    """As often as it is saved and loaded; and a copy tells of its own layers."""
    model = make_model(kind)
    before = read_config_file(model, tmp_path / "before")
    gate = CustomGate if kind == "own gate" else None
    assert read_config_file(from_pretrained(tmp_path / "before", gate=gate), tmp_path) == before
    changes = CHANGES | ({} if kind == "block" else {"dropout.p": 0.5})
    layer = find_feed_forwards(model)[0]
    twin, stored = copy.deepcopy(model), pickle.dumps(model)
    for path, value in changes.items():
        set_attribute(layer, path, value)
    after = read_config_file(model, tmp_path / "after")
    assert after != before
    assert read_config_file(copy.deepcopy(model), tmp_path) == after
    assert read_config_file(twin, tmp_path) == read_config_file(pickle.loads(stored), tmp_path) == before
    find_feed_forwards(twin)[0].moe.loss_coef = 0.75
    assert read_config_file(twin, tmp_path) not in (before, after)
    again = model
    for number in range(2):
        folder = tmp_path / str(number)
        assert read_config_file(again, folder) == after
        again = from_pretrained(folder, gate=gate)
        for path, value in changes.items():
            assert attrgetter(path)(find_feed_forwards(again)[0]) == value, path


def test_function_set_later_is_reported(tmp_path):
    """In a warning when it is saved. What a run sets is not told."""
    model = make_model("block")
    find_feed_forwards(model)[0].moe.gate.score = torch.sigmoid
    with pytest.warns(UserWarning, match=r"cannot describe moe.gate.score of model.layers.0.mlp"):
        model.save_pretrained(tmp_path)
    model = make_model("network")
    before = read_config_file(model, tmp_path)
    with force_routing(model, "balanced"):
        assert read_config_file(model, tmp_path) == before
    for layer in find_feed_forwards(model):
        layer.moe = torch.compile(layer.moe, backend="eager")
    assert read_config_file(model, tmp_path) == before


def set_gate(moe, gate) -> None:
    gate.w_gating = moe.gate.w_gating
    moe.gate = gate


def set_shared_expert_gate(moe) -> None:
    moe.shared_expert = GatedSharedExpert(moe.shared_expert, nn.Linear(moe.gate.dim, 1))


UNDESCRIBED: dict[str, tuple[str, str, Any]] = {
    "activation": ("block", "moe.experts.act", lambda moe: setattr(moe.experts, "act", nn.GELU())),
    "gate": ("block", "moe.gate", lambda moe: set_gate(moe, TopPGating(moe.gate.dim, moe.gate.num_experts, 2))),
    "bias": ("block", "moe.gate", lambda moe: set_gate(moe, TopKGating(moe.gate.dim, 4, expert_bias=True))),
    "shared": ("block", "moe.shared_expert", lambda moe: setattr(moe, "shared_expert", nn.Identity())),
    "activation of a network": ("network", "moe.experts.act", lambda moe: setattr(moe.experts, "act", nn.ReLU())),
    "shared activation": (
        "network",
        "moe.shared_expert.act",
        lambda moe: setattr(moe.shared_expert, "act", nn.ReLU()),
    ),
    "form of a shared expert": ("network", "moe.shared_expert", set_shared_expert_gate),
}


@pytest.mark.parametrize("name", UNDESCRIBED)
def test_parts_set_later_are_reported(name, tmp_path):
    """What config.json does not describe would come back as it was inserted."""
    kind, path, change = UNDESCRIBED[name]
    model = make_model("block") if kind == "block" else ARCHITECTURES["gpt2"].build()
    if kind == "network":
        replace_ffn(model, num_experts=4, shared_expert=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model).save_pretrained(tmp_path)
    change(find_feed_forwards(model)[0].moe)
    with pytest.warns(UserWarning, match=rf"cannot describe {path} of [\w.]+, which was changed after"):
        copy.deepcopy(model).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "phi3", "gpt_neox", "opt", "bert", "t5", "t5_gated", "vit", "whisper"]
)
def test_stock_classes_fail_to_load(name, tmp_path):
    """Loudly, where nobody tells them: random feed-forward networks would look like a model."""
    model = ARCHITECTURES[name].build()
    replace_ffn(model, num_experts=2)
    model.save_pretrained(tmp_path)
    dense = json.loads((tmp_path / "config.json").read_text())["dense_config"]
    del dense["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(dense))
    for plain in (type(model), AutoModel):
        with pytest.raises(RuntimeError, match=r"mismatch|ignore_mismatched_sizes"):
            plain.from_pretrained(tmp_path)


def test_dense_checkpoint_into_replaced_model(tmp_path):
    """It is refused, also if other sizes are asked for."""
    dense = ARCHITECTURES["llama"].build()
    dense.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    replace_ffn(dense, num_experts=4, gate=GATES["TopKGating"])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        from_pretrained(tmp_path, config=dense.config)
    with pytest.raises(
        ValueError, match=r"does not contain model.layers.0.mlp.moe.gate.w_gating, .* and more; load a dense model"
    ):
        from_pretrained(tmp_path, config=dense.config, ignore_mismatched_sizes=True)

    experts = find_feed_forwards(dense)[0].moe.experts.w1.clone()
    with pytest.warns(UserWarning, match="dense feed-forward networks, but this model has experts"):
        dense.load_state_dict(state, strict=False)
    assert torch.equal(find_feed_forwards(dense)[0].moe.experts.w1, experts)
    with pytest.raises(ValueError, match="has no experts, because its configuration has no"):
        from_pretrained(tmp_path)


def test_a_resumed_run_is_the_run(tmp_path):
    """Weights, optimizer and what was counted: the Trainer goes on exactly."""
    settings = dict(optim="adamw_torch", learning_rate=0.01, save_steps=2, max_steps=4, per_device_train_batch_size=2)
    rows, ends = make_batch(16), []
    for resume in (None, str(tmp_path / "whole" / "checkpoint-2")):
        torch.manual_seed(1)
        model = build_model()
        made = make_trainer(model, rows, tmp_path / ("again" if resume else "whole"), **settings)
        del model.zero_grad
        made.args.save_strategy = "steps" if not resume else "no"
        made.train(resume_from_checkpoint=resume)
        ends.append(model)
    same_weights(ends[1], ends[0])
