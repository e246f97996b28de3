"""Converts stacked experts to plain linear layers and back.

Quantizers, adapters and optimizers look for `nn.Linear` modules or matrices, and silently skip tensors of shape
`(e, d, h)`.

Axes: e (experts), d (model dimension), h (hidden dimension), o (output dimension).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts.experts import ExpertList, RoutedExperts, StackedExperts
from mixture_of_experts.ops.activations import compute_hidden
from mixture_of_experts.support.checks import ModelT, check_model
from mixture_of_experts.support.private_torch import (
    get_wrapped_module,
    is_checkpoint_wrapper,
    move_hooks,
    replacement_problem,
)


class FeedForward(nn.Module):
    """A single expert made of linear layers.

    It computes `w2(act(w1(x)))`, or, if gated, `w2(act(w1(x)) * w3(x))` or `w2(act(w1(x), w3(x)))`. During training,
    elements of the input to `w2` are zeroed with probability `dropout`.

    Shape:
        The expert maps `(n, d)` to `(n, o)`.
    """

    w1: nn.Module
    w2: nn.Module
    w3: nn.Module | None
    act: nn.Module
    dropout: float

    def __init__(
        self, w1: nn.Module, w2: nn.Module, w3: nn.Module | None, act: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.w1, self.w2, self.w3, self.act, self.dropout = w1, w2, w3, act, dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = compute_hidden(self.act, [layer(x) for layer in (self.w1, self.w3) if layer is not None])
        return self.w2(F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden)


class UnstackedExperts(ExpertList):
    """Experts made of linear layers, created from stacked experts by `unstack`.

    Args:
        experts: one module per expert, in outer-major order for a grid of experts.
        template: the stacked experts without their weights, used by `restack`.
    """

    def __init__(self, experts: list[FeedForward], template: StackedExperts) -> None:
        super().__init__(experts, dim_out=template.dim_out)
        self.hidden_dim: int = template.hidden_dim
        # not registered as a submodule, because it has nothing to save, train or move
        self.__dict__["template"] = template


def unstack(model: ModelT) -> ModelT:
    """Replace all stacked experts in a model with plain linear layers in place, and return the model.

    The model produces the same results up to rounding, but processes one expert at a time. The linear layers contain
    copies of the weights, so create the optimizer after the conversion. The experts' forward and backward hooks are
    preserved. `restack` reverses the conversion.

    Args:
        model: a model that contains `MoE` layers.

    Raises:
        ValueError: if the model has no stacked experts or consists only of them, or if experts are compiled separately,
            have adapters, or have state-dict hooks.
        TypeError: if weights are not plain parameters (for example, because they are sharded across processes), or if
            experts have a custom `forward` or `compute` method, whether defined in their class or assigned to the
            module.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE
        >>> moe, x = MoE(dim=16, num_experts=4, second_policy_eval="all").eval(), torch.randn(1, 10, 16)
        >>> before = moe(x)[0]
        >>> unstack(moe).experts[0].w1
        Linear(in_features=16, out_features=64, bias=False)
        >>> torch.testing.assert_close(moe(x)[0], before)
        >>> restack(moe).experts
        Experts(
          16, 4, hidden_dim=64
          (act): GELU(approximate='none')
        )
    """
    return replace_modules(model, StackedExperts, unstack_experts, "stacked experts (Experts, GatedExperts)")


def restack(model: ModelT) -> ModelT:
    """Convert all experts created by `unstack` back to stacked experts in place, and return the model.

    Raises:
        ValueError: if the model has no experts created by `unstack` or consists only of them, or if experts are
            compiled separately or have state-dict hooks.
        TypeError: if a layer is not a plain `nn.Linear`, because it was quantized or has unmerged adapters.
    """
    return replace_modules(model, UnstackedExperts, restack_experts, "experts created by unstack()")


@torch.inference_mode(False)  # parameters created in inference mode cannot be trained
def replace_modules(
    model: ModelT,
    module_class: type[nn.Module],
    make: Callable[[Any, str], nn.Module],
    description: str,
    allow_adapters: bool = False,
) -> ModelT:
    """Replace every instance of `module_class` with `make(module, path)`. `allow_adapters` also permits modules inside
    `fast_lora` adapters.

    All replacements are created before the first module is replaced.
    """
    found = {}
    for name, module in check_model("model", model).named_modules():
        held = isinstance(get_wrapped_module(module), module_class) and not is_checkpoint_wrapper(module)
        if held and not (allow_adapters and getattr(module, "passes_factors", False)):
            raise ValueError(
                f"the experts in {name} cannot be replaced because the {type(module).__name__} depends on them. Merge "
                "adapters first, or call fast_lora() before quantize_experts(). Compile the experts last"
            )
        if isinstance(module, module_class):
            found[module] = name
    for module, name in found.items():
        check_exchangeable(module, module_class, name)
    made = {module: make(module, name) for module, name in found.items()}
    if not made:
        has = sorted({type(module).__name__ for module in model.modules() if isinstance(module, RoutedExperts)})
        raise ValueError(
            f"{type(model).__name__} has no {description}; it has {', '.join(has) or 'no experts at all'}. unstack() "
            "and quantize_experts() require stacked experts, restack() requires experts created by unstack(), and "
            "quantized experts cannot be converted back"
        )
    if model in made:
        raise ValueError(
            f"the model itself, a {type(model).__name__}, consists only of {description}; pass the layer or model that "
            "contains it"
        )
    for old, new in made.items():
        move_hooks(old, new)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                setattr(parent, name, made[child])
    return model


def check_exchangeable(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Raise an error if replacing a module would discard anything attached to its weights, or a custom `forward` or
    `compute` method, whether defined in its class or assigned to the module."""
    for method in ("forward", "compute"):
        if method in vars(module) or getattr(type(module), method) is not getattr(kind, method):
            raise TypeError(
                f"{name} is a {type(module).__name__} with a custom {method}, which would be lost; convert it manually"
            )
    if (lost := replacement_problem(module)) is not None:
        raise ValueError(f"{name} {lost}")


