"""Applies PEFT's LoRA adapters to stacked experts within the experts' forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from mixture_of_experts.experts import StackedExperts
from mixture_of_experts.huggingface.private_peft import find_missed_targets
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.support.checks import ModelT, check_model
from mixture_of_experts.support.private_torch import get_original_class


def fast_lora(model: ModelT) -> ModelT:
    """Apply LoRA factors directly to the inputs of stacked expert weights, instead of materializing
    `W + scaling B A`.

    By default, PEFT wraps each stacked weight in `target_parameters` and recomputes the adapted weights of all experts
    in every forward pass. After `fast_lora`, `Experts` and `GatedExperts` multiply each expert's rows by its low-rank
    factors instead. Outputs and gradients match PEFT's up to rounding, and no gradient is computed for frozen stacked
    weights. PEFT still manages the parameters and their names, and it still saves, loads, merges and selects adapters.

    PEFT's own computation is used for weights that are trained along with their adapters, for biases, for slots without
    assignments, and for all modules other than this package's stacked experts. If you later add adapters to other
    weights, call `fast_lora` again.

    Args:
        model: a model returned by `get_peft_model` or `inject_adapter_in_model`. The model is modified in place and may
            be on any device, including meta. Call `fast_lora` before wrapping the model in `torch.compile`, DDP or
            FSDP2.

    Returns:
        The model.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module.
        ValueError: none of this package's stacked expert weights has an adapter, or PEFT skipped some of the
            `target_parameters`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> from mixture_of_experts import GatedExperts, MoE
        >>> moe = MoE(dim=16, num_experts=4, experts=GatedExperts(16, 4))
        >>> lora = LoraConfig(r=2, target_parameters=["experts.w1", "experts.w3", "experts.w2"])
        >>> moe = fast_lora(inject_adapter_in_model(lora, moe))
        >>> moe(torch.randn(2, 10, 16))[0].shape
        torch.Size([2, 10, 16])
    """
    check_model("model", model)
    try:
        from peft.tuners.lora import layer
    except ImportError as error:
        raise ImportError("LoRA on stacked experts requires PEFT: pip install 'peft>=0.21'") from error
    from mixture_of_experts.huggingface.lora.wrapper import NETWORK_TENSOR_NAMES, ParamWrapper

    found, unsupported = [], []
    for module in model.modules():
        if not isinstance(module, layer.ParamWrapper):
            continue
        experts, weight = module.get_base_layer(), module.parameter_name
        ours = get_original_class(experts).forward in (StackedExperts.forward, QuantizedExperts.forward)
        if ours and weight in NETWORK_TENSOR_NAMES and type(module) in (layer.ParamWrapper, ParamWrapper):
            found.append(module)
        else:
            unsupported.append(f"{weight} of {type(experts).__name__} in a {type(module).__name__}")
    if missing := find_missed_targets(model):
        raise ValueError(
            f"{type(model).__name__} has no adapters for {', '.join(missing)} in target_parameters, because PEFT "
            "skipped them. If the experts are quantized, let PEFT prepare the model within weights_shown(model). "
            "Otherwise, check the names"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has LoRA on {', '.join(dict.fromkeys(unsupported)) or 'no stack'}, but fast_lora "
            f"supports only {', '.join(NETWORK_TENSOR_NAMES)} of Experts and GatedExperts that do not override "
            "forward. Let PEFT adapt other experts with target_parameters in LoraConfig, such as ['experts.w1', "
            "'experts.w3', 'experts.w2']. Experts that are sharded across ranks cannot have adapters. If the model "
            "uses its own experts from transformers, convert it with from_transformers() before adding adapters"
        )
    for module in found:
        module.__class__ = ParamWrapper
    return model


@contextmanager
def weights_shown(model: nn.Module) -> Iterator[None]:
    """Context manager that makes the weights of `QuantizedExperts` visible to PEFT, so that PEFT can add or load LoRA
    adapters.

    PEFT adapts parameters, but quantized weights are not parameters. Inside this context, quantized weights appear as
    placeholders named "w1", "w3" and "w2". The placeholders have the weights' shapes, but contain no data and use no
    memory. Call `fast_lora` afterwards, because adapters on quantized experts require it. Without this context, PEFT
    skips these weights, and a `transformers` model then raises an error in its first forward pass.

    Args:
        model: a model with `QuantizedExperts`. The model may already have PEFT adapters.

    Raises:
        ValueError: the model has no `QuantizedExperts`.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> from mixture_of_experts import MoE
        >>> from mixture_of_experts.quantize import quantize_experts
        >>> moe = MoE(dim=16, num_experts=4)
        >>> moe.experts.requires_grad_(False)  # doctest: +ELLIPSIS
        Experts(...
        >>> _ = quantize_experts(moe)
        >>> with weights_shown(moe):
        ...     moe = inject_adapter_in_model(LoraConfig(r=2, target_parameters=["experts.w1", "experts.w2"]), moe)
        >>> type(fast_lora(moe).experts.get_base_layer()).__name__
        'QuantizedExperts'
    """
    found = [module for module in check_model("model", model).modules() if isinstance(module, QuantizedExperts)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no QuantizedExperts; PEFT finds the weights of other experts without "
            "weights_shown"
        )
    with ExitStack() as stack:
        for experts in found:
            for name in ("w1", "w3", "w2"):
                # skip weights that an outer context has already registered
                if hasattr(experts, f"{name}_packed") and not hasattr(experts, name):
                    experts.register_parameter(
                        name, nn.Parameter(experts.placeholder_weight(name), requires_grad=False)
                    )
                    stack.callback(experts._parameters.pop, name, None)
        yield
