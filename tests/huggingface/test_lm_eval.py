"""lm-eval's command on a saved model with experts and on its export: equal results of a local task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.transformers_models import ARCHITECTURES
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mixture_of_experts.huggingface import export, upcycle

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
WITH_IMPORT = "import mixture_of_experts.huggingface; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
WITHOUT_IMPORT = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
WORDS = ["the", "cat", "dog", "sat", "on", "mat", "ran", "to", "house", "and", "slept", "bird", "sang", "in", "tree"]
TASK = """
task: small
dataset_path: json
dataset_kwargs:
  data_files: {test: DATA}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


def save_models(folder: Path) -> None:
    """A model with experts in `ours`, and its export in `stock`, with a tokenizer of words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=4, noise=0.5)
    for name, saved in (("ours", model), ("stock", export(model))):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def save_task(folder: Path) -> None:
    rows = [
        {"text": "the cat sat on", "choices": [" ".join(WORDS[i : i + 3]), "the mat", "a house"], "gold": i % 3}
        for i in range(12)
    ]
    folder.mkdir()
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "small.yaml").write_text(TASK.replace("DATA", str(folder / "data.jsonl")))


def run_lm_eval(folder: Path, name: str, program: str = WITH_IMPORT) -> subprocess.CompletedProcess[str]:
    model_args = f"pretrained={folder / name},dtype=float32"
    arguments = ["run", "--model", "hf", "--model_args", model_args, "--tasks", "small", "--device", "cpu"]
    arguments += ["--include_path", str(folder / "task"), "--output_path", str(folder / "results" / name)]
    command = [sys.executable, "-c", program, *arguments, "--log_samples"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=settings)


def read_samples(folder: Path, name: str) -> Tensor:
    """The log-likelihoods of the choices of each question, `(questions, choices)`."""
    (file,) = (folder / "results" / name).rglob("samples*.jsonl")
    lines: Any = map(json.loads, file.read_text().splitlines())
    return torch.tensor([[float(response[0]) for response in line["filtered_resps"]] for line in lines])


def test_equal_results(tmp_path):
    torch.manual_seed(0)
    save_models(tmp_path)
    save_task(tmp_path / "task")
    for name in ("ours", "stock"):
        done = run_lm_eval(tmp_path, name)
        assert done.returncode == 0, done.stderr
    ours, stock = read_samples(tmp_path, "ours"), read_samples(tmp_path, "stock")
    assert ours.shape == (12, 3)
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    assert ours.std(0).max() > 0.1


def test_a_folder_runs_no_code(tmp_path):
    """Without the import the command refuses the folder: what it holds imports nothing."""
    save_models(tmp_path)
    save_task(tmp_path / "task")
    done = run_lm_eval(tmp_path, "ours", WITHOUT_IMPORT)
    assert done.returncode != 0
    assert "`mixture_of_experts` but Transformers does not recognize this architecture" in done.stderr
