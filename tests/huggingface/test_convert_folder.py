"""`convert`, `prune` and `merge` on folders, and `export` of what was converted: they write what the functions on
models in memory make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.transformers_families import build_model as build_family
from support.transformers_models import ARCHITECTURES
from transformers import AutoModelForCausalLM, Qwen3VLMoeForConditionalGeneration

from mixture_of_experts.huggingface import expert_scores, fast_lora, from_transformers, prune, upcycle
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.saving.converting import convert_folder, plan_dtypes
from mixture_of_experts.huggingface.saving.folders import read_config, read_weights
from mixture_of_experts.ops import int4
from mixture_of_experts.quantize import quantize_experts

from .test_block_conversion import MODELS, build_model
from .test_prune import make_stock

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
TOKENS = torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33, 35], [4, 8, 16, 32, 5, 10, 20, 40, 6]])
LORA: Any = dict(r=3, init_lora_weights=False, target_parameters=["experts.w1", "experts.w3", "experts.w2"])
NAMES = [pytest.param(name, marks=[] if name == "Mixtral" else pytest.mark.slow) for name in MODELS]


def save_stock(name: str, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = build_model(name, hidden=32, **settings)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer_config.json").write_text("{}")
    return model


def run_command(*words: object) -> None:
    assert main([*map(str, words), "--max-shard-size", "40KB"]) == 0


def check_equal_weights(found: Any, wanted: Any) -> None:
    """In dtype and value, but for the placeholders of dense weights."""
    states = [{n: t for n, t in model.state_dict().items() if t.shape != (1, 1, 1)} for model in (found, wanted)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype, name
        assert states[0][name].equal(value), name


def read_blocks(folder: Path) -> set[int]:
    """The layouts of 4 bits that a folder has."""
    layers = json.loads((folder / "config.json").read_text())["dense_config"]["quantization_config"]["layers"]
    return {form["block"] for entry in layers for form in entry["forms"].values()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converted_folder_is_the_converted_model(name, dtype, tmp_path):
    save_stock(name, tmp_path / "in")
    run_command("convert", tmp_path / "in", tmp_path / "out", *(["--dtype", dtype] if dtype else []))
    wanted = from_transformers(
        AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=getattr(torch, dtype or "float32"))
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    check_equal_weights(found, wanted)
    assert found(TOKENS).logits.equal(wanted(TOKENS).logits)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    wanted.save_pretrained(tmp_path / "wanted")
    stored = [read_weights(tmp_path / folder) for folder in ("out", "wanted")]
    assert stored[0].keys() == stored[1].keys()
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "wanted")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", NAMES)
def test_export_returns_the_stock_folder(name, tmp_path):
    """Bit for bit, under the published names, and with the published settings."""
    stock = save_stock(name, tmp_path / "in")
    run_command("convert", tmp_path / "in", tmp_path / "moe", "--loss-coef", "0.5")
    run_command("export", tmp_path / "moe", tmp_path / "out")
    before, after = (read_weights(tmp_path / folder) for folder in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(after[key].equal(value) and after[key].dtype == value.dtype for key, value in before.items())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out")]
    added = configs[1].keys() - configs[0].keys()
    # which engines read
    assert added <= {"rope_theta", "rope_scaling", "partial_rotary_factor", "num_experts", "num_local_experts"}
    assert {key: value for key, value in configs[1].items() if key not in added} == configs[0]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(found) is type(stock)
    assert found(TOKENS).logits.equal(stock(TOKENS).logits)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_coefficient_and_dtype_at_once(bits, tmp_path):
    save_stock("Mixtral", tmp_path / "in")
    words = ["--bits", bits, "--group", "32", "--dtype", "bfloat16", "--loss-coef", "0.5"]
    run_command("convert", tmp_path / "in", tmp_path / "out", *words)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    wanted = quantize_experts(from_transformers(wanted, loss_coef=0.5).requires_grad_(False), bits, group=32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    check_equal_weights(found, wanted)
    assert found(TOKENS).logits.equal(wanted(TOKENS).logits)
    assert {layer.moe.loss_coef for layer in find_feed_forwards(found)} == {0.5}
    assert bits == 8 or read_blocks(tmp_path / "out") == {int4.find_cpu_block()}


def test_layouts_of_4_bits_are_converted(tmp_path):
    """To that of this machine by default, from and to any other; the levels stay the same."""
    save_stock("Mixtral", tmp_path / "in")
    words = ["--bits", "4", "--group", "32"]
    run_command("quantize", tmp_path / "in", tmp_path / "2", *words)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    for source, target, more in (("2", "32", ["--block", "32"]), ("32", "64", ["--block", "64"]), ("64", "here", [])):
        run_command("convert", tmp_path / source, tmp_path / target, *more)
        assert read_blocks(tmp_path / target) == {int(more[1]) if more else int4.find_cpu_block()}
        found = AutoModelForCausalLM.from_pretrained(tmp_path / target)
        check_equal_weights(found, wanted)
        assert found(TOKENS).logits.equal(wanted(TOKENS).logits)
    run_command("quantize", tmp_path / "in", tmp_path / "quantized", *words, "--block", "64")
    assert read_blocks(tmp_path / "quantized") == {64}
    assert main(["convert", str(tmp_path / "2"), str(tmp_path / "again"), *words]) == 1


def test_own_folders_are_cast(tmp_path):
    """A model that was upcycled, with a bias that stays in float32; and one that is quantized already."""
    model = ARCHITECTURES["llama"].build(intermediate_size=64).eval()
    upcycle(model, num_experts=4, noise=0.5)
    model.save_pretrained(tmp_path / "in")
    run_command("convert", tmp_path / "in", tmp_path / "8", "--bits", "8")
    for source in ("in", "8"):
        run_command("convert", tmp_path / source, tmp_path / f"{source} cast", "--dtype", "bfloat16")
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.bfloat16)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"{source} cast", dtype="auto")
        check_equal_weights(found, wanted)
        stored = {value.dtype for value in read_weights(tmp_path / f"{source} cast").values()}
        assert torch.bfloat16 in stored
        assert torch.float32 not in stored
        assert found(TOKENS).logits.equal(wanted(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_planned_dtypes_are_those_of_loading(name, dtype, tmp_path):
    save_stock(name, tmp_path / "in")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype).state_dict()
    planned = plan_dtypes(read_config(tmp_path / "in"), dtype)
    assert planned == {name: value.dtype for name, value in loaded.items() if value.is_floating_point()}


@pytest.mark.parametrize("by", ["scores", "ids", "random"])
@pytest.mark.parametrize("kind", ["upcycled", "Qwen3Moe", "DeepseekV3"])
def test_pruned_folder_is_the_pruned_model(kind, by, tmp_path):
    if kind == "upcycled":
        model = ARCHITECTURES["llama"].build()
        upcycle(model, num_experts=8, redraw=0.5)
    else:
        model = from_transformers(make_stock(kind))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    scores = expert_scores(model, calibration=[TOKENS])
    ids = {name: [0, 3, 4, 6] for name in scores}
    save_file(scores, tmp_path / "scores")
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    words, settings = {
        "scores": (["--by", tmp_path / "scores", "--keep", "4"], dict(keep=4, calibration=[TOKENS])),
        "ids": (["--by", tmp_path / "ids.json"], dict(by=ids)),
        "random": (["--by", "random", "--keep", "4"], dict(keep=4, by="random")),
    }[by]
    torch.manual_seed(3)
    run_command("prune", tmp_path / "in", tmp_path / "out", *words)
    torch.manual_seed(3)
    prune(model, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check_equal_weights(loaded, model)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-6, rtol=0)


def test_errors_of_prune(tmp_path, capsys):
    dense = ARCHITECTURES["llama"].build()
    dense.save_pretrained(tmp_path / "dense")
    upcycle(dense, num_experts=4)
    dense.save_pretrained(tmp_path / "in")
    (tmp_path / "ids.json").write_text('{"gate": [0, 1]}')
    for source, by, more, says in (
        ("dense", "random", ["--keep", "2"], "has no experts from this package, so there is nothing to prune"),
        ("in", "random", [], "requires `keep`"),
        ("in", "random", ["--keep", "1"], "cannot keep 1 of 4"),
        ("in", str(tmp_path / "ids.json"), [], "not a gate of the model"),
    ):
        assert main(["prune", str(tmp_path / source), str(tmp_path / "out"), "--by", by, *more]) == 1
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "none.safetensors"):
        with pytest.raises(SystemExit):
            main(["prune", str(tmp_path / "in"), str(tmp_path / "out"), "--by", str(tmp_path / name)])
        assert "missing, damaged" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["experts", "attention", "both"])
def test_merged_folder_is_the_merged_model(where, dtype, tmp_path):
    """Also with a router that was trained whole."""
    torch.manual_seed(0)
    model = from_transformers(build_model("Mixtral", hidden=32)).to(dtype)
    model.save_pretrained(tmp_path / "in")
    attention = [] if where == "experts" else ["q_proj", "v_proj"]
    settings = LORA if where != "attention" else {**LORA, "target_parameters": None}
    adapted = get_peft_model(model, LoraConfig(target_modules=attention, modules_to_save=["gate"], **settings))
    if where != "attention":
        fast_lora(adapted)
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.5
    adapted.save_pretrained(tmp_path / "adapter")
    run_command("merge", tmp_path / "in", tmp_path / "out", "--adapter", tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype)
    wanted = PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload(safe_merge=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    check_equal_weights(found, wanted)
    assert found(TOKENS).logits.equal(wanted(TOKENS).logits)
    assert not found(TOKENS).logits.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype)(TOKENS).logits
    )
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert not any("base_layer" in key or "lora" in key for key in file.keys())  # noqa: SIM118 (no mapping)


def test_merge_needs_a_weight_for_each_part_of_the_adapter(tmp_path, capsys):
    """PEFT ignores parts of an adapter for which the model has no weight."""
    model = from_transformers(build_model("Mixtral", hidden=32))
    model.save_pretrained(tmp_path / "in")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name.replace("q_proj", "z_proj"): weights[name].clone()}, file)
    words = ["merge", str(tmp_path / "in"), str(tmp_path / "out"), "--adapter", str(tmp_path / "adapter")]
    assert main(words) == 1
    assert "z_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_next_to_the_model(tmp_path, capsys):
    """Their configuration was copied without their weights, so that the new folder did not load."""
    model = from_transformers(build_model("Mixtral", hidden=32))
    model.save_pretrained(tmp_path / "in")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for folder in ("in", "adapter"):
        adapted.save_pretrained(tmp_path / folder)
    prune_words, merge_words = ["prune", "--by", "random", "--keep", "3"], ["merge", "--adapter", tmp_path / "adapter"]
    for command, *options in (["upcycle"], ["convert"], ["quantize"], ["export"], prune_words, merge_words):
        assert main([*map(str, (command, tmp_path / "in", tmp_path / "out", *options))]) == 1
        assert "in also contains adapters (adapter_config.json)" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    run_command("merge", tmp_path / "in", tmp_path / "out", "--adapter", tmp_path / "in")
    found, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("out", "in"))
    torch.testing.assert_close(found(TOKENS).logits, wanted(TOKENS).logits, atol=1e-5, rtol=0)


def test_settings_of_convert_are_checked_before_anything_is_written(tmp_path):
    wrong: list[dict[str, Any]] = [dict(bit=4), dict(bits=4, block=48), dict(bits=8, block=48)]
    for settings in wrong:
        with pytest.raises(
            (TypeError, ValueError), match=r"unexpected keyword argument 'bit'|expected block to be one of 2, 32, 64"
        ):
            convert_folder(tmp_path / "in", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_errors_of_merge(tmp_path, capsys):
    model = from_transformers(build_model("Mixtral", hidden=32))
    model.save_pretrained(tmp_path / "in")
    convert_folder(tmp_path / "in", tmp_path / "8", bits=8)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for source, adapter, says in (
        ("in", "8", "8 has no adapter_model.safetensors; pass the folder where PEFT saved the adapters"),
        ("8", "adapter", "has quantized experts, so adapters cannot be merged into it"),
    ):
        words = ["merge", str(tmp_path / source), str(tmp_path / "out"), "--adapter", str(tmp_path / adapter)]
        assert main(words) == 1
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("dtype", "x"), ("block", "16"), ("bits", "2")])
def test_rejects_invalid_options(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "in", "out", f"--{option}={value}"])
    assert value in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_images_whose_class_transposes_experts(tmp_path):
    stock = build_family("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration)
    stock.save_pretrained(tmp_path / "in")
    run_command("convert", tmp_path / "in", tmp_path / "out")
    found = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokens = torch.randint(3, 20, (1, 7))
    torch.testing.assert_close(found(tokens).logits, stock.eval()(tokens).logits, atol=1e-5, rtol=1e-5)
    run_command("convert", tmp_path / "in", tmp_path / "cast", "--dtype", "bfloat16")
    config = read_config(tmp_path / "cast")
    assert config.dtype == config.text_config.dtype == config.vision_config.dtype == torch.bfloat16
