"""Passes the padding mask and the token ids from a model's arguments to its feed-forward networks, and adds their
auxiliary losses to the model's loss.

A watch keeps a `ModelCall` active during each forward pass. Watches are attached to the modified model and to the
innermost models that contain its networks, such as an encoder and a decoder. Activation checkpointing runs layers again
after the forward pass, so the checkpointing function is wrapped to activate the original call again.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.huggingface.feed_forward import ModelCall, find_feed_forwards
from mixture_of_experts.huggingface.lora.loading import adds_to_quantized_weight, check_adapter_names
from mixture_of_experts.huggingface.model_arguments import ArgumentsReader
from mixture_of_experts.huggingface.private_peft import find_missed_targets, find_tensors_not_saved
from mixture_of_experts.huggingface.private_transformers import (
    get_checkpoint_function,
    predicts_next_token,
    set_checkpoint_function,
)
from mixture_of_experts.huggingface.replacement.torch_layers import TORCH_LAYER_CLASSES, LayerReader
from mixture_of_experts.huggingface.router_config import (
    find_text_config,
    get_aux_loss_factor,
    get_unit_aux_loss_coef,
    has_own_routers,
    requests_router_logits,
)
from mixture_of_experts.providers import TokenMetadata
from mixture_of_experts.quantize import QuantizedExperts
from mixture_of_experts.support.attachments import HOOK_TABLES
from mixture_of_experts.support.checks import check_model
from mixture_of_experts.support.private_torch import register_named_hooks, set_load_hook
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.aux_losses import sum_losses
from mixture_of_experts.whole_model.call_stack import ForwardWatch
from mixture_of_experts.whole_model.model_tokens import find_enclosing_model
from mixture_of_experts.whole_model.router_discovery import find_all_routers

MODEL_WATCH_HOOK = "mixture_of_experts"  # key under which the hooks are registered


def aux_loss(model: nn.Module) -> Tensor:
    """Return the sum of the auxiliary losses from a model's last forward pass in this thread, in training or eval mode.

    The result is a differentiable 0-dim tensor. During a forward pass, it contains the losses of the layers that have
    already run. If you compute the loss yourself, add this sum to it. If you pass labels during training with gradients
    enabled, `out.loss` already includes the sum.

    Args:
        model: a model modified by `replace_ffn` or `upcycle`. The model may be wrapped.

    Raises:
        RuntimeError: the model has not run a forward pass in this thread.

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
    members = find_feed_forwards(check_model("model", model))
    call = call_stack.current_call(members[0]) if members else None
    calls = [call] if call is not None else [last.box[0] for last in find_last_calls(model)]
    losses = [loss for call in calls for loss in call.losses]
    if not losses:
        raise RuntimeError(
            f"{type(model).__name__} has no auxiliary loss; apply replace_ffn or upcycle, and run a forward pass in "
            "this thread first"
        )
    return sum_losses(losses)


class LastCall(threading.local):
    """Stores the `ModelCall` of the last completed outermost forward pass, separately for each thread. Copies of a
    model start with an empty call."""

    box: list[ModelCall]

    def __init__(self) -> None:
        self.box = [ModelCall()]  # a list, because torch.compile cannot set an attribute here

    def __reduce__(self) -> Any:
        return LastCall, ()


def watch_model(model: nn.Module, names: Sequence[str]) -> None:
    """Attach watches to a model and to the innermost models that contain the named modules. The model's loss will
    include the auxiliary losses."""
    last = next(iter(find_last_calls(model)), None) or LastCall()
    readers = {find_padding_source(model, name) for name in names}
    for around in {model, *readers}:
        if get_watch(around) is None:
            watch = ModelWatch(around, last)
            register_named_hooks(around, MODEL_WATCH_HOOK, watch.begin, watch.end)
        get_watch(around).reads |= around in readers
    get_watch(model).adds = True
    set_load_hook(model, MODEL_WATCH_HOOK, check_adapter_names)


def remove_model_watches(model: nn.Module) -> None:
    for module in model.modules():
        for table in (*HOOK_TABLES, "_load_state_dict_pre_hooks"):
            getattr(module, table).pop(MODEL_WATCH_HOOK, None)
        if isinstance(checkpoint := get_checkpoint_function(module), CheckpointWithCall):
            set_checkpoint_function(module, checkpoint.checkpoint)


def get_watch(module: nn.Module) -> Any:
    """Return the watch on a module, or None if it has none."""
    return getattr(module._forward_pre_hooks.get(MODEL_WATCH_HOOK), "__self__", None)  # pyright: ignore[reportArgumentType]


def find_last_calls(model: nn.Module) -> list[LastCall]:
    """Return the `LastCall` of each modified model among `model` and its submodules."""
    watches = map(get_watch, model.modules())
    return list(dict.fromkeys(watch.last for watch in watches if watch is not None))


