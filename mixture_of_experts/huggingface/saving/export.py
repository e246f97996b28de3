"""Exports a model with experts as the model of `transformers` that computes the same.

`plan_export` decides everything without reading weights, so the model may also be one whose weights are in files.
Weights are then converted layer by layer.

Axes: e experts, d model dim, h hidden dim.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from mixture_of_experts.experts import GatedExperts
from mixture_of_experts.gating import TopKGating
from mixture_of_experts.gating.steps import named
from mixture_of_experts.huggingface.blocks.convert import closes_groups
from mixture_of_experts.huggingface.feed_forward import MoEFeedForward, SparseFeedForward
from mixture_of_experts.huggingface.replacement.adapters import read_activation, refuse_meta, refuse_wrapped
from mixture_of_experts.huggingface.router_config import ANNOUNCED
from mixture_of_experts.huggingface.saving.configuration import KEY
from mixture_of_experts.recipes import SharedExpert
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import from_peft


class Target(NamedTuple):
    """A family of `transformers` with experts, and what it can hold."""

    prefix: str  # prefix of its classes
    sources: tuple[str, ...]  # prefixes of the dense families that differ only in experts
    all_layers: bool = False  # whether every layer has experts
    always_normalised: bool = False
    shared: bool = False
    sliding: bool = False  # whether it has the sliding attention of its sources
    hidden: str = "moe_intermediate_size"
    settings: tuple[tuple[str, Any], ...] = ()  # further settings of its configuration


TARGETS = (
    Target(
        "Mixtral",
        ("Llama", "Mistral"),
        all_layers=True,
        always_normalised=True,
        sliding=True,
        hidden="intermediate_size",
    ),
    Target("Qwen3Moe", ("Qwen3",)),
    Target("Qwen2Moe", ("Qwen2",), shared=True, settings=(("qkv_bias", True),)),
    Target("Qwen2Moe", ("Llama", "Mistral"), shared=True, settings=(("qkv_bias", False),)),
)

# settings of configurations that no computation depends on, or that are decided here
NOT_COMPARED = {"model_type", "architectures", "transformers_version", "pretraining_tp", "_name_or_path", KEY}
NOT_COMPARED |= {
    *ANNOUNCED,
    "quantization_config",
    "mlp_bias",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}


@dataclass(frozen=True)
class Export:
    """The class and configuration of an exported model, and how its weights are made."""

    config: PreTrainedConfig
    model_class: Any
    layers: dict[
        str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    ]  # by path: weights below it to weights below it


def export(model: nn.Module) -> Any:
    """Return the same model in a class of `transformers` with experts, so that it runs without this package.

    Llama and Mistral become Mixtral. They become Qwen2-MoE if only some layers have experts, if there is a shared
    expert, or if weights are not normalised. Qwen2 becomes Qwen2-MoE, Qwen3 becomes Qwen3-MoE. Settings for training
    alone (coefficients of losses, jitter, `capacity_factor_train`) are left out. What a configuration holds beside the
    settings of its class is carried over.

    Args:
        model: a model of `transformers` that `replace_ffn` or `upcycle` changed. It is not modified.

    Returns:
        A model with copies of the weights and the same dtype, device and mode. Its logits are equal up to rounding.

    Raises:
        ValueError: the model has something that no such class has; the error says what. Or it is a wrapper, or its
            weights are not in memory.

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
    refuse_meta(model, type(model).__name__)
    exported = {name: value for name, value in state.items() if not any(below(path, name) for path in plan.layers)}
    for path, convert in plan.layers.items():
        weights = {name.removeprefix(f"{path}."): value for name, value in state.items() if below(path, name)}
        exported |= {f"{path}.{name}": value for name, value in convert(weights).items()}
    exported = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in exported.items()}
    made, info = plan.model_class.from_pretrained(
        None, config=plan.config, state_dict=exported, dtype=next(iter(state.values())).dtype, output_loading_info=True
    )
    tied = set(getattr(made, "all_tied_weights_keys", None) or {})
    differ = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]} - tied)
    if differ:
        raise ValueError(f"{type(model).__name__} has weights that {type(made).__name__} has not, or not so: {differ}")
    vars(made).pop("_weight_conversions", None)  # it is saved under the names of its class's checkpoints
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(next(model.parameters()).device).train(model.training)


