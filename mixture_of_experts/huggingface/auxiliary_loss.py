"""Adds the auxiliary losses of a model's feed-forward networks to the loss that the model returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from mixture_of_experts.huggingface.feed_forward import feed_forwards
from mixture_of_experts.huggingface.padding import CheckpointWithMask, ModelWatch, last_calls
from mixture_of_experts.support.attached import TABLES
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.whole_model import call_stack


def aux_loss(model: nn.Module) -> Tensor:
    """The sum, 0-dim and differentiable, of the auxiliary losses of a model's last forward in this thread, in any mode.

    Inside a forward it is the sum so far. Add it to a loss that you compute yourself. If a training forward with
    gradients gets labels, `out.loss` holds it already.

    Args:
        model: a model that `replace_ffn` or `upcycle` changed, wrapped or not.

    Raises:
        RuntimeError: there was no forward.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from mixture_of_experts.huggingface import aux_loss, replace_ffn
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        >>> replace_ffn(model, num_experts=4)
        ['model.layers.0.mlp', 'model.layers.1.mlp']
        >>> logits = model(torch.randint(64, (2, 10))).logits
        >>> loss = logits.logsumexp(-1).mean() + aux_loss(model)
    """
    members = feed_forwards(check_model("model", model))
    call = call_stack.current(members[0]) if members else None
    calls = [call] if call is not None else [last.box[0] for last in last_calls(model)]
    losses = [loss for call in calls for loss in call.losses]
    if not losses:
        raise RuntimeError(
            f"{type(model).__name__} has no auxiliary loss: call it first, in this thread, and replace_ffn or upcycle "
            "before that"
        )
    return total_of(losses)


def total_of(losses: list[Tensor]) -> Tensor:
    """The sum of losses, on the device of the first one."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


def add_to_loss(model: nn.Module) -> None:
    """Set the hook that adds the losses on a model, once."""
    if any(isinstance(hook, AddAuxLoss) for hook in model._forward_hooks.values()):
        return
    announce(model)
    # it must run before the hook that ends the call
    model.register_forward_hook(AddAuxLoss(), with_kwargs=True, prepend=True)
    if not hasattr(model, "accepts_loss_kwargs") and not divides_by_batch(model):
        # The losses of T5 and BERT are means over a micro-batch. The Trainer would take them for a share of the batch's
        # mean: with A steps of accumulation the loss would be A times too large
        model.accepts_loss_kwargs = False  # pyright: ignore[reportArgumentType]


#: setting with the coefficient that the first layer had when it came, or the blocks that became layers. Relative to it,
#: or to 1 if there was none, `router_aux_loss_coef` is the factor of the loss, which a trainer may set: a file has both
AT_FIRST = "router_aux_loss_coef_at_first"
#: settings that `announce` adds to a configuration
ANNOUNCED = ("output_router_logits", "router_aux_loss_coef", AT_FIRST, "num_experts", "num_experts_per_tok")


def announce(model: nn.Module) -> None:
    """Make the trainers of TRL ask for the auxiliary loss, and give it to them as `out.aux_loss`.

    They compute losses from log-probabilities and ignore the model's own loss. They ask a model for the auxiliary loss
    if its configuration says that it has routers. They also ask the backbone for router logits; hooks remove that.
    """
    config, backbone = text_config(model), getattr(model, "base_model", model)
    if config is None or reports_routers(config) or backbone is model:
        return
    moe = feed_forwards(model)[0].moe
    values = (True, moe.loss_coef or 1.0, moe.loss_coef, moe.num_experts, getattr(moe.gate, "k", 1))
    for name, value in zip(ANNOUNCED, values, strict=True):
        if not hasattr(config, name):
            setattr(config, name, value)
    backbone.register_forward_pre_hook(take_away, with_kwargs=True)
    backbone.register_forward_hook(no_router_logits)


def remove_hooks(model: nn.Module) -> None:
    """Remove all hooks that layers with experts have in a model, and what `announce` added to its configuration."""
    own = (ModelWatch, AddAuxLoss)
    functions = (take_away, no_router_logits, without_router_logits)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", hook), own) or hook in functions:
                    for table in TABLES:
                        getattr(module, table).pop(key, None)
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, CheckpointWithMask):
            module._gradient_checkpointing_func = checkpoint.checkpoint  # pyright: ignore[reportArgumentType]
    if not divides_by_batch(model):
        vars(model).pop("accepts_loss_kwargs", None)
    if (config := text_config(model)) is not None and not reports_routers(config):
        plain = type(config)()
        for name in ANNOUNCED:
            if not hasattr(plain, name):
                vars(config).pop(name, None)
    elif config is not None and AT_FIRST in vars(config):
        if (first := vars(config).pop(AT_FIRST)) is None:
            del config.router_aux_loss_coef
        else:
            config.router_aux_loss_coef = first


