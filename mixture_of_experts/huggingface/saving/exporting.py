"""Exports a model with `MoE` layers as an equivalent stock `transformers` model.

`plan_export` makes all decisions without reading weights, so it also supports models whose weights are stored in files.
The weights are then converted layer by layer: each layer is adapted to the form of a sparse block, and its weights are
copied into that block.

Axes: e (experts), d (model dimension), h (hidden dimension).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from mixture_of_experts.gating import TopKGating
from mixture_of_experts.huggingface.blocks.convert import check_plain_weights, find_differences
from mixture_of_experts.huggingface.blocks.model_conversion import copy_to_block_state
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, SparseFeedForward, find_layers
from mixture_of_experts.huggingface.private_transformers import clear_weight_conversions
from mixture_of_experts.huggingface.replacement.dense_ffn import check_not_on_meta, check_not_wrapped
from mixture_of_experts.huggingface.replacement.replace import parse_block_number
from mixture_of_experts.huggingface.router_config import ROUTER_KEYS
from mixture_of_experts.huggingface.saving.configuration import LAYERS_KEY
from mixture_of_experts.huggingface.saving.engine_folders import save_for_engines
from mixture_of_experts.moe import MoE
from mixture_of_experts.recipes import SharedExpert
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.wrappers import GatedSharedExpert

LayersByPath = Mapping[str, MoEFeedForward]


class ExportTarget(NamedTuple):
    """A family of `transformers` MoE models, and the features that it supports."""

    prefix: str  # prefix of the family's class names
    # prefixes of the dense families that differ from this family only in the experts
    dense_prefixes: tuple[str, ...]
    needs_all_layers: bool = False  # whether every layer must have experts
    has_shared_expert: bool = False  # whether every layer has a shared expert
    has_sliding_window: bool = False  # whether the family supports the sliding-window attention of the dense families
    hidden_dim_key: str = "moe_intermediate_size"
    settings: tuple[tuple[str, Any], ...] = ()  # additional settings of the family's configuration


EXPORT_TARGETS = (
    ExportTarget(
        "Mixtral",
        ("Llama", "Mistral"),
        needs_all_layers=True,
        has_sliding_window=True,
        hidden_dim_key="intermediate_size",
    ),
    ExportTarget("Qwen3Moe", ("Qwen3",)),
    ExportTarget(
        "Qwen2Moe",
        ("Qwen2", "Llama", "Mistral"),
        has_shared_expert=True,
        # engines expect every Qwen2-MoE model to have biases and an untied head
        settings=(("qkv_bias", True), ("tie_word_embeddings", False)),
    ),
)

# hidden dimension of the all-zero shared expert that is added to layers without one; llama.cpp quantizes weights in
# blocks of 32
NO_SHARED_EXPERT_DIM = 32

# biases that are exported as zeros if the dense model does not have them
OPTIONAL_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")

# settings that do not affect the computation or are handled here
IGNORED_SETTINGS = {
    "model_type",
    "architectures",
    "transformers_version",
    "pretraining_tp",
    "_name_or_path",
    "auto_map",  # it refers to code for the dense model
    LAYERS_KEY,
}
IGNORED_SETTINGS |= {
    *ROUTER_KEYS,
    "quantization_config",
    "mlp_bias",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}


class ExportPlan(NamedTuple):
    """A plan for exporting a model. It contains the exported model on the meta device, and the layers to convert to
    sparse blocks, keyed by path."""

    stock_model: Any
    layers: LayersByPath
    target: ExportTarget

    def convert_layer(self, path: str) -> dict[str, Tensor]:
        """Convert the layer at `path`, and return the block's weights, keyed by their names in the exported model."""
        like = adapt_to_block(self.layers[path].moe, self.target.has_shared_expert)
        return copy_to_block_state(like, self.stock_model, path)

    def convert_rest(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all other weights of the exported model, given the original model's state dict. No two of the returned
        weights share memory. A tied head is included only if the exported model's head is untied."""
        changed, tied = tuple(f"{path}." for path in self.layers), self.stock_model.all_tied_weights_keys
        rest, seen = {}, set()
        for name, like in self.stock_model.state_dict().items():
            if name.startswith(changed) or name in tied:
                continue
            if name not in state and name.endswith(OPTIONAL_BIASES):
                weight = state[name.removesuffix("bias") + "weight"]
                rest[name] = weight.new_zeros(like.shape)
            else:
                rest[name] = state[name].clone() if state[name].data_ptr() in seen else state[name]
            seen.add(rest[name].data_ptr())
        return rest


def export(model: nn.Module) -> Any:
    """Export a model as an equivalent stock `transformers` model, which runs without this package.

    Llama and Mistral models are exported as Mixtral. If only some of their layers have experts, if they have a shared
    expert, or if their router weights are not normalized, they are exported as Qwen2-MoE instead. Qwen2 is exported as
    Qwen2-MoE, and Qwen3 as Qwen3-MoE. Settings that affect only training (loss coefficients, jitter,
    `capacity_factor_train`) are dropped. Configuration entries that the configuration's class does not define are
    preserved.

    Args:
        model: a `transformers` model modified by `replace_ffn` or `upcycle`. The model is not modified.

    Returns:
        A stock model with copies of the weights and the same dtype, device and mode as `model`. The stock model's
        logits are equal to those of `model` up to rounding.

    Raises:
        ValueError: the model is a wrapper, has weights that are not in memory, or has a property that none of these
            classes supports. If a property is not supported, the error message describes it.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mixture_of_experts.huggingface import export, upcycle
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> names = upcycle(model, num_experts=4)
        >>> tokens, exported = torch.randint(64, (2, 10)), export(model)
        >>> type(exported).__name__
        'MixtralForCausalLM'
        >>> torch.testing.assert_close(exported(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    """
    plan, state = plan_export(check_model("model", model)), model.state_dict()
    check_not_on_meta(model, type(model).__name__)
    untie_weights(plan.stock_model, model)
    exported = plan.convert_rest(state)
    for path in plan.layers:
        exported |= plan.convert_layer(path)
    exported = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in exported.items()}
    dtype = next(iter(state.values())).dtype
    made = type(plan.stock_model).from_pretrained(
        None, config=plan.stock_model.config, state_dict=exported, dtype=dtype
    )
    clear_weight_conversions(made)
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    config: Any = model.config
    save_for_engines(made, config.name_or_path)
    return made.to(next(model.parameters()).device).train(model.training)


