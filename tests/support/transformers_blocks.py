"""Every sparse block of the installed `transformers`, made small.

`python tests/support/transformers_blocks.py` prints for docs/published_mixtures.md what can be done with each block.

A block is a module that makes experts in its constructor, found in the text of every model's file: what a later version
adds is found too.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import inspect
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mixture_of_experts.huggingface import from_transformers, to_transformers
from mixture_of_experts.huggingface.blocks.convert import concatenate_pieces, read_block
from mixture_of_experts.stats import track_routing

MODELS = Path(transformers.__file__).parent / "models"
DIM, TOKENS = 16, (2, 7)

#: settings of configurations, where one has them: every block gets its groups, latent sizes, biases and shared experts
SMALL_SIZES: dict[str, Any] = dict(
    hidden_size=DIM, d_model=DIM, intermediate_size=12, moe_intermediate_size=12, d_ff=12, ffn_hidden_size=12,
    expert_ffn_hidden_size=12, moe_hidden_size=8, moe_latent_size=8, shared_expert_intermediate_size=20,
    shared_experts_intermediate_size=20, moe_shared_expert_intermediate_size=20, shared_intermediate_size=20,
    intermediate_size_mlp=20, dense_intermediate_size=20, router_hidden_size=10, num_experts=8, num_local_experts=8,
    n_routed_experts=8, moe_num_experts=8, zero_expert_num=3, num_experts_per_tok=3, top_k_experts=3, moe_topk=3,
    moe_top_k=3, n_shared_experts=2, num_shared_experts=2, moe_num_shared_experts=2, n_group=4, topk_group=2,
    topk_method="group_limited_greedy", routed_scaling_factor=2.5, route_scale=2.5, router_scaling_factor=2.5,
    moe_routed_scaling_factor=2.5, moe_router_scaling_factor=2.5, moe_router_logit_softcapping=2.0,
    output_multiplier=1.5, swiglu_limit=0.7, enable_moe_block=True, router_bias=True, mlp_bias=True,
    hidden_size_per_layer_input=0, expert_capacity=3, moe_jitter_eps=None, router_jitter_noise=0.0, dropout_rate=0.0,
    moe_token_dropout=0.0, num_hidden_layers=4, head_dim=8, num_attention_heads=2, num_key_value_heads=1, kv_channels=8,
    vocab_size=64,
)  # fmt: skip
#: what has to be given when the configuration is made, or to the block
EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "Dots3NoteVisionMoE": dict(
        hidden_size=DIM, num_attention_heads=2, adapter_in_dim=DIM, num_hidden_layers=2, moe_intermediate_size=12,
        pyramid_num_routed=[8, 8], num_experts_per_tok=3, router_scaling_factor=2.5,
    ),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": dict(shared_expert_intermediate_size=20),
    "Gemma4TextDecoderLayer": dict(num_kv_shared_layers=0, num_hidden_layers=2),
    "DeepseekV4SparseMoeBlock": dict(mlp_layer_types=["moe", "moe", "hash_moe", "moe"], num_hidden_layers=4),
}  # fmt: skip

#: what is not converted, and why
EXCLUDED_BLOCKS = {
    "JetMoeMoA": "experts of an attention layer, two calls with attention between them: no feed-forward network",
    "NllbMoeSparseMLP": (
        "transformers 5.24 reads the router's one-hot mask as ids of experts: it computes experts 0 and 1 alone, "
        "whatever was chosen"
    ),
}


class FoundBlock(NamedTuple):
    """A class of blocks."""

    family: str
    module: str
    name: str

    @property
    def kind(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.name)


def find_blocks() -> Iterator[FoundBlock]:
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text, family = file.read_text(encoding="utf-8"), file.parent.name
        if "Experts" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and creates_experts(node):
                    yield FoundBlock(family, f"transformers.models.{family}.{file.stem}", node.name)


def creates_experts(node: ast.ClassDef) -> bool:
    """Whether its constructor makes experts."""
    made = [
        ast.unparse(call.func)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        for call in ast.walk(method)
        if isinstance(call, ast.Call)
    ]
    return any(name.endswith("Experts") for name in made)


BLOCKS = {found.name: found for found in find_blocks()}


def list_configurations(found: FoundBlock) -> Iterator[type[PreTrainedConfig]]:
    """Of the annotation, else all of the family."""
    annotation = inspect.signature(found.kind.__init__).parameters["config"].annotation
    if isinstance(annotation, type) and issubclass(annotation, PreTrainedConfig):
        yield annotation
    yield from (kind for kind in typing.get_args(annotation) if isinstance(kind, type))
    module = importlib.import_module(f"transformers.models.{found.family}.configuration_{found.family}")
    for kind in list(vars(module).values()):
        if isinstance(kind, type) and issubclass(kind, PreTrainedConfig) and kind.__module__ == module.__name__:
            yield kind


def shrink_config(config: Any) -> Any:
    for name, value in SMALL_SIZES.items():
        with contextlib.suppress(Exception):  # some may not be set, or differ from layer to layer
            old = getattr(config, name)
            setattr(config, name, type(old)([value] * len(old)) if isinstance(old, list | tuple) else value)
    for part in ("ffn_config", "find_text_config"):
        if getattr(config, part, None) is not None:
            shrink_config(getattr(config, part))
    config._experts_implementation = "eager"
    return config


def make_block(name: str, layer_idx: int | None = None) -> nn.Module:
    """A small block of random weights, as large as trained ones, and biases that matter."""
    found, failures = BLOCKS[name], []
    for kind in list_configurations(found):
        try:
            config = shrink_config(kind(**EXTRA_ARGUMENTS.get(name, {})))
            if not hasattr(config, "num_experts_per_tok"):
                config = getattr(config, "find_text_config", config)
            parameters = inspect.signature(found.kind.__init__).parameters
            layer_idx = (0 if found.family == "zaya" else 1) if layer_idx is None else layer_idx
            given: dict[str, Any] = dict(layer_idx=layer_idx, intermediate_size=12, ffn_dim=12)
            block = found.kind(config, **{key: value for key, value in given.items() if key in parameters})
        except Exception as error:
            failures.append(f"{kind.__name__}: {error}")
            continue
        return randomize_weights(block)
    raise RuntimeError("; ".join(failures))


@torch.no_grad()
def randomize_weights(block: nn.Module) -> nn.Module:
    for path, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point():
            around = 1.0 if "norm" in path or "scale" in path else 0.0
            tensor.copy_(around + torch.randn_like(tensor) * (DIM**-0.5 if tensor.ndim > 1 else 0.2))
    return block


def run_block(block: Any, x: Tensor) -> Tensor:
    """What a `MoE` in its place returns for `(b, n, d)`."""
    if type(block).__name__.endswith("Layer") and hasattr(block, "router") and hasattr(block, "experts"):
        if not hasattr(block, "pre_feedforward_layernorm_2"):
            return block(x)
        flat = x.flatten(0, 1)  # what stands in the forward of a layer that holds router and experts itself
        _, weight, expert = block.router(flat)
        out = block.post_feedforward_layernorm_2(block.experts(block.pre_feedforward_layernorm_2(flat), expert, weight))
        return out.view_as(x)
    out = block(x)
    return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)


def find_unused_parameters(block: nn.Module) -> set[str]:
    """Keys of what is no part of the block: of the rest of a layer that holds router and experts itself, and weights,
    or rows of them, that no forward reads."""
    if hasattr(block, "self_attn"):
        mine = ("router.", "experts.", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")
        return {key for key in block.state_dict() if not key.startswith(mine)}
    if type(block).__name__ == "LongcatFlashMoE":
        return {"experts.gate_up_proj", "router.classifier.bias"}  # rows of the experts that return the token
    return set()


class BlockInModel(nn.Module):
    """A block alone, or what of a layer corresponds to one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return run_block(self.block, x)


