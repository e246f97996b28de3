"""One story from end to end: experts and a gate of one's own in a model of `transformers`.

Trained by the Trainer, compiled, in one process and in two, saved, loaded, and generating.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from support import transformers_story as story
from torch import nn
from transformers import AutoModelForCausalLM

from mixture_of_experts.huggingface import from_pretrained
from mixture_of_experts.huggingface.feed_forward import feed_forwards

pytestmark = [
    pytest.mark.slow,
    # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
IN_GRAPHS = {"mixture_of_experts.rows_by_weights.default", "topk"}  # of the experts and of the gate
TOLERANCE = dict(atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """In one process, compiled; the graphs; and the folder it was saved in."""
    folder = tmp_path_factory.mktemp("story")
    torch.compiler.reset()
    made, graphs = story.train(folder / "run")
    made.save_model(str(folder / "model"))
    yield made, graphs, folder / "model"
    torch.compiler.reset()


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_processes")
    story.in_two_processes(folder)
    return folder


def same(found: nn.Module | dict, expected: nn.Module | dict) -> None:
    found, expected = (x.state_dict() if isinstance(x, nn.Module) else x for x in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def load(folder: Path) -> nn.Module:
    """Built as it was built, then filled: config.json tells of neither experts nor gates of one's own."""
    model = story.build()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    load_model(model, folder / "model.safetensors")
    return model.eval()


def test_it_learns(trained):
    made = trained[0]
    losses = story.losses(made)
    assert losses[-1] < losses[0] - 1
    new = story.build()
    changed = {
        name for name, value in made.model.state_dict().items() if not torch.equal(value, new.state_dict()[name])
    }
    for i in range(2):
        assert {f"model.layers.{i}.mlp.moe.{part}" for part in ("gate.w_gating", "experts.u", "experts.v")} <= changed


def test_compiled_trains_as_eager(trained, tmp_path: Path):
    made, graphs, _ = trained
    assert story.targets(graphs) >= IN_GRAPHS
    assert len(graphs) < 5  # one for the model, one where its losses are added; later steps make none
    eager, none = story.train(tmp_path, compiled=False)
    assert not none
    assert story.losses(made) == pytest.approx(story.losses(eager), abs=1e-3)
    same(made.model, eager.model)


def test_two_processes_train_as_one(trained, in_two: Path):
    """Each sees half of every batch; both end with the weights that one process gets."""
    states, targets = zip(*(torch.load(in_two / f"{rank}.pt") for rank in range(2)), strict=True)
    assert all(called >= IN_GRAPHS for called in targets)
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    same(states[0], trained[0].model)
    same(load(in_two / "model"), states[0])


def test_saved_and_loaded(trained):
    made, _, folder = trained
    again = load(folder)
    assert [type(module.moe.experts) for module in feed_forwards(again)] == [story.LowRankExperts] * 2
    assert [type(module.moe.gate) for module in feed_forwards(again)] == [story.CosineGating] * 2
    for name, value in made.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_config_json_cannot_describe(trained):
    """Auto classes refuse it; `from_pretrained` takes the gate, and says that the experts are new."""
    folder = trained[2]
    with pytest.raises(ValueError, match=r"CosineGating, which config.json cannot describe: pass gate="):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"initialised: model.layers.0.mlp.moe.experts.w1"):
        model = from_pretrained(folder, gate=story.CosineGating)
    assert torch.equal(model.model.layers[0].mlp.moe.gate.w_gating, load(folder).model.layers[0].mlp.moe.gate.w_gating)


def test_it_generates(trained):
    """It counts on; with a cache what it does without, alone what it does beside padding."""
    again = load(trained[2])
    prompts, mask = torch.tensor([[0, 0, 0, 7, 8, 9], [11, 12, 13, 14, 15, 16]]), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with_cache = again.generate(prompts, attention_mask=mask, use_cache=True, **settings)
    assert with_cache.shape == (2, 11)
    assert torch.equal(again.generate(prompts, attention_mask=mask, use_cache=False, **settings), with_cache)
    alone = again.generate(prompts[:1, 3:], attention_mask=mask[:1, 3:], use_cache=True, **settings)
    assert torch.equal(alone[0, 3:], with_cache[0, 6:])
    assert with_cache[1].tolist() == list(range(11, 22))
    assert with_cache[0, 3:].tolist() == list(range(7, 15))