def plan_export(model: Any) -> ExportPlan:
    """Plan the export of a model to a stock class, without reading weights. Raise ValueError if no class supports all
    properties of the model."""
    name = type(model).__name__
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"{name} has no layers with experts, so there is nothing to export")
    if any(isinstance(layer, SparseFeedForward) for layer in layers.values()):
        raise ValueError(
            f"{name} has layers created by from_transformers; use to_transformers to convert it to a stock model"
        )
    check_plain_weights(model, name)
    check_not_wrapped(model)
    found = re.fullmatch(r"(\w+?)(Model|For\w+)", name)  # matches names such as LlamaForCausalLM
    family, head = (name, "") if found is None else found.groups()
    candidates = [target for target in EXPORT_TARGETS if family in target.dense_prefixes]
    if not candidates:
        known = ", ".join(sorted({source for target in EXPORT_TARGETS for source in target.dense_prefixes}))
        raise ValueError(f"transformers has no mixture-of-experts class for {name}; supported models: {known}")
    reasons = []
    for target in candidates:
        stock = make_target_model(model, target, head, layers)
        problems = dict.fromkeys(find_incompatibilities(model, target, layers, stock))
        if not problems:
            return ExportPlan(stock, layers, target)
        reasons.append(f"{target.prefix}: {', '.join(problems)}")
    raise ValueError(f"no transformers class supports all properties of {name}. Unsupported: {'; '.join(reasons)}")


def untie_weights(stock: Any, model: Any) -> None:
    """Untie the stock model's weights that are not tied in `model`. `transformers` does not tie weights that differ in
    the files, whatever the configuration specifies."""
    tied, state = stock.all_tied_weights_keys, model.state_dict(keep_vars=True)
    stock.all_tied_weights_keys = {name: other for name, other in tied.items() if state[name] is state[other]}
    if tied and not stock.all_tied_weights_keys:
        for config in (stock.config, stock.config.get_text_config()):  # engines do not compare the weights
            config.tie_word_embeddings = False


def find_incompatibilities(model: Any, target: ExportTarget, layers: LayersByPath, stock: Any) -> Iterator[str]:
    """Yield descriptions of the model's properties that the target does not support. Layers with the same properties
    yield the same descriptions."""
    config = model.config
    if stock.base_model_prefix != model.base_model_prefix:
        yield f"weights with the prefix {model.base_model_prefix!r} (its prefix is {stock.base_model_prefix!r})"
        return
    dense = [i for i in range(config.num_hidden_layers) if i not in map(parse_block_number, layers)]
    if target.needs_all_layers and dense:
        yield f"layers without experts ({', '.join(map(str, dense))})"
    for path, layer in layers.items():
        yield from find_differences(adapt_to_block(layer.moe, target.has_shared_expert), stock.get_submodule(path))
    kept, defaults = select_carried_settings(config, target), type(config)().to_dict()
    slides = target.has_sliding_window and "sliding_window" in defaults
    if not slides and (getattr(config, "sliding_window", None) or "sliding" in str(getattr(config, "layer_types", ""))):
        yield "sliding attention"
    # skip additional settings, which the dense class does not define
    for name, default in defaults.items():
        if name not in kept and name not in IGNORED_SETTINGS and getattr(config, name) != default:
            yield f"{name}={getattr(config, name)!r} of the configuration"
    own, theirs, paths = model.state_dict().keys(), stock.state_dict().keys(), tuple(f"{path}." for path in layers)
    differ = own ^ theirs - {name for name in theirs - own if name.endswith(OPTIONAL_BIASES)}
    if differ := sorted(name for name in differ if not name.startswith(paths)):
        yield f"weights that only one of the two models has, such as {differ[0]}"


