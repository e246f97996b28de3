"""The command on folders: what it writes is what the functions make, or nothing that looks finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.transformers_models import ARCHITECTURES
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixture_of_experts.huggingface import export, upcycle
from mixture_of_experts.huggingface.__main__ import main
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.saving import folders

from .test_saving import same_weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")]
COMMAND = [sys.executable, "-m", "mixture_of_experts.huggingface"]


def save_model(name: str, folder: Path, **settings) -> nn.Module:
    model = ARCHITECTURES[name].build(**settings)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_upcycled_folders_are_upcycled_models(name, tmp_path):
    """Every architecture: equal logits before and after, experts that are copies, all other weights as they were."""
    dense, inputs = save_model(name, tmp_path / "in"), ARCHITECTURES[name].inputs()
    words = ["upcycle", str(tmp_path / "in"), str(tmp_path / "out"), "--num-experts", "4", "--max-shard-size", "40KB"]
    assert main(words) == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    loaded = type(dense).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=0)
    upcycle(dense, num_experts=4)
    expected = dense.state_dict()
    for key, value in loaded.state_dict().items():
        if not key.endswith("gate.w_gating"):  # drawn
            assert torch.equal(value, expected.pop(key)), key
    assert all(key.endswith("gate.w_gating") for key in expected)
    for name in ("tokenizer_config.json", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "out" / name).exists()
    assert loaded.config.architectures == [type(dense).__name__]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_settings_of_the_command(tmp_path):
    dense, inputs = save_model("llama", tmp_path / "in"), ARCHITECTURES["llama"].inputs()
    settings = ["--num-experts", "8", "--k", "4", "--granularity", "2", "--shared-expert", "16", "--layers", "1"]
    assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "out"), *settings]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=0)
    (module,) = find_feed_forwards(loaded)
    assert (module.moe.gate.k, module.moe.experts.hidden_dim, module.moe.shared_expert.hidden_dim) == (4, 16, 16)
    assert (tmp_path / "out" / "model.safetensors").exists()  # small enough for one file


def test_gate_and_coefficients(tmp_path):
    dense, inputs = save_model("llama", tmp_path / "in"), ARCHITECTURES["llama"].inputs()
    settings = ["--gate", 'TopKGating(k=3, score="sigmoid", expert_bias=True)', "--loss-coef", "0.5"]
    assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "out"), *settings, "--z-loss-coef", "0.25"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    moe = find_feed_forwards(loaded)[0].moe
    assert (moe.gate.k, moe.gate.score, moe.loss_coef, moe.z_loss_coef) == (3, "sigmoid", 0.5, 0.25)
    assert moe.gate.expert_bias.dtype == torch.float32
    expected = dense.to(torch.bfloat16)(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=0.1, rtol=0.05)


GATES = ["Top", "TopKGating", "TopKGating(3)", "TopKGating(k=x)", "nn.Linear()", "import os", ""]
NO_GATE = 'expected a gate such as TopKGating(k=4, score="sigmoid"), but got {!r}; the available gates are '
NO_SIZE = "expected a size such as 500MB or 5GB, but got {!r}"


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [("gate", text, NO_GATE) for text in GATES]
    + [("max-shard-size", text, NO_SIZE) for text in ("0", "5TB", "x", "-1")],
)
def test_rejects_non_gates_and_sizes(option, text, says, capsys):
    with pytest.raises(SystemExit):
        main(["upcycle", "in", "out", f"--{option}={text}"])
    assert says.format(text) in capsys.readouterr().err


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["upcycle", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("8", "5GB"):
        assert f"(default: {words})" in shown
    assert "coefficient of the balancing loss (default: 0.01)" in shown
    assert "by default all" in shown
    assert "None" not in shown


def test_names_without_the_head_and_other_dtypes(tmp_path):
    """As the hub has GPT-2: no `transformer.` before the names of weights; in bfloat16."""
    dense = ARCHITECTURES["gpt2"].build().to(torch.bfloat16)
    dense.transformer.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "out"), "--num-experts", "2"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if ".moe." in name} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    inputs = ARCHITECTURES["gpt2"].inputs()
    torch.testing.assert_close(loaded(**inputs).logits, dense(**inputs).logits, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_exported_folders_are_exported_models(name, tmp_path):
    dense, inputs = save_model(name, tmp_path / "in"), ARCHITECTURES[name].inputs()
    assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "moe"), "--noise", "0.1"]) == 0
    assert main(["export", str(tmp_path / "moe"), str(tmp_path / "out"), "--max-shard-size", "40KB"]) == 0
    model, loaded = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("moe", "out"))
    expected = export(model)
    assert type(loaded) is type(expected)
    same_weights(loaded, expected)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    assert (model(**inputs).logits - dense(**inputs).logits).abs().max() > 1e-3
    # names as the class's own checkpoints have them, for programs that read those
    expected.save_pretrained(tmp_path / "theirs")
    index = json.loads((tmp_path / "out" / folders.INDEX_FILE).read_text())["weight_map"]
    assert index.keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()


def test_failed_command_leaves_nothing(tmp_path, capsys):
    save_model("llama", tmp_path / "in")
    save_model("gpt2", tmp_path / "gpt2")
    assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "moe")]) == 0
    assert main(["upcycle", str(tmp_path / "gpt2"), str(tmp_path / "moe2")]) == 0
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(os.listdir(tmp_path))
    for words, problem in [
        (("upcycle", "in", "moe"), "moe already exists; choose another name"),
        (("upcycle", "in", "link"), "link already exists; choose another name"),
        (("upcycle", "moe", "out"), "moe already has experts"),
        (("export", "in", "out"), "in has no experts"),
        (("export", "moe2", "out"), "transformers has no mixture-of-experts class for GPT2LMHeadModel"),
        (("upcycle", "in", "out", "--granularity", "5"), "num_experts=8 must be a multiple of granularity=5"),
        (("upcycle", "in", "out", "--gate", "TopKGating(kay=2)"), "unexpected keyword argument 'kay'"),
    ]:
        capsys.readouterr()
        paths = [words[0], *(str(tmp_path / word) for word in words[1:3]), *words[3:]]
        assert main(paths) == 1
        assert problem in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == before


def test_damaged_weights_raise_and_leave_nothing(tmp_path, capsys):
    save_model("llama", tmp_path / "in")
    words = ["upcycle", str(tmp_path / "in"), str(tmp_path / "out"), "--num-experts", "2"]
    shard, index = sorted((tmp_path / "in").glob("*.safetensors"))[1], tmp_path / "in" / folders.INDEX_FILE
    whole = {path: path.read_bytes() for path in (shard, index)}
    for path, data in [(shard, whole[shard][:100]), (shard, None), (index, whole[index][:50]), (index, b"{}")]:
        path.write_bytes(data) if data is not None else path.unlink()
        assert main(words) != 0
        assert f"{path} is missing, damaged or invalid (" in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == ["in"]
        path.write_bytes(whole[path])
    assert main(words) == 0


def replace_in_file(path: Path, change) -> None:
    """Change what a JSON file holds."""
    held = json.loads(path.read_text())
    path.write_text(json.dumps(change(held)))


@pytest.mark.parametrize("command", ["upcycle", "export"])
@pytest.mark.parametrize("place", ["/etc/passwd", "../other/model.safetensors", "a/../../b", "..\\b", 5, None, ["a"]])
def test_weight_map_outside_folder_raises(command, place, tmp_path, capsys):
    save_model("llama", tmp_path / "in")
    if command == "export":
        assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "moe"), "--max-shard-size", "40KB"]) == 0
        (tmp_path / "in").rename(tmp_path / "dense")
        (tmp_path / "moe").rename(tmp_path / "in")
    index = tmp_path / "in" / folders.INDEX_FILE
    weights = json.loads(index.read_text())["weight_map"]
    wrong = [{"weight_map": dict.fromkeys(weights, place)}, [], *({"weight_map": held} for held in ([], "a", None))]
    for held in wrong:
        index.write_text(json.dumps(held))
        assert main([command, str(tmp_path / "in"), str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert f"{index} is missing, damaged" in error
        outside = held is wrong[0] and isinstance(place, str)
        assert not outside or f"the weight_map refers to {place!r}, which is outside the folder" in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "gone", ["model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_rejects_folder_with_missing_weight(gone, tmp_path, capsys):
    """By its name; also by `export`."""
    save_model("llama", tmp_path / "in")
    assert main(["upcycle", str(tmp_path / "in"), str(tmp_path / "moe"), "--max-shard-size", "40KB"]) == 0
    for command, folder in (("upcycle", "in"), ("export", "moe")):
        for file in (tmp_path / folder).glob("*.safetensors"):
            left = {name: value for name, value in load_file(file).items() if name != gone}
            save_file({name: value.clone() for name, value in left.items()}, file, metadata={"format": "pt"})
        assert main([command, str(tmp_path / folder), str(tmp_path / "out")]) == 1
        assert f"the files have no {gone}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_configuration_without_its_class(tmp_path, capsys):
    """What the error advises works."""
    save_model("llama", tmp_path / "in")
    words = ["upcycle", str(tmp_path / "in"), str(tmp_path / "out")]
    replace_in_file(tmp_path / "in" / "config.json", lambda held: {**held, "architectures": None})
    assert main(words) == 1
    assert 'to config.json, such as "architectures": ["LlamaForCausalLM"]' in capsys.readouterr().err
    replace_in_file(tmp_path / "in" / "config.json", lambda held: {**held, "architectures": ["LlamaForCausalLM"]})
    assert main(words) == 0


@pytest.mark.parametrize("command", ["upcycle", "export"])
def test_hub_names_are_not_resolved(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it asked the network"))
    assert main([command, "gpt2", "out"]) == 1
    assert "gpt2 is not a folder, and models are not downloaded automatically; download" in capsys.readouterr().err
    (tmp_path / "gpt2").mkdir()
    assert main([command, "gpt2", "out"]) == 1
    assert os.listdir(tmp_path) == ["gpt2"]


def test_an_interrupted_run_cleans_up(tmp_path, monkeypatch):
    save_model("llama", tmp_path / "in")
    monkeypatch.setattr(folders.ShardWriter, "close", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(["upcycle", str(tmp_path / "in"), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["in"]


def save_large_model(folder: Path, layers: int, hidden: int) -> None:
    sizes = dict(vocab_size=64, hidden_size=256, intermediate_size=hidden, num_attention_heads=4)
    config = LlamaConfig(num_hidden_layers=layers, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10MB")


def test_killed_command_leaves_no_target(tmp_path):
    """SIGKILL while shards are written: no folder of that name, and what lies beside it is refused."""
    save_large_model(tmp_path / "in", layers=16, hidden=256)
    words = [*COMMAND, "upcycle", str(tmp_path / "in"), str(tmp_path / "out"), "--max-shard-size", "2MB"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(tmp_path.glob(".out.*.unfinished/part-2.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out.*.unfinished")
    assert not list(left.glob("config.json"))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left)
    subprocess.run(words, check=True, timeout=300)  # and again, to the end
    assert len(find_feed_forwards(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 16


MEASURED = """
import sys, threading, time
from pathlib import Path
import mixture_of_experts.huggingface.saving.folders
from mixture_of_experts.huggingface.__main__ import main

def own():  # kB of this process that are no pages of files, which the system may drop
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while True:
        seen.append(own())
        time.sleep(0.002)

before, seen = own(), []
threading.Thread(target=watch, daemon=True).start()
assert main(sys.argv[1:]) == 0
print((max(seen) - before) / 1024)
"""


def test_memory_is_that_of_a_shard_or_two(tmp_path):
    """Of 300 MB that are written, a layer (25 MB) and two shards (25 MB each) at the most are in memory."""
    save_large_model(tmp_path / "in", layers=12, hidden=1024)
    for command, source, target in (("upcycle", "in", "moe"), ("export", "moe", "out")):
        words = [command, str(tmp_path / source), str(tmp_path / target), "--max-shard-size", "25MB"]
        done = subprocess.run([sys.executable, "-c", MEASURED, *words], check=True, timeout=500, stdout=subprocess.PIPE)
        assert sum(file.stat().st_size for file in (tmp_path / target).iterdir()) > 300e6
        assert float(done.stdout.split()[-1]) < 150
