"""What `transformers` itself loads of a saved model with experts: all of it, or it says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.transformers_models import ARCHITECTURES, DIM, VOCABULARY
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto import modeling_auto

from mixture_of_experts import NoisyTopKGating, Top2Gating, TopKGating
from mixture_of_experts.huggingface import export, from_pretrained, from_transformers, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.router_config import ROUTER_KEYS
from mixture_of_experts.huggingface.saving.configuration import read_layer_entries

from .test_block_conversion import build_model as build_sparse
from .test_saving import GATES, CustomGate, same_weights

pytestmark = pytest.mark.slow

SETUP_CODE = Path(__file__).with_name("saved_before")
AUTO = {name: cls for name, cls in vars(modeling_auto).items() if name.startswith("AutoModel")}


def auto_classes(model: Any) -> list[Any]:
    """Those that have a class for a model's configuration."""
    config = type(model.config)
    autos = [cls for cls in AUTO.values() if getattr(cls, "_model_mapping", None) is not None]
    found = {auto: auto._model_mapping[config] for auto in autos if config in auto._model_mapping}
    # LlamaForQuestionAnswering names its layers otherwise and finds nothing of a dense Llama either, and what is of
    # another configuration needs more files
    inside = found[AutoModel]
    same = ("base_model_prefix", "config_class")
    return [auto for auto, cls in found.items() if all(getattr(cls, x) == getattr(inside, x) for x in same)]


def save_model(folder: Path, name: str = "llama") -> Any:
    """An upcycled model, which the folder holds."""
    model = ARCHITECTURES[name].build()
    upcycle(model, num_experts=4)
    model.save_pretrained(folder)
    return model


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_class_itself_and_all_auto_classes(name, tmp_path):
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    replace_ffn(model, num_experts=4, layers=[1], hidden_dim=16)
    replace_ffn(model, num_experts=3, k=1, layers=[0], loss_coef=0.5)
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")  # and once more
    again = type(model).from_pretrained(tmp_path / "again")
    for one in (ours, again):
        assert type(one) is type(model)
        same_weights(one, model)
        assert torch.equal(one(**inputs).logits, model(**inputs).logits)
        for found, expected in zip(find_feed_forwards(one), find_feed_forwards(model), strict=True):
            assert (repr(found), found.moe.loss_coef) == (repr(expected), expected.moe.loss_coef)
    dense = ARCHITECTURES[name].build()
    dense.save_pretrained(tmp_path / "dense")
    dense = type(dense).from_pretrained(tmp_path / "dense")
    assert vars(again).keys() - {"accepts_loss_kwargs"} == vars(dense).keys()  # nothing of a quantiser
    assert vars(again.config).keys() - {"mixture_of_experts", *ROUTER_KEYS} == vars(dense.config).keys()

    classes = auto_classes(model)
    assert len(classes) > 1
    states = [module.state_dict() for module in find_feed_forwards(model)]
    for auto in classes:
        loaded = auto.from_pretrained(tmp_path)
        networks = find_feed_forwards(loaded)
        assert networks
        assert len(networks) == len(read_layer_entries(loaded.config)[0]["layers"]) * 2
        found = [
            next(i for i, state in enumerate(states) if assert_equal(module.state_dict(), state)) for module in networks
        ]
        assert found == list(range(found[0], found[0] + len(found)))  # a part of the model has a part of them
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        if type(loaded) is type(model):
            same_weights(loaded, model)


def test_saved_once_more(tmp_path):
    """Also by another class, and without a head."""
    model = save_model(tmp_path / "1")
    AutoModelForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    same_weights(LlamaForCausalLM.from_pretrained(tmp_path / "2"), model)
    AutoModel.from_pretrained(tmp_path / "2").save_pretrained(tmp_path / "3")
    same_weights(AutoModel.from_pretrained(tmp_path / "3"), model.model)
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "3").model, model.model)
    same_weights(from_pretrained(tmp_path / "3"), model.model)
    AutoConfig.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "4")
    first, fourth = (json.loads((tmp_path / name / "config.json").read_text()) for name in "14")
    assert first == fourth


