"""`experts_implementation="mixture_of_experts"` computes what the experts of a model compute, whatever their flags."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from mixture_of_experts.huggingface import experts_forward
from mixture_of_experts.ops import explain_call

from .test_block_conversion import MODELS, build_model, get_block

BACKEND = "mixture_of_experts"


def compute_results(model: nn.Module, implementation: str, tokens: Tensor) -> dict[str, Tensor]:
    """Logits and all gradients."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(tokens).logits
    logits.logsumexp(-1).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_of_models(name, training):
    model, tokens = build_model(name).train(training), torch.randint(3, 64, (2, 11))
    assert_same(compute_results(model, BACKEND, tokens), compute_results(model, "eager", tokens))


@pytest.mark.parametrize("name", MODELS)
def test_fast_implementation_is_selected(name):
    """Fused weights, in any strides and with GPT-OSS's clamped gating."""
    model = build_model(name)
    model.set_experts_implementation(BACKEND)
    assert explain_call(get_block(model).train(), torch.randn(2, 9, 32)).implementation == "cpu"


def test_a_model_is_loaded_with_it_and_generates(tmp_path):
    model, tokens = build_model("Mixtral"), torch.randint(3, 64, (2, 5))
    model.save_pretrained(tmp_path)
    settings = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(tokens, **settings)
    ours = transformers.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation=BACKEND)
    assert ours.config._experts_implementation == BACKEND
    assert torch.equal(ours.generate(tokens, **settings), expected)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()


# Flags


E, DIM, HIDDEN = 5, 12, 8
KNOWN_FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}


def experts_class(own_gate: bool, **flags: bool) -> type[nn.Module]:
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = E, nn.Tanh()
            width = 2 * HIDDEN if flags["has_gate"] else HIDDEN
            shapes = {"gate_up_proj" if flags["has_gate"] else "up_proj": (DIM, width), "down_proj": (HIDDEN, DIM)}
            for name, (rows, columns) in shapes.items():
                shape = (rows, columns) if flags["is_transposed"] else (columns, rows)
                self.register_parameter(name, nn.Parameter(torch.randn(E, *shape) * 0.3))
                if flags["has_bias"]:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, columns)))
            if flags["has_post_expert_norm"]:
                self.post_expert_norm = nn.RMSNorm(DIM)
                nn.init.normal_(self.post_expert_norm.weight)

        if own_gate:

            def _apply_gate(self, gate_up: Tensor) -> Tensor:
                halves = gate_up.chunk(2, dim=-1)
                gate, up = halves if flags["is_concatenated"] else (gate_up[..., ::2], gate_up[..., 1::2])
                return F.silu(gate.clamp(max=0.5)) * (up - 1)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("the eager way")

    return use_experts_implementation(Experts, **flags)


def run_experts(
    experts: nn.Module, implementation: str, x: Tensor, expert: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Output and all gradients."""
    experts.config._experts_implementation = implementation
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = experts(x, expert, weight)
    leaves = {"x": x, "weight": weight, **dict(experts.named_parameters())}
    cotangent = torch.linspace(-1, 1, out.numel()).view_as(out)
    return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True))}


@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=5)), ids=str)
def test_every_flag_of_the_interface(flags, own_gate):
    """Against their own way, with ids beyond the experts, as expert parallelism makes them."""
    flags = dict(zip(sorted(KNOWN_FLAGS), flags, strict=True))
    if not flags["is_concatenated"] and not own_gate:
        flags["is_concatenated"] = True  # the default gating halves, whatever the flag says
    if not flags["has_gate"] and own_gate:
        return  # nothing asks for it
    experts = experts_class(own_gate, **flags)(SimpleNamespace(_experts_implementation=BACKEND))
    experts._is_expert_parallel = True
    x, expert = torch.randn(9, DIM), torch.stack([torch.randperm(E)[:2] for _ in range(9)])
    expert[3, 1] = expert[5, 0] = E
    weight = torch.where(expert < E, torch.rand(9, 2), 0.0)
    assert_same(
        *(run_experts(experts, implementation, x, expert, weight) for implementation in (BACKEND, "batched_mm"))
    )


def test_the_flags_are_those_that_are_known():
    """A flag that a later version adds would be ignored: this tells."""
    flags = set(inspect.signature(use_experts_implementation).parameters) - {"experts_class", "experts_interface"}
    assert flags == KNOWN_FLAGS
    assert ALL_EXPERTS_FUNCTIONS[BACKEND] is experts_forward


def test_dtypes():
    """Tokens are cast to the weights' dtype, results to the tokens'."""
    flags = dict.fromkeys(KNOWN_FLAGS, False) | {"has_gate": True, "is_concatenated": True}
    experts = experts_class(False, **flags)(SimpleNamespace(_experts_implementation=BACKEND)).bfloat16()
    out = experts(torch.randn(4, DIM), torch.randint(E, (4, 2)), torch.rand(4, 2))
    assert out.dtype == torch.float32
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"but got Parameter of dtype torch.float8_e4m3fn; load the model with another"):
        experts(torch.randn(4, DIM), torch.randint(E, (4, 2)), torch.rand(4, 2))


@pytest.mark.slow
def test_compile():
    torch.compiler.reset()
    model = build_model("GptOss").train()
    model.set_experts_implementation(BACKEND)
    block, x = get_block(model), torch.randn(2, 9, 32)
    out, _ = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, block(x)[0], atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("is_concatenated", [False, True])
def test_compile_a_gating_of_its_own(is_concatenated):
    """In one graph, with all gradients."""
    torch.compiler.reset()
    flags = dict.fromkeys(KNOWN_FLAGS, False) | {"has_gate": True, "is_concatenated": is_concatenated}
    experts = experts_class(True, **flags)(SimpleNamespace(_experts_implementation=BACKEND))
    x, expert, weight = torch.randn(9, DIM), torch.randint(E, (9, 2)), torch.rand(9, 2)
    expected = run_experts(experts, BACKEND, x, expert, weight)
    experts.compile(fullgraph=True, backend="aot_eager")
    assert_same(run_experts(experts, BACKEND, x, expert, weight), expected)
    torch.compiler.reset()
