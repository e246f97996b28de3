"""What this package relies on in transformers and accelerate beyond their documentation: each test says one thing."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel, EPImplementation
from transformers.distributed.mixin import DistributedMixin
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.integrations.gguf.utils import GgufLinear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.trainer_utils import validate_quantization_for_training
from transformers.utils.quantization_config import GgufConfig, QuantizationConfigMixin, QuantizationMethod

from mixture_of_experts.huggingface import private_transformers as private

SIZES: dict[str, Any] = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
PROJECTION = "model.layers.0.mlp.experts.gate_up_proj"


def make_mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))


def get_experts(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def test_what_calls_a_model_from_gguf_quantized_is_removed():
    model: Any = make_mixtral()
    assert not private.is_from_gguf(model)
    model.hf_quantizer = GgufHfQuantizer(GgufConfig())
    model.hf_quantizer.postprocess_model(model)
    model.quantization_method, model.is_quantized = QuantizationMethod.GGUF, True  # as from_pretrained
    assert private.is_from_gguf(model)
    assert not private.is_packed_gguf(model)
    model.model.layers[0].self_attn.o_proj = GgufLinear(32, 32, 2)
    assert private.is_packed_gguf(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    private.clear_gguf_quantizer(model)
    validate_quantization_for_training(model)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


class Config(QuantizationConfigMixin):
    """Of a quantiser that quantises nothing."""

    def __init__(self, quant_method: str = "looks") -> None:
        self.quant_method: Any = quant_method


class RecordingQuantizer(HfQuantizer):
    """Renames weights while a model is loaded, and looks which were loaded."""

    loaded: dict[str, bool]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        rename = private.FunctionRenaming(lambda name: name.replace("there.", "model."))
        return [rename, *super().update_weight_conversions(weight_conversions, model)]

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        RecordingQuantizer.loaded = {name: private.was_loaded(weight) for name, weight in model.named_parameters()}
        super().postprocess_model(model, **kwargs)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@pytest.fixture
def recording_quantizer(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "looks", Config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "looks", RecordingQuantizer)
    return Config()


def test_renamings_and_marks_of_a_load(tmp_path: Path, recording_quantizer: Config):
    """Every name goes through the conversions of a quantiser; a weight that the file had is marked at the end."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    state = {name.replace("model.", "there."): weight for name, weight in model.state_dict().items()}
    state.pop("there.norm.weight")
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=recording_quantizer)
    assert [name for name, loaded in RecordingQuantizer.loaded.items() if not loaded] == ["model.norm.weight"]
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_weights_that_are_merged_and_saved_under_other_names(tmp_path):
    """Mixtral's files have one weight for each expert and projection."""
    model = make_mixtral()
    model.save_pretrained(tmp_path)
    saved = private.convert_to_saved(model, {PROJECTION: get_experts(model).gate_up_proj})
    assert sorted(saved) == sorted(
        f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight" for e in range(4) for name in ("w1", "w3")
    )
    loaded = MixtralForCausalLM.from_pretrained(tmp_path)
    assert vars(loaded)["_weight_conversions"]
    private.clear_weight_conversions(loaded)
    private.clear_weight_conversions(loaded)  # twice changes nothing
    assert "_weight_conversions" not in vars(loaded)


@pytest.mark.filterwarnings("ignore")
def test_stock_models_lose_weights_in_a_trainer(tmp_path):
    """It reads names as they are in the file, which are those of the class: that is why ours are saved as they are."""
    model, lost = make_mixtral(), []
    model.save_pretrained(tmp_path)
    made = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    made._issue_warnings_after_load = lambda found: lost.extend(found.missing_keys)
    made.state.best_model_checkpoint = str(tmp_path)
    made._load_from_checkpoint(str(tmp_path))
    made._load_best_model()
    assert lost.count(PROJECTION) == 2


def test_models_that_save_their_own_names(tmp_path):
    """A model without conversions saves what its state dict has; those that it had before come back."""
    stock, names = make_mixtral(), make_mixtral().state_dict().keys()
    stock.save_pretrained(tmp_path)
    for model in (stock, MixtralForCausalLM.from_pretrained(tmp_path)):
        before = vars(model).get("_weight_conversions")
        private.use_own_names_on_save(model)
        private.use_own_names_on_save(model)  # twice changes nothing
        assert private.convert_to_saved(model, model.state_dict()).keys() == names
        published = private.map_to_published_names(model, model.state_dict())
        assert published.keys() != names
        assert private.convert_to_saved(model, model.state_dict()).keys() == names
        private.save_stock_names(model)
        private.save_stock_names(model)
        assert vars(model).get("_weight_conversions") is before
        assert private.convert_to_saved(model, model.state_dict()).keys() == published.keys()