def text_config(model: nn.Module) -> Any:
    """The part of a model's configuration in which routers are; None if it has no configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def reports_routers(config: Any) -> bool:
    """Whether models of this configuration have routers of their own."""
    return hasattr(type(config), "output_router_logits")


def take_away(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Forward pre-hook of a backbone: drops `output_router_logits`."""
    return args, {name: value for name, value in kwargs.items() if name != "output_router_logits"}


def no_router_logits(backbone: nn.Module, args: object, output: Any) -> None:
    """Forward hook of a backbone: its output has `router_logits`, None, as TRL reads it."""
    if isinstance(output, MutableMapping):
        output.router_logits = None  # pyright: ignore[reportAttributeAccessIssue]


def take_over(model: nn.Module) -> None:
    """Let the losses of a model's layers stand for its own, whose routers are gone."""
    config = text_config(model)
    if config is None or not reports_routers(config):
        return
    if unit_of(config) is None:
        setattr(config, AT_FIRST, getattr(config, "router_aux_loss_coef", None))
        config.router_aux_loss_coef = unit_of(config)
    if without_router_logits not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(without_router_logits, with_kwargs=True)


def unit_of(config: Any) -> float | None:
    """The `router_aux_loss_coef` that is a factor of 1; None if layers and the setting have nothing to do with each
    other."""
    return (getattr(config, AT_FIRST) or 1.0) if hasattr(config, AT_FIRST) else None


def without_router_logits(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a model: it must not read router logits, whatever its configuration says."""
    return args, {**kwargs, "output_router_logits": False}


def divides_by_batch(model: nn.Module) -> bool:
    """Whether a model computes its loss by the function that reads `num_items_in_batch`."""
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


class AddAuxLoss:
    """Forward hook of a model: adds the auxiliary loss to the loss that it returns in training. If the model is asked
    for router logits, its output gets the `aux_loss` too."""

    def __call__(self, model: nn.Module, args: object, kwargs: Mapping[str, Any], output: Any) -> Any:
        call = call_stack.current(model)
        if call is None or not call.losses:
            return None
        aux, config = total_of(call.losses), text_config(model)
        if call.asked and isinstance(output, MutableMapping):
            self.hand_up(aux, config, output)
        if not model.training or not torch.is_grad_enabled():
            return None
        loss = output.get("loss") if isinstance(output, MutableMapping) else output
        loss = loss[0] if isinstance(loss, tuple) else loss
        if not isinstance(loss, Tensor) or loss.ndim:
            return None
        call.added = True
        loss = loss + self.factor(config) * share_of_batch(model, kwargs) * aux.to(loss.device)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        if not isinstance(output, MutableMapping):
            return loss
        output["loss"] = loss
        return output

    def factor(self, config: Any) -> float:
        """The factor of the auxiliary loss: 1, or what follows from the `router_aux_loss_coef` that a trainer set."""
        unit = unit_of(config)
        return 1.0 if unit is None else (config.router_aux_loss_coef or 0.0) / unit

    def hand_up(self, aux: Tensor, config: Any, output: MutableMapping[str, Any]) -> None:
        """Set `output["aux_loss"]`, which a trainer multiplies by a coefficient. If the model's own routers have set
        it, add to it."""
        theirs = getattr(output, "aux_loss", None)
        if (unit := unit_of(config)) is not None:
            aux = aux / unit
        elif reports_routers(config) and isinstance(theirs, Tensor):
            coef = getattr(config, "router_aux_loss_coef", 0.0)
            aux = theirs + aux.to(theirs.device) / coef if coef else theirs
        output["aux_loss"] = aux


def share_of_batch(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | float:
    """The share of this forward in the batch, by number of labels; 1.0 if the number of the batch is not given.

    With gradient accumulation the `Trainer` gives each micro-batch the number of labels in the whole batch, and the
    model divides the sum of its losses by it. The auxiliary loss becomes a mean over micro-batches, weighted by labels.
    """
    whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if whole is None or labels is None:
        return 1.0
    if kwargs.get("shift_labels") is not None:
        labels = kwargs["shift_labels"]
    elif shifts_labels(model):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / whole


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i predicts label i + 1, by the rule of the `Trainer`."""
    config = getattr(model, "config", None)
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    return is_causal and not getattr(config, "is_encoder_decoder", False)
