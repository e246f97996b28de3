"""Every end state is handed on: exported to a stock class, or refused by the setting; `gguf` maps its checkpoint."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.transformers_models import ARCHITECTURES, LAYERS
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.gguf.utils import GgufLinear
from transformers.utils.quantization_config import QuantizationMethod

from mixture_of_experts.huggingface import export, from_transformers, prune, replace_ffn, to_transformers, upcycle
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.quantize import quantize_experts

gguf = pytest.importorskip("gguf", reason="it asks for Python 3.11")
pytestmark = [
    pytest.mark.slow,
    # peft uses a name that transformers deprecates
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]

EXPERTS, KEPT = 4, 3
#: by the class of the export: its name in gguf, and what a block of it holds beside attention and norms
CLASSES = {
    "MixtralForCausalLM": ("LLAMA", ("ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps")),
    "Qwen3MoeForCausalLM": ("QWEN3MOE", ("ffn_gate_inp", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps")),
}
SHARED = ("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_down_shexp", "ffn_up_shexp")
CLASSES["Qwen2MoeForCausalLM"] = ("QWEN2MOE", (*CLASSES["MixtralForCausalLM"][1], *SHARED))
PER_EXPERT = re.compile(r"experts\.(\d+)\.")


def make_upcycled(name: str, **settings: Any) -> nn.Module:
    model = ARCHITECTURES[name].build()
    upcycle(model, num_experts=EXPERTS, redraw=0.5, **settings)
    return model


def add_lora(model: nn.Module) -> Any:
    """With adapters on attention and experts that are not 0."""
    experts = ["experts.w1", "experts.w3", "experts.w2"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def make_stock(kind: Any, config: Any, **sizes: Any) -> nn.Module:
    settings = dict(ARCHITECTURES["llama"].settings, vocab_size=64, num_experts_per_tok=2, pad_token_id=0, **sizes)
    return from_transformers(kind(config(**settings)).eval())


def make_pruned(model: nn.Module) -> nn.Module:
    prune(model, KEPT, calibration=[torch.randint(3, 64, (4, 16))])
    return model


STATES: dict[str, Any] = {
    "upcycled Llama": lambda: make_upcycled("llama"),
    "upcycled Mistral": lambda: make_upcycled("mistral"),
    "upcycled Qwen2": lambda: make_upcycled("qwen2", shared_expert=24),
    "upcycled Qwen3": lambda: make_upcycled("qwen3"),
    "a shared expert beside Llama's": lambda: make_upcycled("llama", shared_expert=24),
    "LoRA merged": lambda: add_lora(make_upcycled("llama")).merge_and_unload(),
    "pruned": lambda: make_pruned(make_upcycled("qwen3")),
    "LoRA merged, then pruned": lambda: make_pruned(add_lora(make_upcycled("qwen2")).merge_and_unload()),
    "Mixtral": lambda: make_pruned(make_stock(MixtralForCausalLM, MixtralConfig, num_local_experts=EXPERTS)),
    "Qwen2-MoE": lambda: make_pruned(make_stock(Qwen2MoeForCausalLM, Qwen2MoeConfig, num_experts=EXPERTS)),
    "Qwen3-MoE": lambda: make_pruned(make_stock(Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=EXPERTS)),
}


def export_and_compare(model: Any) -> Any:
    was_block = type(model).__name__ in CLASSES
    return to_transformers(model) if was_block else export(model)


def read_as_gguf(folder: Path, arch: str) -> dict[str, Tensor]:
    """A checkpoint under gguf's names, experts stacked, as its converters do; KeyError where it has no name."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), LAYERS)
    found: dict[str, Any] = {}
    for stored, value in load_file(folder / "model.safetensors").items():
        expert = PER_EXPERT.search(stored)
        name = names.get_name(PER_EXPERT.sub("experts.", stored), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(stored)
        if expert is None:
            assert name not in found
            found[name] = value
        else:
            found.setdefault(name, {})[int(expert[1])] = value
    for name, value in found.items():
        if isinstance(value, dict):
            assert sorted(value) == list(range(len(value)))
            found[name] = torch.stack([value[i] for i in range(len(value))])
    return found


@pytest.mark.parametrize("state", STATES)
def test_every_end_state_is_a_stock_model_that_gguf_maps(state, tmp_path):
    model, tokens = STATES[state](), torch.randint(3, 64, (2, 9))
    expected = model(tokens).logits.detach()
    made = export_and_compare(model)
    torch.testing.assert_close(made(tokens).logits, expected, atol=1e-5, rtol=0)
    arch, parts = CLASSES[type(made).__name__]
    made.save_pretrained(tmp_path)
    tensors, config = read_as_gguf(tmp_path, arch), made.config
    e = config.num_local_experts if arch == "LLAMA" else config.num_experts
    h = config.intermediate_size if arch == "LLAMA" else config.moe_intermediate_size
    d, s = config.hidden_size, getattr(config, "shared_expert_intermediate_size", None)
    shapes = dict(ffn_gate_inp=(e, d), ffn_gate_exps=(e, h, d), ffn_up_exps=(e, h, d), ffn_down_exps=(e, d, h))
    shapes |= dict(ffn_gate_inp_shexp=(1, d), ffn_gate_shexp=(s, d), ffn_up_shexp=(s, d), ffn_down_shexp=(d, s))
    for block in range(LAYERS):
        found = {name: value for name, value in tensors.items() if name.startswith(f"blk.{block}.ffn_")}
        assert found.keys() == {f"blk.{block}.{part}.weight" for part in (*parts, "ffn_norm")}
        for part in parts:
            assert found[f"blk.{block}.{part}.weight"].shape == shapes[part], part


@pytest.mark.parametrize("state", ["pruned", "upcycled Qwen2", "LoRA merged, then pruned", "Qwen3-MoE"])
def test_gguf_file_computes_the_same(state, tmp_path):
    """The checkpoint under gguf's names, written by gguf and read by transformers."""
    made, tokens = export_and_compare(STATES[state]()), torch.randint(3, 64, (2, 9))
    read = through_gguf(made, CLASSES[type(made).__name__][0].lower(), tmp_path)
    assert torch.equal(read(tokens).logits, made(tokens).logits)


def through_gguf(model: Any, arch: str, folder: Path) -> Any:
    """A stock model, written by gguf and read by transformers."""
    model.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_expert_count(getattr(config, "num_experts", 0))
    for name, value in read_as_gguf(folder, arch.upper()).items():
        writer.add_tensor(name, (value[0] if name.endswith("ffn_gate_inp_shexp.weight") else value).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return type(model).from_pretrained(folder, gguf_file="model.gguf", config=config, dtype=torch.float32)


@pytest.mark.parametrize("change", ["upcycle", "replace_ffn", "from_transformers"])
def test_a_model_from_gguf_trains_and_is_saved(change, tmp_path):
    """Its weights were dequantized, so nothing may still say that it is quantized."""
    tokens = torch.randint(3, 64, (2, 9))
    if change == "from_transformers":
        model = from_transformers(
            through_gguf(export_and_compare(STATES["Qwen3-MoE"]()), "qwen3moe", tmp_path / "gguf")
        )
    else:
        model = through_gguf(ARCHITECTURES["qwen2"].build(), "qwen2", tmp_path / "gguf")
        assert model.is_quantized  # or there is nothing to show
        (upcycle if change == "upcycle" else replace_ffn)(model, num_experts=4)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
    settings: Any = dict(max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    data: Any = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model, TrainingArguments(str(tmp_path / "run"), **settings), train_dataset=data).train()
    assert not torch.equal(again(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("change", [upcycle, from_transformers])
def test_weights_packed_as_in_gguf_are_refused(change):
    """As transformers keeps them where it has kernels for them."""
    model: Any = ARCHITECTURES["qwen2"].build() if change is upcycle else export_and_compare(STATES["Qwen3-MoE"]())
    model.model.layers[0].self_attn.o_proj = GgufLinear(32, 32, int(gguf.GGMLQuantizationType.Q4_0))
    model.quantization_method, model.is_quantized = QuantizationMethod.GGUF, True
    before = str(model)
    with pytest.raises(ValueError, match=r"packed in GGUF format; load the model with .*GgufConfig\(dequantize=True\)"):
        change(model)
    assert str(model) == before


def test_the_command_writes_the_same_names(tmp_path):
    model = make_pruned(add_lora(make_upcycled("llama")).merge_and_unload())
    model.save_pretrained(tmp_path / "in")
    export(model).save_pretrained(tmp_path / "function")
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("function", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_dense_layers_of_qwen2_moe_have_no_name_in_gguf(tmp_path):
    """A Llama with experts in some layers runs in transformers, but not as a file of gguf."""
    export(make_upcycled("llama", layers=[1])).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"layers\.0\.mlp\.(gate|up|down)_proj"):
        read_as_gguf(tmp_path, "QWEN2MOE")


def make_unequal() -> nn.Module:
    model = make_upcycled("llama")
    prune(model, by={"model.layers.0.mlp.moe.gate": [0, 1, 2]})
    return model


def make_int8() -> nn.Module:
    return quantize_experts(make_upcycled("llama").requires_grad_(False))


REFUSED: dict[str, Any] = {
    "adapters": (
        lambda: add_lora(make_upcycled("llama")),
        "PeftModel.* has PEFT adapters, which transformers classes do not support; call merge_and_unload",
    ),
    "adapters inside": (
        lambda: add_lora(make_upcycled("llama")).base_model.model,
        "LlamaForCausalLM has PEFT adapters",
    ),
    "unequal layers": (make_unequal, r"gate.w_gating has shape \(32, 4\), but the block has \(32, 3\)"),
    "int8": (
        make_int8,
        r"LlamaForCausalLM has experts quantized to 8 bits, .*; use the unquantized model",
    ),
    "blocks": (
        lambda: make_stock(Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=EXPERTS),
        "use to_transformers to convert it to a stock",
    ),
}


@pytest.mark.parametrize("state", REFUSED)
def test_unexportable_settings_raise(state):
    build, says = REFUSED[state]
    with pytest.raises(ValueError, match=says):
        export(build())


@pytest.mark.parametrize("inside", [False, True])
def test_adapters_are_merged_before_experts_go(inside):
    adapted = add_lora(make_upcycled("llama"))
    with pytest.raises(TypeError, match="its layer has PEFT adapters; merge them first"):
        prune(adapted.base_model.model if inside else adapted, KEPT, "random")


def test_prune_before_int8():
    with pytest.raises(TypeError, match="its experts are QuantizedExperts"):
        prune(make_int8(), KEPT, "random")
