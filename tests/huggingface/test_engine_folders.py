"""What `export` and `to_transformers` write for inference engines, which `tests/test_inference_engines.py` runs."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.transformers_families import build_model as build_family
from support.transformers_models import ARCHITECTURES
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
)

from mixture_of_experts import TopKGating
from mixture_of_experts.huggingface import export, from_transformers, replace_ffn, to_transformers, upcycle
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.huggingface.saving.engine_folders import EngineSave, find_engine_faults
from mixture_of_experts.huggingface.saving.exporting import make_half_open_gate

pytestmark = pytest.mark.slow
SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
UNNORMALIZED: Any = dict(gate=lambda d, e: TopKGating(d, e, 2, normalize=False))
ROPE = {"rope_type": "default", "rope_theta": 12345.0}


ROUTING: Any = dict(rope_parameters=ROPE, norm_topk_prob=True)


def make_export(name: str, settings: Any = None, **build: Any) -> Any:
    model = ARCHITECTURES[name].build(rope_parameters=ROPE, **build)
    replace_ffn(model, num_experts=4, hidden_dim=24, **(settings or {}))
    return export(model)


def make_stock() -> Any:
    """A stock Qwen3-MoE that got layers and went back."""
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **ROUTING)
    return to_transformers(from_transformers(Qwen3MoeForCausalLM(config).eval()))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


MADE: dict[str, Any] = {
    "Mixtral": lambda: make_export("llama"),
    "Qwen3-MoE": lambda: make_export("qwen3"),
    "Qwen2-MoE of a Llama": lambda: make_export("llama", dict(shared_expert=16, **UNNORMALIZED)),
    "Qwen2-MoE of a tied Llama": lambda: make_export("llama", UNNORMALIZED, tie_word_embeddings=True),
    "Qwen2-MoE of a tied Qwen2": lambda: make_export("qwen2", UNNORMALIZED, tie_word_embeddings=True),
    "Qwen3-MoE that went back": make_stock,
}


@pytest.mark.parametrize("kind", MADE)
def test_earlier_entries_are_written_and_load_with_equal_bits(kind, tmp_path):
    """The model in memory, whose configuration is that of its class, does not have them."""
    made, tokens = MADE[kind](), torch.randint(3, 64, (2, 9))
    before = vars(made.config).keys()
    made.save_pretrained(tmp_path)
    assert vars(made.config).keys() == before
    written = read_config(tmp_path)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 12345.0
    assert written["num_experts"] == 4
    assert written.get("num_local_experts", 4) == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(made)
    assert loaded.config.to_diff_dict() == made.config.to_diff_dict()
    assert torch.equal(loaded(tokens).logits, made(tokens).logits)


def test_partial_rotary_embeddings_and_models_of_images_have_earlier_entries(tmp_path):
    rope = dict(ROPE, partial_rotary_factor=0.5)
    for kind, model_class, settings, entries in (
        ("glm4_moe", Glm4MoeForCausalLM, dict(rope_parameters=rope), dict(partial_rotary_factor=0.5)),
        ("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration, {}, dict(rope_theta=500000.0, num_experts=4)),
    ):
        model = build_family(kind, model_class, **settings)
        folders, tokens = (tmp_path / kind, tmp_path / f"{kind} back"), torch.randint(3, 20, (2, 9))
        model.save_pretrained(folders[0])
        expected = model(tokens).logits
        to_transformers(from_transformers(model)).save_pretrained(folders[1])
        written = read_config(folders[1])
        assert entries.items() <= written.get("text_config", written).items()
        before, after = (AutoConfig.from_pretrained(folder).to_diff_dict() for folder in folders)
        assert after == before
        assert torch.equal(model_class.from_pretrained(folders[1])(tokens).logits, expected)


def test_scaled_rotary_embeddings_have_their_earlier_entry(tmp_path):
    scaled = dict(ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    model, tokens = ARCHITECTURES["qwen3"].build(rope_parameters=scaled), torch.randint(3, 64, (2, 9))
    upcycle(model, num_experts=4)
    made = export(model)
    with pytest.warns(UserWarning, match="mlx-lm: it does not scale the rotary embeddings"):
        made.save_pretrained(tmp_path)
    written = read_config(tmp_path)
    assert written["rope_scaling"] == {name: value for name, value in scaled.items() if name != "rope_theta"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == made.config.rope_parameters
    assert torch.equal(loaded(tokens).logits, made(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_qwen2_moe_has_biases_and_a_head_of_its_own(name, tmp_path):
    """Whatever the dense model has; the command writes the same."""
    model = ARCHITECTURES[name].build(tie_word_embeddings=True)
    replace_ffn(model, num_experts=4, hidden_dim=24, shared_expert=16, **UNNORMALIZED)
    model.save_pretrained(tmp_path / "in")
    made = export(model)
    assert made.config.qkv_bias
    assert not made.config.tie_word_embeddings
    made.save_pretrained(tmp_path / "function")
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "command")]) == 0
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("function", "command"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    configs = [read_config(tmp_path / folder) for folder in ("function", "command")]
    assert configs[0] == configs[1]
    assert torch.equal(one["lm_head.weight"], model.model.embed_tokens.weight)
    biases = {name: value for name, value in one.items() if name.endswith("_proj.bias")}
    assert len(biases) == 3 * model.config.num_hidden_layers
    if name == "llama":
        assert not any(value.any() for value in biases.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shared_experts_are_weighted_by_half(dtype):
    """By a gate with no element that is 0: llama.cpp computes `silu(z) / z`, in float32."""
    weight = make_half_open_gate(torch.empty(1, 576, dtype=dtype)).to(dtype)
    assert weight.count_nonzero() == 576
    x = 100 * torch.randn(1000, 576)
    logits = x @ weight[0].float()
    assert logits.count_nonzero() == 1000
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.5), atol=0, rtol=torch.finfo(dtype).eps / 2)
    silu = nn.functional.silu(logits) / logits
    torch.testing.assert_close(
        silu, torch.full_like(logits, 0.5), atol=0, rtol=1e-3 if dtype == torch.float16 else 1e-7
    )


def test_layers_without_a_shared_expert_get_one_that_is_zeros():
    """As wide as a block of llama.cpp's quantizer, which rejects narrower weights."""
    made = make_export("llama", UNNORMALIZED)
    assert made.config.shared_expert_intermediate_size == 32
    assert not any(weight.any() for weight in made.model.layers[0].mlp.shared_expert.parameters())