def uses_model_mask(model: nn.Module, name: str) -> bool:
    """Return whether the enclosing model's mask applies to the tokens of the module at `name`. The result is False for
    audio models."""
    return getattr(find_padding_source(model, name), "main_input_name", "input_ids") in ("input_ids", "inputs_embeds")


def find_padding_source(model: nn.Module, name: str) -> nn.Module:
    """Return the enclosing torch layer or model whose arguments describe the padding for the network at `name`."""
    path = name.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
    return above[-1] if isinstance(above[-1], TORCH_LAYER_CLASSES) else find_enclosing_model(above)


class ModelWatch(ForwardWatch):
    """Provides token metadata to a model's feed-forward networks in each forward pass, and collects their losses.
    Copying the model also copies the watch.

    Args:
        around: the watched module.
        last: the object that stores the call of the last outermost forward pass.
    """

    reads: bool = False  # False if the watch of a model inside this one reads the tokens
    adds: bool = False  # whether this watch adds the auxiliary losses to the model's loss
    warned: bool = False
    adapted: bool = False  # whether a forward pass with adapters has run

    def __init__(self, around: nn.Module, last: LastCall) -> None:
        self.reader: ArgumentsReader = (
            LayerReader(around) if isinstance(around, TORCH_LAYER_CLASSES) else ArgumentsReader(around)
        )
        self.last = last

    def make_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        members = find_feed_forwards(module)
        around = call_stack.current_call(members[0]) if members else None
        call = ModelCall(self.read_tokens(args, kwargs, around), around)
        call.keys, call.training = members, module.training and call.grad_enabled
        call.returns_logits = requests_router_logits(module, kwargs)
        if self.adds:
            call.replaced_arguments = args, self.replace_arguments(call, module, kwargs)
        if not torch.compiler.is_compiling():
            self.warn_once(call, module)
        if module.training and getattr(module, "is_activation_checkpointing", False):
            wrap_checkpointing(module)
        return call

    def read_tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], around: ModelCall | None) -> TokenMetadata:
        """Return the token metadata of a forward pass. If this module's arguments contain no token ids, use the
        enclosing model's token ids, provided that they have the same shape."""
        outer = TokenMetadata() if around is None else around.tokens
        if not self.reads:
            own = self.reader.pick_arguments(args, kwargs).get("input_ids")
            return outer if outer.ids is not None else outer._replace(ids=own)
        tokens = self.reader(args, kwargs)
        has_same_shape = outer.ids is not None and outer.ids.shape == tokens.shape
        return tokens._replace(ids=outer.ids) if tokens.ids is None and has_same_shape else tokens

    def replace_arguments(self, call: ModelCall, model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a trainer's arguments, adjusted for the model, and record the trainer's requests in `call`.

        With gradient accumulation, the `Trainer` passes the label count of the whole batch with each micro-batch, and
        expects each loss to be the micro-batch's share of the batch loss. Some models nevertheless return a mean over
        the micro-batch, and the auxiliary loss is also such a mean. The model is therefore called with the
        micro-batch's label count, and its loss is multiplied by the fraction of labels that are in this micro-batch.
        """
        arguments, config = dict(kwargs), find_text_config(model)
        call.config, fused = config, bool(kwargs.get("fused_lm_head"))
        # TRL's trainers pass fused_lm_head, and request router logits unless their `router_aux_loss_coef` is 0
        call.aux_loss_requested = bool(kwargs.get("output_router_logits"))
        call.aux_loss_declined = fused and not call.aux_loss_requested
        if get_unit_aux_loss_coef(config) is not None:  # the model cannot return router logits
            arguments.pop("output_router_logits", None)
            if fused or has_own_routers(config):
                arguments["output_router_logits"] = False
        whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if whole is not None and labels is not None:
            if (shifted := kwargs.get("shift_labels")) is not None:
                labels = shifted
            elif predicts_next_token(model):
                labels = labels[..., 1:]
            number = labels.ne(-100).sum()
            call.label_share, arguments["num_items_in_batch"] = number / whole, number.clamp(min=1)
        return arguments

    def on_success(self, call: ModelCall, output: Any) -> Any:
        changed = self.add_losses(call, output) if self.adds else None
        around, call.enclosing_call = call.enclosing_call, None
        if around is None:
            if call.backward_id in (None, -1):  # this is not a recomputation in a backward pass
                self.last.box[0] = call
        elif not call.aux_loss_added and call.grad_enabled == around.grad_enabled:
            around.losses.extend(call.losses)
        return changed

    def add_losses(self, call: ModelCall, output: Any) -> Any:
        """Add the auxiliary loss to the output's training loss and return the output, or return None if nothing
        changes. If the caller requested router logits, also set the output's `aux_loss`."""
        aux = sum_losses(call.losses) if call.losses else None
        named = isinstance(output, MutableMapping)
        if aux is not None and call.aux_loss_requested and named:
            output["aux_loss"] = self.get_reported_loss(aux, call.config, getattr(output, "aux_loss", None))
        loss = output.get("loss") if named else output
        loss = loss[0] if isinstance(loss, tuple) else loss
        if (
            not isinstance(loss, Tensor)
            or loss.ndim
            or (call.label_share is None and not (call.training and call.losses))
        ):
            return None
        if aux is not None and call.training:
            call.aux_loss_added = True
            loss = loss + get_aux_loss_factor(call.config) * aux.to(loss.device)
        loss = loss if call.label_share is None else loss * call.label_share
        if named:
            output["loss"] = loss
            return output
        return (loss, *output[1:]) if isinstance(output, tuple) else loss

    def get_reported_loss(self, aux: Tensor, config: Any, theirs: Any) -> Tensor:
        """Return the value for the output's `aux_loss`, which trainers multiply by a coefficient. If the model has its
        own routers, the value includes their loss."""
        if (unit := get_unit_aux_loss_coef(config)) is not None:
            return aux / unit
        if not (has_own_routers(config) and isinstance(theirs, Tensor)):
            return aux
        coef = getattr(config, "router_aux_loss_coef", 0.0)
        return theirs + aux.to(theirs.device) / coef if coef else theirs

    def warn_once(self, call: ModelCall, model: nn.Module) -> None:
        """Warn once if adapters do not include the routers, and once if the last backward pass reached the networks'
        outputs but not their auxiliary losses."""
        if not self.adapted and "peft_config" in vars(model):
            check_adapters_loaded(model)
            self.adapted = True
            warn_unsaved_routers(model)
        last = self.last.box[0]
        should_warn = call.enclosing_call is None and call.training and not self.warned and not last.aux_loss_declined
        if (
            should_warn
            and last.reached == {"outputs"}
            and getattr(find_text_config(model), "router_aux_loss_coef", 1.0) != 0
        ):
            self.warned = True
            warnings.warn(
                "gradients reached the outputs of feed-forward networks but not their auxiliary loss, so it does "
                f"not balance the experts. Either the loss returned by {type(model).__name__} does not include it, or "
                "another loss was used. With label smoothing or a custom loss, add aux_loss(model) to the loss",
                stacklevel=2,
            )


def check_adapters_loaded(model: nn.Module) -> None:
    """Raise ValueError if PEFT skipped quantized experts that are in `target_parameters`, or if `fast_lora` was not
    called for them. In the first case, PEFT itself only issues a warning, and the model would run without these
    adapters."""
    quantized = any(isinstance(module, QuantizedExperts) for module in model.modules())
    if quantized and any(adds_to_quantized_weight(module) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has adapters on quantized experts, which PEFT cannot compute; call "
            "fast_lora(model) after adding or loading them"
        )
    if quantized and (missed := [name for name in find_missed_targets(model) if name.endswith(("w1", "w2", "w3"))]):
        raise ValueError(
            f"{type(model).__name__} has no adapters for {', '.join(missed)} in target_parameters, because these "
            "experts are quantized; reload the model, and load the adapters within weights_shown(model)"
        )


def warn_unsaved_routers(model: nn.Module) -> None:
    """Warn if a model was never saved to a folder and its PEFT adapters do not include its routers."""
    routers = {router.name: weight for router in find_all_routers(model) for weight in router.gate.parameters()}
    if getattr(model, "name_or_path", None) == "" and (lost := find_tensors_not_saved(model, routers)):
        warnings.warn(
            f"the routers in {', '.join(lost)} were initialized in memory and are not saved with the adapters of "
            f"{type(model).__name__}, so a newly created model would have different routers. Save and reload the model "
            "(save_pretrained, from_pretrained) before adding adapters, list the gates in "
            "LoraConfig(modules_to_save=['gate']), or merge the adapters at the end and save the whole model",
            stacklevel=2,
        )


@torch.compiler.disable
def wrap_checkpointing(model: nn.Module) -> None:
    """Wrap the model's own checkpointing functions, so that recomputed layers see the call of the original forward
    pass."""
    for module in model.modules():
        checkpoint = get_checkpoint_function(module)
        if checkpoint is not None and not isinstance(checkpoint, CheckpointWithCall) and find_feed_forwards(module):
            set_checkpoint_function(module, CheckpointWithCall(checkpoint, module))


class CheckpointWithCall:
    """Wraps a layer's checkpointing function so that the layer sees the same calls when it is recomputed.

    This causes a graph break in compiled models, because a graph cannot store the calls.
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        networks = find_feed_forwards(self.layer)
        calls = [(module, copy(call_stack.current_call(module) or ModelCall())) for module in networks]
        for _, call in calls:
            call.is_checkpointed = True

        def run_with_calls(*args: Any, **kwargs: Any) -> Any:
            with call_stack.activate_calls(calls):
                try:
                    return run(*args, **kwargs)
                finally:
                    for _, call in calls:  # recomputations need only the tokens
                        call.is_recomputation, call.enclosing_call, call.losses = True, None, []

        return self.checkpoint(run_with_calls, *args, **kwargs)
