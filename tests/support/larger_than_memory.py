"""Measures loading, generation and training of a mixture whose experts do not fit into memory.

    python -m tests.support.larger_than_memory /disk/folder --gigabytes 8 --limit 3

writes a stock mixture of random weights, converts it, and runs it with all memory, and within a memory
cgroup (version 1 or 2) of that many gigabytes, with and without `prefetch_experts`. All runs must generate the same
tokens and have the same loss in a LoRA step. The folder must exist; the files in it are removed at the end. `measure`
does one such run in a separate process and returns a `Measured`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
CGROUPS = Path("/sys/fs/cgroup")
EXPERTS = ["experts.w1", "experts.w3", "experts.w2"]


class Measured(NamedTuple):
    """What a run measured. Megabytes are of anonymous memory, above what the process had before it loaded the model."""

    loaded: float
    generated: float  # after generating
    prompt: float  # after a prompt that reaches all experts
    trained: float  # after two steps of LoRA
    tokens: list[int]
    loss: float  # of the last step
    milliseconds: float  # per generated token
    megabytes: float  # that the process read from disk per generated token, programs included
    cached_megabytes: float  # of experts that came into the page cache per generated token
    chosen_megabytes: float  # of the experts that a token chooses
    prompt_seconds: float
    step_seconds: float


# Folders


def write_stock(folder: Path, layers: int, *, experts: int, dim: int, hidden: int, k: int = 2, **settings: Any) -> int:
    """Write a Mixtral of random weights in bfloat16, weight by weight; return the bytes of its experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from mixture_of_experts.huggingface.private_transformers import convert_to_saved
    from mixture_of_experts.huggingface.saving.folders import ShardWriter

    settings = {"vocab_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, **settings}
    config: Any = MixtralConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_local_experts=experts,
        num_experts_per_tok=k, dtype=torch.bfloat16, bos_token_id=None, eos_token_id=None, **settings,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    folder.mkdir(parents=True)
    shards = ShardWriter(folder, 10**9, folder)
    for name, weight in model.state_dict().items():
        value = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(std=weight.shape[-1] ** -0.5)
        shards.add_weights(convert_to_saved(model, {name: value}))
    shards.close()
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    return 3 * 2 * layers * experts * dim * hidden


def drop_from_page_cache(folder: Path) -> None:
    """Drop a folder's pages that no process has mapped; others would be charged to the first process that read them."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# A limit


def find_memory_cgroup() -> tuple[Path, str] | None:
    """The memory cgroup of this process, and the file of a limit in its children; None if there can be none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder, file = CGROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        elif number == "0" and (CGROUPS / "cgroup.controllers").exists():
            folder, file = CGROUPS / path.lstrip("/"), "memory.max"
        else:
            continue
        if os.access(folder, os.W_OK) and (file != "memory.max" or "memory" in read(folder / "cgroup.subtree_control")):
            return folder, file
    return None


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@contextmanager
def limit_memory(size: int) -> Iterator[Callable[[], object]]:
    """A cgroup of this process's own that has no more memory than that. It yields a function that puts the process that
    calls it there, such as a `preexec_fn`. Pages of files that it reads count, and are dropped when memory is short."""
    found = find_memory_cgroup()
    assert found is not None
    folder, file = found[0] / f"larger-than-memory-{os.getpid()}", found[1]
    folder.mkdir()
    try:
        (folder / file).write_text(str(size))
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        folder.rmdir()


# A run


def measure(folder: Path, *, limit: int | None = None, threads: int = 1, **settings: Any) -> Measured:
    """`run_model` in a process of its own, with at most `limit` bytes of memory if given."""
    words = [sys.executable, "-m", "tests.support.larger_than_memory", "--run", json.dumps(settings), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with nullcontext() if limit is None else limit_memory(limit) as enter:
        done = subprocess.run(words, cwd=ROOT, env=env, preexec_fn=enter, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def read_megabytes(file: str, name: str, unit: float) -> float:
    found = re.search(rf"{name}:\s*(\d+)", Path(file).read_text())
    assert found is not None
    return int(found[1]) * unit / 1e6


def anonymous() -> float:
    """Megabytes of this process that are no pages of files."""
    return read_megabytes("/proc/self/smaps_rollup", "Anonymous", 1024)


def count_cached(tensors: list[Any]) -> float:
    """Megabytes of the pages of mapped tensors that are in the page cache."""
    libc, total = ctypes.CDLL(None), 0
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for tensor in tensors:
        start = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        pages = bytearray(-(-length // mmap.PAGESIZE))
        failed = libc.mincore(start, length, (ctypes.c_char * len(pages)).from_buffer(pages))
        assert not failed
        total += sum(page & 1 for page in pages) * mmap.PAGESIZE
    return total / 1e6


def generate(model: Any, number: int, folder: Path, experts: list[Any]) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt of one, and for each of them milliseconds, and megabytes read and cached. Attention
    and embeddings were read before."""
    prompt = torch.tensor([[5]])
    model.generate(prompt, max_new_tokens=1)
    drop_from_page_cache(folder)
    cached, before = count_cached(experts), read_megabytes("/proc/self/io", "read_bytes", 1)
    start = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=number, min_new_tokens=number, do_sample=False)[0].tolist()
    seconds = time.perf_counter() - start
    read = read_megabytes("/proc/self/io", "read_bytes", 1) - before
    return tokens, [1e3 * seconds / number, read / number, (count_cached(experts) - cached) / number]


def run_model(
    folder: Path, *, tokens: int = 8, prompt: int = 64, train: int = 8, lora: str = "experts", prefetch: bool = False
) -> Measured:
    """Load a folder, generate, read a prompt, and train LoRA on "attention" or "experts"."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from mixture_of_experts.huggingface import fast_lora, prefetch_experts, weights_shown
    from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
    from mixture_of_experts.quantize import QuantizedExperts

    start = anonymous()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    marks = [anonymous() - start]
    layers = find_feed_forwards(model)
    experts = [tensor for layer in layers for tensor in (*layer.moe.experts.parameters(), *layer.moe.experts.buffers())]
    with prefetch_experts(model) if prefetch else nullcontext():
        found, times = generate(model, tokens, folder, experts)
    marks.append(anonymous() - start)
    ids = torch.arange(prompt).mul(7).remainder(200).add(10).unsqueeze(0)
    clock = time.perf_counter()
    with torch.no_grad():
        model(ids)
    prompt_seconds = time.perf_counter() - clock
    marks.append(anonymous() - start)

    moe = layers[0].moe
    chosen = sum(tensor.nbytes for tensor in experts) * moe.gate.k / moe.num_experts / 1e6
    targets: Any = dict(target_modules=["q_proj", "v_proj"] if lora == "attention" else [])
    targets["target_parameters"] = EXPERTS if lora == "experts" else None
    hidden = isinstance(moe.experts, QuantizedExperts) and lora == "experts"
    with weights_shown(model) if hidden else nullcontext():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, **targets))
    model = (fast_lora(model) if lora == "experts" else model).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    clock, loss = time.perf_counter(), torch.zeros(())
    for _ in range(2):
        loss = model(ids[:, :train], labels=ids[:, :train]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step_seconds = (time.perf_counter() - clock) / 2
    marks.append(anonymous() - start)
    times += [chosen, prompt_seconds, step_seconds]
    return Measured(*[round(mark, 1) for mark in marks], found, loss.item(), *[round(each, 3) for each in times])


def demonstrate(folder: Path, gigabytes: float, limit: float) -> None:
    """Write, convert and run a mixture with and without the limit, and compare."""
    sizes: dict[str, Any] = dict(experts=32, dim=2048, hidden=1024, k=4)
    layers = round(gigabytes * 1e9 / (6 * sizes["experts"] * sizes["dim"] * sizes["hidden"]) + 0.5)
    allowed = int(limit * 1e9)
    size = write_stock(folder / "stock", layers, **sizes)
    print(f"{size / 1e9:.2f} GB of experts in {layers} layers, {limit} GB allowed", flush=True)
    clock = time.perf_counter()
    drop_from_page_cache(folder / "stock")
    words = [sys.executable, "-m", "mixture_of_experts.huggingface", "convert", folder / "stock", folder / "moe"]
    words += ["--max-shard-size", "500MB"]
    with limit_memory(allowed) as enter:
        subprocess.run([*map(str, words)], cwd=ROOT, preexec_fn=enter, check=True, stderr=subprocess.DEVNULL)
    print(f"converted within the limit in {time.perf_counter() - clock:.0f} s", flush=True)
    rmtree(folder / "stock")
    found = {}
    for name, more in (
        ("all memory", {}),
        ("limited", dict(limit=allowed)),
        ("limited, prefetch_experts", dict(limit=allowed, prefetch=True)),
    ):
        drop_from_page_cache(folder / "moe")
        found[name] = measure(folder / "moe", tokens=16, prompt=256, **more)
        print(name, {key: value for key, value in found[name]._asdict().items() if key != "tokens"}, flush=True)
    assert len({(tuple(one.tokens), one.loss) for one in found.values()}) == 1, found
    print("the same tokens and the same loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on a disk with room for twice the gigabytes")
    parser.add_argument("--gigabytes", type=float, default=8, help="of experts in 16 bits (default: 8)")
    parser.add_argument("--limit", type=float, default=3, help="gigabytes of memory (default: 3)")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        print(json.dumps(run_model(given.folder, **given.run)._asdict()))
        return
    with TemporaryDirectory(dir=given.folder) as folder:
        demonstrate(Path(folder), given.gigabytes, given.limit)


if __name__ == "__main__":
    main()
