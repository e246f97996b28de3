"""The environments of inference engines, which `nox -s engines` makes: each engine has a Python of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import inference_clients

FOLDERS = {"vLLM": "vllm", "llama.cpp": "llama.cpp", "mlx-lm": "mlx-lm"}  # by engine
CONVERTER = "source/*/vendor/llama.cpp/convert_hf_to_gguf.py"  # in the environment of llama.cpp


def find_environment(engine: str) -> Path | None:
    """The environment of an engine in the folder $MIXTURE_OF_EXPERTS_ENGINES; None if there is none."""
    folder = Path(os.environ.get("MIXTURE_OF_EXPERTS_ENGINES", "")) / FOLDERS[engine.partition(",")[0]]
    return folder if (folder / "bin" / "python").exists() else None


def run_python(engine: str, *words: str | Path) -> None:
    """Run a script by the Python of an engine; RuntimeError with its output if it fails."""
    environment = find_environment(engine)
    assert environment is not None
    # vLLM in one process: a second one would import everything again
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [str(environment / "bin" / "python"), *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stdout[-2000:]}{done.stderr[-4000:]}")


def ask(engine: str, model: Path, prompts: Sequence[list[int]], new_tokens: int, work: Path) -> list[dict[str, Any]]:
    """What an engine returns for prompts: see `inference_clients`."""
    request, answer = work / "request.json", work / "answer.json"
    request.write_text(json.dumps({"prompts": prompts, "new_tokens": new_tokens}))
    run_python(engine, inference_clients.__file__, engine, model, request, answer)
    return json.loads(answer.read_text())


def convert_to_gguf(folder: Path, target: Path) -> None:
    """By llama.cpp's own converter."""
    environment = find_environment("llama.cpp")
    assert environment is not None
    (converter,) = environment.glob(CONVERTER)
    run_python("llama.cpp", converter, folder, "--outtype", "f32", "--outfile", target)


def quantize_gguf(model: Path, target: Path, kind: str) -> None:
    """By llama.cpp's own quantizer."""
    run_python("llama.cpp", inference_clients.__file__, "quantize", model, kind, target)
