"""Folders that `export` and `to_transformers` write, in vLLM, llama.cpp and mlx-lm: `nox -s engines`."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.inference_engines import FOLDERS, ask, convert_to_gguf, find_environment, run_documented_conversion
from support.pretrained import SMOLLM2, find_folder

transformers = pytest.importorskip("transformers", reason="it asks for Python 3.11")
from support.served_models import SERVED, UNUSUAL, run_transformers, tokenize  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.engines, pytest.mark.pretrained]

NEW_TOKENS = 24
#: the largest difference of a log-probability from transformers, in float32
LIMITS = {"vLLM": 1e-3, "mlx-lm": 1e-3, "llama.cpp": 1e-3, "llama.cpp, float16 cache": 0.02}
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(find_environment(name) is None, reason=f"{name} is not installed"))
    for name in LIMITS
]


class Served(NamedTuple):
    """A saved model, what transformers computes of it, and the warning that was given."""

    name: str
    folder: Path
    expected: list[dict[str, Any]]
    warning: str


def save(name: str, made: Any, folder: Path) -> Served:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.save_pretrained(folder)
    warned = [str(one.message) for one in caught if "some engines do not compute" in str(one.message)]
    del made
    return Served(name, folder, run_transformers(folder, tokenize(), NEW_TOKENS), "".join(warned))


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One kind of folder after the other: they are large."""
    if find_folder(SMOLLM2) is None:
        pytest.skip("python -m tests.support.pretrained fetches the model")
    work = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    yield save(request.param, SERVED[request.param](work / "intermediate"), work / "folder")
    shutil.rmtree(work)


def measure(engine: str, model: Path, expected: list[dict[str, Any]], work: Path) -> tuple[float, bool]:
    """The largest difference of log-probabilities, and whether the greedy tokens are equal."""
    answers = ask(engine, model, tokenize(), NEW_TOKENS, work)
    differences = [
        abs(found - wanted["prefill"][position, int(token)].item())
        for answer, wanted in zip(answers, expected, strict=True)
        for position, tokens in enumerate(answer["prefill"])
        for token, found in tokens.items()
    ]
    assert all(len(answer["prefill"]) == len(prompt) for answer, prompt in zip(answers, tokenize(), strict=True))
    largest = max(differences, key=lambda value: float("inf") if value != value else value)
    return largest, all(one["greedy"] == other["greedy"] for one, other in zip(answers, expected, strict=True))


def find_model(engine: str, folder: Path) -> Path:
    """What an engine loads: the folder, or the file next to it that llama.cpp's converter makes of it."""
    if not engine.startswith("llama.cpp"):
        return folder
    file = folder.with_suffix(".gguf")
    if not file.exists():
        convert_to_gguf(folder, file)
    return file


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_the_same(served: Served, engine: str, tmp_path: Path):
    """Or the warning named them."""
    assert (served.folder / "tokenizer.json").exists()
    largest, same = measure(engine, find_model(engine, served.folder), served.expected, tmp_path)
    print(f"\n| {served.name} | {engine} | {largest:.1e} | {'equal' if same else 'other'} tokens |")
    if engine.partition(",")[0] in served.warning:
        assert largest > 10 * LIMITS[engine]
    else:
        assert largest < LIMITS[engine]
        margin = min(answer["margin"] for answer in served.expected)
        assert margin > 2 * LIMITS["vLLM"]  # or tokens might differ
        assert same or largest > margin / 2  # as with a cache in float16


@pytest.mark.parametrize("engine", [ENGINES[2]])
def test_documented_conversion_to_gguf(served: Served, engine: str, tmp_path: Path):
    """The converter and the quantizer accept the names and sizes of every kind of folder."""
    converted, quantized = run_documented_conversion(served.folder, tmp_path)
    assert quantized.stat().st_size < 0.6 * converted.stat().st_size
    for kind, file, limit in (("bfloat16", converted, 1.0), ("Q4_K_M", quantized, 5.0)):
        largest, _ = measure(engine, file, served.expected, tmp_path)
        print(f"\n| {served.name} | {engine}, {kind} | {largest:.1e} |")
        if engine not in served.warning:
            assert largest < limit


@pytest.mark.parametrize("engine", ENGINES[:3])
@pytest.mark.parametrize("name", UNUSUAL)
def test_engines_that_ignore_a_setting_are_named(name: str, engine: str, tmp_path: Path):
    """And no others: they compute the same, or raise. An engine that learned a setting fails here: remove its fault."""
    make, wrong = UNUSUAL[name]
    torch.manual_seed(0)
    _, folder, expected, warning = save(name, make(), tmp_path / "folder")
    assert {other for other in FOLDERS if other in warning} == wrong
    if engine in wrong:
        largest, _ = measure(engine, find_model(engine, folder), expected, tmp_path)
        assert largest > 10 * LIMITS[engine] or largest != largest
        return
    with contextlib.suppress(RuntimeError):  # an engine that rejects a model is not wrong
        largest, _ = measure(engine, find_model(engine, folder), expected, tmp_path)
        assert largest < LIMITS[engine]