# The tokenizer


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "notes.txt").write_text("of this folder alone")
    return tmp_path / "dense"


def test_tokenizer_of_the_dense_model_is_copied(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    upcycle(model, num_experts=4)
    export(model).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_tokenizer_that_was_saved_before_is_kept(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    upcycle(model, num_experts=4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    export(model).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"


def test_tokenizer_of_a_stock_model_is_copied(tmp_path):
    """Without one, and from a folder that is gone, nothing is."""
    make_stock().save_pretrained(tmp_path / "published")
    assert sorted(path.name for path in (tmp_path / "published").glob("*token*")) == []
    (tmp_path / "published" / "tokenizer.model").write_bytes(b"pieces")
    models = [from_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "published")) for _ in range(2)]
    to_transformers(models[0]).save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"
    (tmp_path / "published").rename(tmp_path / "moved")
    to_transformers(models[1]).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.model").exists()


# The attribute that does this


def test_models_without_a_name_are_saved(tmp_path):
    """The exported model is freed before the call."""
    make_export("llama").save_pretrained(tmp_path)
    assert read_config(tmp_path)["rope_theta"] == 12345.0


def test_copies_save_themselves(tmp_path):
    made = make_export("llama")
    copied = copy.deepcopy(made)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    del made
    copied.save_pretrained(tmp_path)
    assert read_config(tmp_path)["rope_theta"] == 12345.0
    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight"].any()


def test_pickled_models_do_not_need_this_package(tmp_path):
    again = pickle.loads(pickle.dumps(make_export("llama")))
    assert "mixture_of_experts" not in type(vars(again)["save_pretrained"]).__module__
    again.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(again)


def test_models_are_freed_without_the_garbage_collector():
    made = make_export("llama")
    found = weakref.ref(made.lm_head.weight)
    del made
    assert found() is None


def test_models_that_get_layers_again_save_their_layers(tmp_path):
    made = make_stock()
    assert isinstance(vars(made)["save_pretrained"], EngineSave)
    from_transformers(made).save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(made)
    assert read_config(tmp_path)["model_type"] == "mixture_of_experts"


def test_only_the_main_process_completes_a_folder(tmp_path):
    made = make_export("llama")
    made.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match=r"push_to_hub=True would upload .*; call model\.push_to_hub\(repo_id\)"):
        made.save_pretrained(tmp_path, push_to_hub=True)
    assert isinstance(made, PreTrainedModel)


# Warnings


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_export("qwen2"), r"Qwen2|qwen2_moe.*: llama\.cpp and mlx-lm: they do not normalize"),
        (lambda: make_export("llama", dict(shared_expert=16)), r"llama\.cpp and mlx-lm: they do not normalize"),
        (lambda: make_export("qwen3", UNNORMALIZED), r"llama\.cpp: it normalizes the router weights of Qwen3-MoE"),
    ],
)
def test_engines_that_compute_something_else_are_named(make, says, tmp_path):
    """When the folder is written, by the command too; not before."""
    made = make()
    with pytest.warns(UserWarning, match=says):
        made.save_pretrained(tmp_path)


def test_the_command_warns(tmp_path):
    model = ARCHITECTURES["qwen2"].build()
    upcycle(model, num_experts=4)
    model.save_pretrained(tmp_path / "in")
    with pytest.warns(UserWarning, match="llama.cpp and mlx-lm: they do not normalize"):
        assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("config", "engines"),
    [
        (dict(model_type="mixtral"), []),
        (dict(model_type="mixtral", rope_parameters={"rope_type": "llama3"}), ["mlx-lm"]),
        (dict(model_type="mixtral", sliding_window=4, max_position_embeddings=8), ["llama.cpp and mlx-lm"]),
        (dict(model_type="mixtral", sliding_window=8, max_position_embeddings=8), []),
        (dict(model_type="mixtral", hidden_act="gelu"), ["vLLM, llama.cpp and mlx-lm"]),
        (dict(model_type="qwen2_moe"), []),
        (dict(model_type="qwen2_moe", qkv_bias=False), ["vLLM"]),
        (dict(model_type="qwen2_moe", hidden_act="gelu"), ["llama.cpp and mlx-lm"]),
        (dict(model_type="qwen3_moe", norm_topk_prob=True, hidden_act="gelu"), ["vLLM, llama.cpp and mlx-lm"]),
        (dict(model_type="qwen3_moe", norm_topk_prob=True), []),
        (
            dict(model_type="qwen3_moe", norm_topk_prob=True, rope_parameters={"rope_type": "dynamic"}),
            ["mlx-lm", "llama.cpp"],
        ),
        (dict(model_type="qwen2_moe", rope_parameters={"rope_type": "yarn"}), []),
        (dict(model_type="olmoe", norm_topk_prob=True), []),
    ],
)
def test_settings_with_faults(config, engines):
    assert [fault.partition(":")[0] for fault in find_engine_faults(config)] == engines