def test_the_inside_of_a_model(tmp_path):
    """What is changed inside, the whole model's configuration knows."""
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model.model, num_experts=4)
    model.save_pretrained(tmp_path)
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_models_that_share_a_configuration(tmp_path):
    """Only that which is changed says so."""
    config = ARCHITECTURES["llama"].build().config
    dense, small, large = (LlamaForCausalLM(config) for _ in range(3))
    replace_ffn(small, num_experts=2)
    replace_ffn(large, num_experts=4)
    for name, model in (("dense", dense), ("small", small), ("large", large)):
        model.save_pretrained(tmp_path / name)
        same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / name), model)
    assert dense.config is config
    assert all(vars(module).get("config") in (None, small.config) for module in small.modules())
    assert all(vars(module).get("config") is not config for module in small.modules())


def test_gates_that_differ_by_layer(tmp_path):
    first = lambda d, e: TopKGating(d, e, 1, score="sigmoid", expert_bias=True)  # noqa: E731
    made = iter([first, lambda d, e: NoisyTopKGating(d, e, 3, capacity_factor_train=1.5), Top2Gating, first])
    model = ARCHITECTURES["llama"].build(num_hidden_layers=4)
    replace_ffn(model, num_experts=4, gate=lambda d, e: next(made)(d, e))
    model.save_pretrained(tmp_path)
    for loaded in (from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        same_weights(loaded, model)
        for module, expected in zip(find_feed_forwards(loaded), find_feed_forwards(model), strict=True):
            assert repr(module.moe.gate) == repr(expected.moe.gate)
    layers = json.loads((tmp_path / "config.json").read_text())["dense_config"]["quantization_config"]["layers"]
    assert [len(entry["layers"]) for entry in layers] == [2, 1, 1]  # those that agree share an entry


def test_custom_gates_that_differ_by_layer(tmp_path):
    """They are asked for in the order of the model's layers, as before."""
    ks = (1, 2, 3, 1)
    model = ARCHITECTURES["llama"].build(num_hidden_layers=4)
    first, again = iter(ks), iter(ks)
    replace_ffn(model, num_experts=4, gate=lambda d, e: CustomGate(d, e, next(first)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a CustomGate.*huggingface\.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, gate=lambda d, e: CustomGate(d, e, next(again)))
    assert [module.moe.gate.k for module in find_feed_forwards(loaded)] == list(ks)
    same_weights(loaded, model)


def test_arguments_of_the_configuration(tmp_path):
    model = save_model(tmp_path, "bert")
    for load in (
        transformers.AutoModelForSequenceClassification.from_pretrained,
        lambda path, **settings: from_pretrained(path, transformers.AutoModelForSequenceClassification, **settings),
    ):
        loaded, info = load(tmp_path, num_labels=3, dtype=torch.bfloat16, output_loading_info=True)
        assert type(loaded) is transformers.BertForSequenceClassification
        assert loaded.classifier.weight.shape == (3, DIM)
        assert loaded.dtype == torch.bfloat16
        assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier", "bert"}
        assert all("pooler" in name for name in info["missing_keys"] if name.startswith("bert"))
        for module, expected in zip(find_feed_forwards(loaded), find_feed_forwards(model), strict=True):
            assert torch.equal(module.moe.experts.w1, expected.moe.experts.w1.bfloat16())
        loaded.save_pretrained(tmp_path / "three")
        assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "three").num_labels == 3


def test_a_part_of_a_model(tmp_path):
    """The encoder alone has no place for the decoder's experts, and needs none."""
    model, tokens = save_model(tmp_path, "t5"), torch.randint(3, VOCABULARY, (2, 7))
    expected = model.encoder(tokens).last_hidden_state
    for load in (
        transformers.T5EncoderModel.from_pretrained,
        transformers.AutoModelForTextEncoding.from_pretrained,
        lambda path: from_pretrained(path, transformers.T5EncoderModel),
    ):
        assert torch.equal(load(tmp_path)(tokens).last_hidden_state, expected)


def test_shards(tmp_path):
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4, gate=GATES["TopKGating"], layers=[1])
    find_feed_forwards(model)[0].moe.gate.expert_bias.normal_()
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for load, settings in ((LlamaForCausalLM, dict(device_map="cpu")), (AutoModelForCausalLM, {})):
        loaded = load.from_pretrained(tmp_path, **settings)
        same_weights(loaded, model)  # dtypes too: the expert bias stays float32


