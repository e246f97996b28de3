"""Experts stay in the file: what loading, generating, a long prompt and LoRA take is no copy of them."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.larger_than_memory import Measured, drop_from_page_cache, find_memory_cgroup, measure, write_stock
from support.transformers_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from mixture_of_experts.huggingface import from_transformers, prefetch_experts, prefetching, upcycle
from mixture_of_experts.huggingface.prefetching import MappedFiles, find_mapped_stacks
from mixture_of_experts.huggingface.saving.converting import convert_folder, quantize_folder
from mixture_of_experts.ops import int4
from mixture_of_experts.quantize import quantize_experts

from .test_block_conversion import build_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
#: of experts in bfloat16: megabytes
SIZE = 151
TOKENS = torch.tensor([[5, 9, 27, 17], [4, 8, 16, 32]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a mixture in 16 bits, 8 bits and 4 bits, and in 4 bits in the layout of no machine."""
    root = tmp_path_factory.mktemp("mixtures")
    assert write_stock(root / "stock", 6, experts=32, dim=256, hidden=512) / 1e6 == pytest.approx(SIZE, abs=1)
    convert_folder(root / "stock", root / "32", dtype=torch.float32)
    convert_folder(root / "stock", root / "16")
    for bits in (8, 4):
        convert_folder(root / "16", root / str(bits), bits=bits)
    quantize_folder(root / "16", root / "portable", bits=4)
    gc.collect()  # pages that this process still maps would stay in the page cache
    return root


@pytest.fixture(scope="module")
def measured(folder: Path) -> Callable[[str], Measured]:
    """What a run with all memory measures, by the name of the folder."""
    return cache(lambda name: measure(folder / name, tokens=4, prefetch=True))


#: largest anonymous memory after loading and generating, a prompt of all experts, and training, by the folder. oneDNN
#: keeps a compiled program for each shape of a product in bfloat16, whatever the size of the model
LIMITS = {"32": (20, 60, 80), "16": (20, 90, 140), "8": (10, 60, 80), "4": (10, 60, 80)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [*((name, "experts") for name in LIMITS), ("16", "attention")])
def test_experts_are_not_copied(name, lora, folder, measured):
    found = measured(name) if lora == "experts" else measure(folder / name, lora=lora)
    generated, prompt, trained = LIMITS[name]
    assert found.loaded < 8, found
    assert found.generated < generated, found
    assert found.prompt < prompt, found
    assert found.trained < trained, found


@pytest.mark.slow
def test_other_layouts_of_4_bits_are_copied(folder, measured):
    """As documented; the layout of this machine is not."""
    assert measure(folder / "portable").loaded > 0.25 * SIZE > 10 * measured("4").loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", ["16", "8", "4"])
def test_runs_within_a_limit(name, folder, measured):
    """Of what interpreter, torch and transformers need, and half of the experts: tokens and loss are the same."""
    if find_memory_cgroup() is None:
        pytest.skip("no memory cgroup can be made")
    wanted, size = measured(name), sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    drop_from_page_cache(folder / name)
    found = measure(folder / name, tokens=4, limit=int(550e6 + size / 2))
    assert (found.tokens, found.loss) == (wanted.tokens, wanted.loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_bytes_read_for_a_token_are_those_of_the_chosen_experts(name, measured):
    """What comes into the page cache, in whole pages. Tokens may choose experts that are there."""
    found, tensors = measured(name), {"32": 3, "16": 3, "8": 6, "4": 9}[name]
    parts = 6 * 2 * tensors  # of layers and choices
    assert 0 < found.cached_megabytes <= found.chosen_megabytes + 2 * parts * mmap.PAGESIZE / 1e6, found


def load_mapped(folder: Path, bits: int | None = None) -> Any:
    model = from_transformers(build_model("Mixtral", hidden=32)).requires_grad_(False)
    if bits is not None:
        quantize_experts(model, bits, group=32)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_experts_of_a_loaded_folder_are_mapped(bits, tmp_path):
    model = load_mapped(tmp_path, bits)
    stacks = find_mapped_stacks(model)
    stored = {"w1", "w3", "w2"} if bits is None else {f"w{i}_{part}" for i in (1, 3, 2) for part in ("packed", "scale")}
    assert len(stacks) == 2
    assert all({*names} >= stored for names in stacks.values())
    model.bfloat16()
    cast = {f"w{i}_scale" for i in (1, 3, 2)} if bits else stored
    assert all(not {*names} & cast for names in find_mapped_stacks(model).values())


def record_advice(monkeypatch: Any) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(prefetching, "load_madvise", lambda: lambda *given: calls.append(given))
    return calls


@pytest.mark.parametrize("bits", [None, 8, 4])
@torch.no_grad()
def test_chosen_experts_are_prefetched(bits, tmp_path, monkeypatch):
    """Their bytes and no others, in each layer, before they are computed; results are the same."""
    model, calls = load_mapped(tmp_path, bits), record_advice(monkeypatch)
    wanted, chosen = model(TOKENS[:1, :1]).logits, []
    for layer in model.model.layers:
        layer.mlp.moe.gate.register_forward_hook(
            lambda gate, args, routing: chosen.append({*routing.expert.flatten().tolist()})
        )
    with prefetch_experts(model):
        assert model(TOKENS[:1, :1]).logits.equal(wanted)
    spans = []
    for layer, experts in zip(model.model.layers, chosen, strict=True):
        stack = layer.mlp.moe.experts
        for name in find_mapped_stacks(stack)[stack]:
            for expert in experts:
                part = getattr(stack, name)[expert]
                spans.append((part.data_ptr(), part.data_ptr() + part.nbytes))
    found = [(page, page + length) for page, length, _ in calls]
    assert len(found) == len(spans) > 0
    for page, stop in found:
        assert page % 4096 == 0
        assert any(page <= start < page + 4096 and stop == end for start, end in spans)
    calls.clear()
    assert model(TOKENS[:1, :1]).logits.equal(wanted)
    with prefetch_experts(model):
        model(TOKENS.repeat(4, 8))  # of more than half of the experts
    assert not calls


def test_prefetching_rejects_what_is_not_mapped(tmp_path):
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=4)
    says = "LlamaForCausalLM has no memory-mapped expert weights"
    with pytest.raises(ValueError, match=says), prefetch_experts(model):
        pass
    mapped = load_mapped(tmp_path)
    assert MappedFiles.read().contains(mapped.model.layers[0].mlp.moe.experts.w1)
    for experts in (layer.mlp.moe.experts for layer in mapped.model.layers):
        for weight in experts.parameters():
            weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="has no memory-mapped expert weights"), prefetch_experts(mapped):
        pass


def test_prefetching_needs_the_map_of_memory(monkeypatch):
    monkeypatch.setattr(prefetching, "MEMORY_MAP", Path("/proc/self/no-such-file"))
    with pytest.raises(OSError, match="requires Linux"), prefetch_experts(ARCHITECTURES["llama"].build()):
        pass


def test_4_bits_in_this_machines_layout_stay_mapped(tmp_path):
    """In another layout they are copied, and the model saves its own."""
    model = load_mapped(tmp_path / "a", 4)
    assert {experts.settings()["block"] for experts in find_mapped_stacks(model)} == {int4.find_cpu_block()}
    for layer in model.model.layers:
        layer.mlp.moe.experts.repack(int4.PORTABLE_BLOCK)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert not any("w1_packed" in names for names in find_mapped_stacks(again).values())
    assert again(TOKENS).logits.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "a")(TOKENS).logits)