# ---- the table ----


class Difference(NamedTuple):
    """The largest difference between a block and a layer of ours, relative to the largest number if that is above 1."""

    value: float
    where: str


def get_grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def compute_gradients(block: nn.Module) -> dict[str, Tensor]:
    """Those of a block's weights, by the names and in the layout of a layer of ours."""
    holder = copy.deepcopy(block)
    for weight, same in zip(block.parameters(), holder.parameters(), strict=True):
        same.data = get_grad(weight)
    return {name: concatenate_pieces(pieces) for name, pieces in read_block(holder).get_weight_views().items()}


def compare_block(block: nn.Module, moe: nn.Module) -> Difference:
    """Outputs, and the gradients of the input and of every weight."""
    x, cotangent = torch.randn(*TOKENS, DIM), torch.randn(*TOKENS, DIM)
    results: list[dict[str, Tensor]] = []
    for layer in (block, moe):
        torch.manual_seed(1)  # for what draws in training
        leaf = x.clone().requires_grad_()
        out = run_block(layer, leaf)
        out.backward(cotangent)
        assert leaf.grad is not None
        results.append({"output": out.detach(), "input": leaf.grad})
    theirs = compute_gradients(block)
    results[0] |= {name: theirs[name] for name, p in moe.named_parameters() if p.requires_grad}
    results[1] |= {name: get_grad(p) for name, p in moe.named_parameters() if p.requires_grad}
    worst = Difference(0.0, "")
    for name, theirs in results[0].items():
        gap = (results[1][name] - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
        worst = max(worst, Difference(gap.item(), name))
    return worst


def can_convert(name: str) -> None:
    for training in (False, True):
        torch.manual_seed(0)
        block = make_block(name).train(training)
        if name == "PhimoeSparseMoeBlock":  # in training it samples, but among experts that are equally good
            block.router.router_jitter_noise = 0.0 if training else 0.5
        gap = compare_block(block, from_transformers(block))
        assert gap.value < 1e-5, f"{gap.where} differs by {gap.value}"


def can_convert_back(name: str) -> None:
    """Bit for bit, into a block of other weights, buffers too."""
    block, other = make_block(name), make_block(name)
    to_transformers(from_transformers(block), other)
    state = block.state_dict()
    left = [key for key, value in other.state_dict().items() if not torch.equal(value, state[key])]
    assert set(left) <= find_unused_parameters(block), f"{left} did not come back"


def is_tracked(name: str) -> None:
    """Every measure is that of the layer of ours on the same tokens."""
    block, x = make_block(name).eval(), torch.randn(*TOKENS, DIM)
    moe = from_transformers(block, balance_over="group").eval()
    model = BlockInModel(block)
    with track_routing(model) as found, track_routing(moe) as expected:
        model(x)
        moe(x)
    (layer,) = found.layers
    theirs, ours = found.last(layer), expected.last("gate")
    load = ours.load[: len(theirs.load)]  # without shared experts that the router weighs
    assert torch.equal(theirs.load, load), f"load {theirs.load} instead of {load}"
    if len(load) < len(ours.load):
        return
    for measure in ("dropped", "unseen", "entropy", "confidence"):
        gap = abs(getattr(theirs, measure) - getattr(ours, measure))
        assert gap < 1e-4, f"{measure} differs by {gap}"


def has_backend(name: str) -> None:
    """The experts, computed by this package inside of the block."""
    block, x = make_block(name), torch.randn(*TOKENS, DIM)
    experts: Any = block.experts
    assert hasattr(experts, "has_gate"), "the experts have no such interface"
    expected = run_block(block, x)
    experts.config._experts_implementation = "mixture_of_experts"
    torch.testing.assert_close(run_block(block, x), expected, atol=1e-5, rtol=1e-5)


CHECKS = {
    "from_transformers": can_convert,
    "to_transformers": can_convert_back,
    "track_routing": is_tracked,
    "backend": has_backend,
}


def failure_reason(check: Callable[[str], None], name: str) -> str | None:
    try:
        check(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    return None


def format_table() -> str:
    """A row for each block with which something does not work, the totals, and why."""
    lines = ["| block | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    totals, notes = dict.fromkeys(CHECKS, 0), []
    for name in sorted(BLOCKS):
        cells = []
        for column, check in CHECKS.items():
            reason = failure_reason(check, name)
            cells.append("yes" if reason is None else "no")
            totals[column] += reason is None
            notes += [] if reason is None else [f"{name}, {column}: {reason}"]
        if "no" in cells:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(f"| of {len(BLOCKS)} | " + " | ".join(map(str, totals.values())) + " |")
    reasons = [f"{name}: {reason}" for name, reason in EXCLUDED_BLOCKS.items()]
    return "\n".join([*lines, "", *reasons, "", *notes])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(format_table())