def below(path: str, name: str) -> bool:
    return name.startswith(f"{path}.")


def plan_export(model: Any) -> Export:
    """Find the class for a model; ValueError if it lacks something that the model has. No weight is read."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEFeedForward)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers with experts: there is nothing to export")
    if any(isinstance(layer, SparseFeedForward) for layer in layers.values()):
        raise ValueError(
            f"{type(model).__name__} has layers that were blocks: to_transformers makes a stock model of it"
        )
    if any(map(from_peft, model.modules())):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT, which no class has: merge_and_unload() them first"
        )
    refuse_wrapped(model)
    family, head = split_name(type(model).__name__)
    fits = [target for target in TARGETS if family in target.sources]
    if not fits:
        known = ", ".join(sorted({source for target in TARGETS for source in target.sources}))
        raise ValueError(
            f"no class of transformers is a {type(model).__name__} with experts; there are classes for {known}"
        )
    problems = {target: list(dict.fromkeys(find_problems(model, target, layers))) for target in fits}
    target = next((target for target in fits if not problems[target]), None)
    model_class = None if target is None else getattr(transformers, f"{target.prefix}{head}", None)
    if target is not None and model_class is None:
        raise ValueError(f"transformers has no class {target.prefix}{head}")
    if target is None:
        said = "; ".join(f"{target.prefix}: {', '.join(problems[target])}" for target in fits)
        raise ValueError(f"{type(model).__name__} has what has no counterpart in {said}")
    return Export(
        target_config(model, target, layers), model_class, {n: converter(m, target) for n, m in layers.items()}
    )


def split_name(name: str) -> tuple[str, str]:
    """`LlamaForCausalLM` to `("Llama", "ForCausalLM")`."""
    found = re.fullmatch(r"(\w+?)(Model|For\w+)", name)
    return (name, "") if found is None else (found[1], found[2])


def find_problems(model: Any, target: Target, layers: dict[str, Any]) -> Any:
    """What the model has and the target has not, in words; equal layers give the same words."""
    config = model.config
    dense = [i for i in range(config.num_hidden_layers) if i not in map(layer_number, layers)]
    if target.all_layers and dense:
        yield f"layers without experts ({', '.join(map(str, dense))})"
    act = repr(read_activation(ACT2FN[config.hidden_act]))
    kinds = set()
    for layer in layers.values():
        moe = layer.moe
        gate, experts, shared = moe.gate, moe.experts, moe.shared_expert
        yield from gate_problems(gate, target)
        if type(experts) is not GatedExperts:
            yield f"experts that are {type(experts).__name__}"
            continue
        if experts.b1 is not None:
            yield "biases of experts"
        if repr(experts.act) != act:
            yield f"the activation {experts.act} of experts"
        if moe.group_size is not None and not dropless(gate):
            yield f"group_size={moe.group_size}"
        if shared is not None and not (target.shared and type(shared) is SharedExpert):
            yield "a shared expert"
        width = getattr(shared, "hidden_dim", None)
        settings = {"num_experts": moe.num_experts, "hidden_dim": experts.hidden_dim, "shared_expert": width}
        settings |= {"k": getattr(gate, "k", None), "normalize": bool(getattr(gate, "normalize", None))}
        kinds.add(tuple(settings.items()))
    for column in zip(*kinds, strict=True):
        name, values = column[0][0], {value for _, value in column}
        if len(values) > 1:
            yield f"layers that differ ({name}: {', '.join(sorted(map(str, values)))})"
    if getattr(config, "mlp_bias", False) and dense:
        yield "mlp_bias in layers without experts"
    kept, defaults = carried(config, target), type(config)().to_dict()
    slides = target.sliding and "sliding_window" in defaults
    if not slides and (getattr(config, "sliding_window", None) or "sliding" in str(getattr(config, "layer_types", ""))):
        yield "sliding attention"
    for name, default in defaults.items():  # a name that the dense class does not know is a note
        if name not in kept and name not in NOT_COMPARED and getattr(config, name) != default:
            yield f"{name}={getattr(config, name)!r} of the configuration"


def gate_problems(gate: Any, target: Target) -> Any:
    if type(gate) is not TopKGating:
        yield f"a {type(gate).__name__}"
        return
    allowed = {
        "score": ("softmax",),
        "select": ("score", "logits"),  # a softmax keeps the order
        "weigh": ("score", "softmax") if gate.normalize is True else ("score",),
        "normalize": (True, False),
        "logits": (None,),
    }
    for name, values in allowed.items():
        if (value := getattr(gate, name)) not in values:
            yield f"{name}={named(value)}"
    if gate.normalize is True and gate.eps > 1e-9:
        yield f"eps={gate.eps}"
    if target.always_normalised and not gate.normalize:
        yield "weights that are not normalised"
    if gate.b_gating is not None:
        yield "a bias of the router"
    if gate.expert_bias is not None:
        yield "an expert bias"
    if closes_groups(gate):
        yield f"num_groups={gate.num_groups}"
    if not dropless(gate):
        yield f"capacity_factor_eval={gate.capacity_factor_eval}, which drops tokens"


def dropless(gate: Any) -> bool:
    return getattr(gate, "capacity_factor_eval", 0.0) is None


def layer_number(path: str) -> int:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return -1 if found is None else int(found[1])


def carried(config: Any, target: Target) -> dict[str, Any]:
    """The settings of a dense configuration that the target's configuration has too, and the notes in it: what neither
    class knows."""
    own, theirs = (kind().to_dict().keys() for kind in (type(config), target_class(target)))
    settings = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPARED}
    return {n: value for n, value in settings.items() if n == "head_dim" or (n in own) == (n in theirs)}


def target_class(target: Target) -> Any:
    return getattr(transformers, f"{target.prefix}Config")


def target_config(model: Any, target: Target, layers: dict[str, Any]) -> PreTrainedConfig:
    moe = next(iter(layers.values())).moe
    settings = carried(model.config, target)
    settings |= dict(target.settings) | {target.hidden: moe.experts.hidden_dim}
    settings |= {"num_experts_per_tok": moe.gate.k, "num_experts": moe.num_experts}
    if not target.always_normalised:
        settings["norm_topk_prob"] = bool(moe.gate.normalize)
    if not target.all_layers:
        sparse = set(map(layer_number, layers))
        settings["mlp_only_layers"] = [i for i in range(model.config.num_hidden_layers) if i not in sparse]
        settings |= {"decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None}
    if target.shared:  # without a shared expert it is one without effect
        settings["shared_expert_intermediate_size"] = 1 if moe.shared_expert is None else moe.shared_expert.hidden_dim
    config = target_class(target)(**settings)
    config.dtype = model.config.dtype
    return config


def converter(layer: Any, target: Target) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from the weights of a layer with experts, by name, to those of a sparse block."""
    scale, d = layer.moe.gate.scale, layer.moe.dim

    def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        w1, w2, w3 = (weights[f"moe.experts.{name}"] for name in ("w1", "w2", "w3"))  # (e, d, h), (e, h, d), (e, d, h)
        block = {
            "gate.weight": weights["moe.gate.w_gating"].T,
            "experts.gate_up_proj": torch.cat([w1, w3], dim=-1).mT,
            "experts.down_proj": (w2 * scale if scale != 1 else w2).mT,
        }
        if target.shared:
            empty = {"gate_proj": w1.new_zeros(1, d), "up_proj": w1.new_zeros(1, d), "down_proj": w1.new_zeros(d, 1)}
            for name, zeros in empty.items():
                value = weights.get(f"moe.shared_expert.{name}.weight", zeros)
                block[f"shared_expert.{name}.weight"] = 2 * value if name == "down_proj" else value
            block["shared_expert_gate.weight"] = w1.new_zeros(1, d)  # its sigmoid is 1/2
        return block

    return convert
