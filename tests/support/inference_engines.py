"""Runs inference engines in the environments that `nox -s engines` creates: each engine has its own Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import inference_clients

FOLDERS = {"vLLM": "vllm", "llama.cpp": "llama.cpp", "mlx-lm": "mlx-lm"}  # by engine
SOURCE = "source/*/vendor/llama.cpp"  # in the environment of llama.cpp
DOCS = Path(__file__).resolve().parents[2] / "docs"


def find_environment(engine: str) -> Path | None:
    """The environment of an engine in the folder $MIXTURE_OF_EXPERTS_ENGINES; None if there is none."""
    folder = Path(os.environ.get("MIXTURE_OF_EXPERTS_ENGINES", "")).absolute() / FOLDERS[engine.partition(",")[0]]
    return folder if (folder / "bin" / "python").exists() else None


def find_source() -> Path:
    """llama.cpp's source folder, which contains its converter."""
    environment = find_environment("llama.cpp")
    assert environment is not None
    (source,) = environment.glob(SOURCE)
    return source


def run_command(engine: str, *words: str | Path, cwd: Path | None = None) -> None:
    """Run a command in the environment of an engine; RuntimeError with its output if it fails."""
    environment = find_environment(engine)
    assert environment is not None
    # by default vLLM starts a second process, which imports everything again
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stdout[-2000:]}{done.stderr[-4000:]}")


def ask(engine: str, model: Path, prompts: Sequence[list[int]], new_tokens: int, work: Path) -> list[dict[str, Any]]:
    """What an engine returns for prompts: see `inference_clients`."""
    request, answer = work / "request.json", work / "answer.json"
    request.write_text(json.dumps({"prompts": prompts, "new_tokens": new_tokens}))
    run_command(engine, "python", inference_clients.__file__, engine, model, request, answer)
    return json.loads(answer.read_text())


def convert_to_gguf(folder: Path, target: Path) -> None:
    """Convert a folder to float32 with llama.cpp's converter."""
    converter = find_source() / "convert_hf_to_gguf.py"
    run_command("llama.cpp", "python", converter, folder, "--outtype", "f32", "--outfile", target)


def run_documented_conversion(folder: Path, work: Path) -> tuple[Path, Path]:
    """Convert and quantize a folder with the documented commands, and return both files."""
    blocks = (
        block for page in DOCS.rglob("*.md") for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    )
    (block,) = (block for block in blocks if "convert_hf_to_gguf.py" in block)
    commands = [line for line in block.splitlines() if not line.startswith("llama-server")]  # the server never ends
    (work / "merged").symlink_to(folder)
    (work / "llama.cpp").symlink_to(find_source())
    run_command("llama.cpp", "bash", "-euxc", "\n".join(commands), cwd=work)
    return work / "merged.gguf", work / "merged-q4.gguf"