def test_the_gating_of_experts():
    """The interface's own splits into halves; GPT-OSS has one of its own."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts, x = get_experts(make_mixtral()), torch.randn(3, 48)
    gate, up = x.chunk(2, dim=-1)
    assert private.has_default_gating(experts)
    assert torch.equal(private.apply_gating(experts, x), experts.act_fn(gate) * up)
    assert not private.has_default_gating(GptOssExperts.__new__(GptOssExperts))
    assert callable(getattr(ALL_EXPERTS_FUNCTIONS, "register", None))


def test_checkpointing_per_layer():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    (layer,) = model.model.layers
    assert private.get_checkpoint_function(layer) is None
    model.activation_checkpointing_enable()
    found, calls = private.get_checkpoint_function(layer), []
    assert found is not None
    assert layer.gradient_checkpointing

    def counts(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return found(*args, **kwargs)

    private.set_checkpoint_function(layer, counts)
    model(torch.arange(5)[None]).logits.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "config", "predicts"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES), True),
        (BertForMaskedLM, BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), False),
        (T5ForConditionalGeneration, T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2), False),
    ],
)
def test_next_token_models(kind: Any, config: Any, predicts: bool):
    with torch.device("meta"):
        assert private.predicts_next_token(kind(config)) == predicts


def test_hooks_that_return_router_logits():
    """They are set at the first forward, and then on the model of which they are a part."""
    model, other = make_mixtral(), make_mixtral()
    tokens = torch.arange(4)[None]
    model(tokens, output_router_logits=True)
    private.copy_output_capturing(other, model)
    hooked = [name for name, part in other.named_modules() if getattr(part, "_output_capturing_hooks_installed", False)]
    assert hooked
    assert len(other(tokens, output_router_logits=True).router_logits) == 1


def test_router_logits_that_a_forward_collects():
    """A list that the output holds afterwards; there is none outside of a forward, and in one that returns none."""
    model, tokens, seen = make_mixtral(), torch.arange(4)[None], []

    def add(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(private.collected_logits())
        if seen[-1] is not None:
            seen[-1].append(torch.ones(2))

    model.model.norm.register_forward_hook(add)
    assert model(tokens).router_logits is None
    *_, added = model(tokens, output_router_logits=True).router_logits
    assert torch.equal(added, torch.ones(2))
    assert seen[0] is None
    assert private.collected_logits() is None


def test_which_routers_are_recorded():
    """Models name the classes of their routers; blocks of other models are none of theirs."""
    with torch.device("meta"):
        model, dense = make_mixtral(), LlamaForCausalLM(LlamaConfig(**SIZES))
    block = model.model.layers[0].mlp
    assert private.has_recorded_logits(model, block)
    assert private.has_recorded_logits(model.model, block)
    assert not private.has_recorded_logits(model, model.model.layers[0].self_attn)
    assert not private.has_recorded_logits(dense, block)


def test_weights_that_accelerate_keeps_elsewhere():
    module = nn.Linear(2, 2)
    assert not private.is_offloaded(module.to("meta"))
    weights = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
    assert private.is_offloaded(module)


def test_names_of_distribution():
    """Models keep their meshes in this attribute; the plans are dicts of their own, which may be changed."""
    model, other = make_mixtral(), make_mixtral()
    assert private.get_data_mesh(model) is None
    assert hasattr(DistributedMixin, "_mesh_manager")
    assert list(inspect.signature(TransformersDeviceMesh.get_mesh).parameters) == ["self", "dims"]
    for plan in (model.tp_plan, model.ep_plan):
        plan["here"] = "there"
    assert "here" in model.tp_plan
    assert "here" in model.ep_plan
    assert "here" not in {**other.tp_plan, **other.ep_plan}
    assert replace_layer_number_by_wildcard("model.layers.3.mlp") == "model.layers.*.mlp"
    arguments = inspect.signature(EpDispatchExpertsParallel.install_forward).parameters
    assert list(arguments)[:4] == ["self", "module", "ep_mesh", "tp_mesh"]
    assert list(inspect.signature(EPImplementation.__init__).parameters) == ["self", "experts", "ep_mesh", "tp_mesh"]
    assert "ep_dispatch_experts" in ALL_PARALLEL_STYLES


def test_hooks_by_which_a_model_returns_what_its_parts_told_are_removed():
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))  # type: ignore[arg-type]
    model(torch.arange(4)[None], output_router_logits=True)
    hooked = [module for module in model.modules() if module._forward_hooks]
    assert hooked
    own = hooked[0].register_forward_hook(lambda *args: None)
    for module in hooked:
        private.remove_capturing_hooks(module)
    assert [key for module in hooked for key in module._forward_hooks] == [own.id]