def select_carried_settings(config: Any, target: ExportTarget) -> dict[str, Any]:
    """Return the settings of a dense configuration that can be copied to the target's configuration. These are the
    settings that both classes have, and entries that neither class defines."""
    own, theirs = (kind().to_dict().keys() for kind in (type(config), getattr(transformers, f"{target.prefix}Config")))
    settings = {name: value for name, value in config.to_dict().items() if name not in IGNORED_SETTINGS}
    return {n: value for n, value in settings.items() if n == "head_dim" or (n in own) == (n in theirs)}


def make_target_model(model: Any, target: ExportTarget, head: str, layers: LayersByPath) -> Any:
    """Build the target's model on the meta device. The dimensions are taken from the original model and its first `MoE`
    layer."""
    moe: Any = next(iter(layers.values())).moe
    settings = {
        **select_carried_settings(model.config, target),
        **dict(target.settings),
        target.hidden_dim_key: getattr(moe.experts, "hidden_dim", 1),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": getattr(moe.gate, "k", 1),
        "norm_topk_prob": bool(getattr(moe.gate, "normalize", True)),
    }
    if not target.needs_all_layers:
        sparse = set(map(parse_block_number, layers))
        settings["mlp_only_layers"] = [i for i in range(model.config.num_hidden_layers) if i not in sparse]
        settings |= {"decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None}
    if target.has_shared_expert:
        settings["shared_expert_intermediate_size"] = getattr(moe.shared_expert, "hidden_dim", NO_SHARED_EXPERT_DIM)
    config = getattr(transformers, f"{target.prefix}Config")(**settings)
    config.dtype = model.config.dtype
    model_class: Any = getattr(transformers, f"{target.prefix}{head}", None)
    if model_class is None:
        raise ValueError(f"transformers has no class {target.prefix}{head}")
    with torch.device("meta"):
        return model_class(config)


@torch.no_grad()
def adapt_to_block(moe: Any, shared_expert: bool) -> MoE:
    """Return a layer that is equivalent to `moe` in eval mode and has the form of a sparse block. The layer shares its
    weights with `moe`. If `shared_expert` is True, the block has a gated shared expert."""
    like = copy.copy(moe)
    like._modules = dict(moe._modules)
    if type(moe.gate) is TopKGating:
        gate = like.gate = copy.copy(moe.gate)
        gate.capacity_factor_train, gate.eps = None, 1e-20 if gate.eps <= 1e-9 else gate.eps
        gate.min_expert_capacity = 4  # the default, because the value matters only during training
    if shared_expert and (moe.shared_expert is None or type(moe.shared_expert) is SharedExpert):
        w = next(moe.experts.parameters(), next(moe.parameters()))  # quantized experts have no parameters
        factory: dict[str, Any] = dict(device=w.device, dtype=w.dtype)
        shared, gate = copy.deepcopy(moe.shared_expert), nn.Linear(moe.dim, 1, bias=False, **factory)
        if shared is None:
            shared = SharedExpert(moe.dim, NO_SHARED_EXPERT_DIM, **factory)
            for weight in shared.parameters():
                weight.zero_()
        gate.weight.copy_(make_half_open_gate(gate.weight))
        shared.down_proj.weight.mul_(2)  # compensates for the shared expert's gate, whose sigmoid is 1/2
        like.shared_expert = GatedSharedExpert(shared, gate)
    return like


def make_half_open_gate(like: Tensor) -> Tensor:
    """Return a weight `(1, d)` with which the sigmoid of a shared expert's gate rounds to 1/2.

    The elements of the weight are tiny. The elements are nonzero because llama.cpp computes the sigmoid of z as
    `silu(z) / z`. The elements differ from each other, because the elements of an input may sum to zero.
    """
    limits = torch.finfo(like.dtype)
    return torch.linspace(1, 2, like.shape[-1]).mul(max(2.0**-60, limits.smallest_normal * limits.eps)).expand_as(like)