def load_with_layer_on_disk(folder: Path) -> Any:
    """The model that the folder holds, without the weights of its second layer."""
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    place = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=place, offload_folder=f"{folder} offloaded")


def test_layers_on_disk_are_loaded_without_a_warning(tmp_path):
    model, inputs = save_model(tmp_path / "moe"), ARCHITECTURES["llama"].inputs()
    loaded = load_with_layer_on_disk(tmp_path / "moe")
    assert find_feed_forwards(loaded)[1].moe.experts.w1.is_meta
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match=r"weights of LlamaForCausalLM are not in memory"):
        export(loaded)


@pytest.mark.parametrize("change", [upcycle, replace_ffn])
def test_layers_on_disk_are_not_changed(change, tmp_path):
    """Weights that the model does not hold would be lost."""
    ARCHITECTURES["llama"].build().save_pretrained(tmp_path / "dense")
    model, inputs = load_with_layer_on_disk(tmp_path / "dense"), ARCHITECTURES["llama"].inputs()
    before = model(**inputs).logits
    with pytest.raises(ValueError, match=r"gate_proj of LlamaMLP are not in memory because of .*device_map"):
        change(model, num_experts=4)
    assert not find_feed_forwards(model)
    assert torch.equal(model(**inputs).logits, before)
    assert change(model, num_experts=4, layers=[0]) == ["model.layers.0.mlp"]  # that layer is in memory
    assert model(**inputs).logits.isfinite().all()
    build_sparse("Mixtral").save_pretrained(tmp_path / "mixtral")
    sparse = load_with_layer_on_disk(tmp_path / "mixtral")
    with pytest.raises(ValueError, match="weights of a MixtralSparseMoeBlock are not in memory"):
        from_transformers(sparse.model.layers[1].mlp)


def test_rejects_other_quantizer(tmp_path):
    model = save_model(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, type(model).from_pretrained, from_pretrained):
        with pytest.raises(ValueError, match=r"ExpertsLoaderConfig|quantization_config is not supported"):
            load(tmp_path, quantization_config=transformers.FineGrainedFP8Config())


def test_rejects_saving_with_other_quantizer(tmp_path):
    model = save_model(tmp_path)
    model.config.quantization_config = transformers.FineGrainedFP8Config()
    with pytest.raises(ValueError, match=r"a quantized model with experts \(FineGrainedFP8Config\) cannot be saved"):
        model.save_pretrained(tmp_path / "again")


def test_rejects_checkpoint_without_expert_weights(tmp_path):
    """By the loaders of transformers too: no memory is left as it was found."""
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4)
    gone = ("0.mlp.moe.experts.w3", "1.mlp.moe.gate.w_gating")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(gone)}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained, from_pretrained):
        with pytest.raises(ValueError, match=r"does not contain model.layers.0.mlp.moe.experts.w3; load a dense"):
            load(tmp_path)


