"""Whole models in ONNX: onnxruntime computes what torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.transformers_models import ARCHITECTURES, VOCABULARY
from torch import Tensor, nn

from mixture_of_experts import TopKGating
from mixture_of_experts.huggingface import from_transformers, upcycle

from .test_block_conversion import build_model

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # in the exporter
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # likewise
]


class Logits(nn.Module):
    """The logits of a model, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def build_llama(**settings: Any) -> Any:
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=4, noise=0.5, **settings)
    return model


MODELS = {
    "upcycled": build_llama,
    "fine": lambda: build_llama(granularity=2, gate=lambda dim, e: TopKGating(dim, e, k=4)),
    "Mixtral": lambda: from_transformers(build_model("Mixtral")),
    "Qwen3Moe": lambda: from_transformers(build_model("Qwen3Moe")),
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("upcycled", False), ("upcycled", True), ("fine", False), ("Mixtral", True), ("Qwen3Moe", False)],
)
def test_models_in_onnxruntime(name, dynamic, tmp_path):
    model = Logits(MODELS[name]()).eval()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) if dynamic else None
    with torch.no_grad():
        program: Any = torch.onnx.export(
            model, (make_tokens(2, 9),), dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False
        )
    program.save(tmp_path / "model.onnx", external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    for shape in [(2, 9), (1, 5), (3, 30)] if dynamic else [(2, 9)]:
        tokens = make_tokens(*shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        with torch.no_grad():
            wanted = model(tokens).log_softmax(-1)
        torch.testing.assert_close(torch.tensor(found).log_softmax(-1), wanted, atol=1e-4, rtol=1e-4)