def get_plain_weights(experts: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the experts' stacked weights and biases after checking that they are plain parameters."""
    weights = dict(experts.named_parameters(recurse=False))
    for key, weight in weights.items():
        if type(weight) is not nn.Parameter:
            raise TypeError(
                f"{name}.{key} must be a plain nn.Parameter, got {type(weight).__name__}; unstack or quantize experts "
                "before sharding them"
            )
    return weights


@torch.no_grad()
def unstack_experts(stacked: StackedExperts, name: str = "") -> UnstackedExperts:
    stacks, last = get_plain_weights(stacked, name), len(stacked.expert_dims) - 1

    def parameter(key: str, i: int) -> nn.Parameter:
        matrix = stacks[key].flatten(0, last)[i]
        matrix = matrix.mT if key.startswith("w") else matrix
        return nn.Parameter(matrix.clone(memory_format=torch.contiguous_format), stacks[key].requires_grad)

    def layer(number: str, i: int) -> Any:
        weight, bias = f"w{number}", f"b{number}"
        if weight not in stacks:
            return None
        linear = nn.Linear(*stacks[weight].shape[-2:], bias=bias in stacks, device="meta")
        linear.weight = parameter(weight, i)
        if bias in stacks:
            linear.bias = parameter(bias, i)
        return linear

    template = copy.copy(stacked)
    template.__dict__["_parameters"] = dict.fromkeys(stacked._parameters)
    experts = [
        FeedForward(layer("1", i), layer("2", i), layer("3", i), stacked.act, stacked.dropout)
        for i in range(math.prod(stacked.expert_dims))
    ]
    return UnstackedExperts(experts, template).train(stacked.training)


@torch.no_grad()
def restack_experts(unstacked: UnstackedExperts, name: str) -> StackedExperts:
    template: StackedExperts = unstacked.__dict__["template"]
    stacked = copy.copy(template)
    stacked.__dict__["_parameters"] = dict(template._parameters)
    for key in template._parameters:
        layers: list[Any] = [getattr(expert, f"w{key[1]}") for expert in unstacked]
        for i, layer in enumerate(layers):
            if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
                what = type(layer).__name__ if type(layer) is not nn.Linear else type(layer.weight).__name__
                raise TypeError(
                    f"{name}.{i}.w{key[1]} must be a plain nn.Linear, got {what}; merge adapters first, or keep the "
                    "experts unstacked"
                )
        values = [layer.weight if key.startswith("w") else layer.bias for layer in layers]
        if values[0] is not None:
            stack = torch.stack([value.mT if key.startswith("w") else value for value in values])
            stack = stack.unflatten(0, stacked.expert_dims)
            stacked._parameters[key] = nn.Parameter(stack, any(value.requires_grad for value in values))
    return stacked.train(unstacked.training)