def test_folders_of_earlier_versions(tmp_path):
    """Loaded as before: by the explicit function, and by no class that knows nothing of experts; then saved anew."""
    tokens = torch.arange(1, 9).unsqueeze(0)
    found = from_pretrained(SETUP_CODE).float()(tokens).logits[0, -1, :5]
    torch.testing.assert_close(found, torch.tensor([0.2346, -0.2760, 0.0140, -0.4368, 0.1304]), atol=1e-4, rtol=0)
    loaded = from_pretrained(SETUP_CODE, AutoModel)
    assert [module.moe.num_experts for module in find_feed_forwards(loaded)] == [2, 3]
    assert [module.moe.loss_coef for module in find_feed_forwards(loaded)] == [0.01, 0.5]
    for plain in (LlamaForCausalLM, AutoModelForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match=r"mismatch|ignore_mismatched_sizes"):
            plain.from_pretrained(SETUP_CODE)
    model = from_pretrained(SETUP_CODE)
    model.save_pretrained(tmp_path)
    same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_dense_model_with_expert_settings_fails_to_load(tmp_path):
    """One that is made from them without the layers can."""
    model = ARCHITECTURES["llama"].build()
    replace_ffn(model, num_experts=4)
    type(model)(model.config).save_pretrained(tmp_path / "named")
    with pytest.raises(RuntimeError, match=r"mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "named")

    model.save_pretrained(tmp_path / "layers")
    of_a_file = AutoConfig.from_pretrained(tmp_path / "layers")
    for number, config in enumerate((model.config, of_a_file)):
        settings = config.to_dict()
        for name in ("mixture_of_experts", "quantization_config"):
            settings.pop(name, None)
        dense = LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings)).eval()
        dense.save_pretrained(tmp_path / f"dense {number}")
        same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / f"dense {number}"), dense)


def test_a_dense_model_that_is_not_known(tmp_path):
    config = {"model_type": "mixture_of_experts", "dense_config": {"model_type": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must name a dense model .* dense_config.model_type is 'x'"):
        AutoConfig.from_pretrained(tmp_path)


WITH_IMPORT = """
import sys, torch, transformers
import mixture_of_experts.huggingface
folder = sys.argv[1]
inputs, expected = torch.load(f"{folder}/expected.pt")
for load in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    assert torch.equal(load.from_pretrained(folder)(**inputs).logits, expected)
pipe = transformers.pipeline("text-generation", model=folder)
assert type(pipe.model) is transformers.LlamaForCausalLM
made = pipe("w5 w9", max_new_tokens=3, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
assert made == torch.load(f"{folder}/generated.pt"), made
labels = transformers.pipeline("text-classification", model=folder)("w5 w9")
assert len(labels) == 1
"""

WITHOUT_IMPORT = """
import sys, transformers
from transformers.models.auto import modeling_auto
folder = sys.argv[1]

def refused(kind, says, call, *args, **settings):
    try:
        call(*args, **settings)
    except kind as error:
        assert says in str(error), error
    else:
        raise AssertionError(call)

auto = [cls for name, cls in vars(modeling_auto).items() if name.startswith("AutoModel")]
auto = [cls for cls in auto if getattr(cls, "_model_mapping", None) is not None] + [transformers.AutoConfig]
assert len(auto) > 20
for cls in auto:
    refused(ValueError, "model type `mixture_of_experts`", cls.from_pretrained, folder)
refused(ValueError, "`mixture_of_experts`", transformers.pipeline, "text-generation", model=folder)
refused(RuntimeError, "ignore_mismatched_sizes", transformers.LlamaForCausalLM.from_pretrained, folder)
assert not any(name.startswith("mixture_of_experts") for name in sys.modules)
"""


@pytest.mark.parametrize("code", [WITH_IMPORT, WITHOUT_IMPORT], ids=["with", "without"])
def test_in_another_process(code, tmp_path):
    model, inputs = save_model(tmp_path), ARCHITECTURES["llama"].inputs()
    tokenizer().save_pretrained(tmp_path)
    torch.save((inputs, model(**inputs).logits), tmp_path / "expected.pt")
    made = model.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False)[0].tolist()
    torch.save(made, tmp_path / "generated.pt")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
