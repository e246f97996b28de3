"""Brings mask and token ids from a model's arguments to its feed-forward networks, and their losses back.

A watch keeps a `ModelCall` under way during a forward. It is set on the model that was changed, and on the nearest
models around its networks (for example an encoder and a decoder). Activation checkpointing runs layers again after the
forward: the function that it runs is wrapped, so that it has the call of that forward.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixture_of_experts.huggingface.feed_forward import ModelCall, feed_forwards
from mixture_of_experts.huggingface.replacement.torch_layers import KINDS, LayerReader
from mixture_of_experts.support.private_torch import lost_by_adapters
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.call_stack import Watch
from mixture_of_experts.whole_model.model_tokens import TokensAround, TokensReader, model_around
from mixture_of_experts.whole_model.sites import all_sites


class LastCall(threading.local):
    """The last outermost call that ended, separately for each thread. A copy of a model starts without one."""

    box: list[ModelCall]

    def __init__(self) -> None:
        self.box = [ModelCall()]  # a list, as torch.compile cannot set an attribute here

    def __reduce__(self) -> tuple[type[LastCall], tuple[()]]:
        return LastCall, ()


def bring_mask(model: nn.Module, names: Sequence[str]) -> None:
    """Set the hooks on a model, and on the models around the named modules."""
    last = last_calls(model)[0] if last_calls(model) else LastCall()
    readers = {reader_around(model, name): True for name in names}
    for around, reads in {model: False, **readers}.items():
        reader = reader_of(around) if reads else None
        if watches := watches_of(around):
            watches[0].reader = reader or watches[0].reader
        else:
            ModelWatch(reader, TokensReader(around), last).set_on(around)


def watches_of(module: nn.Module) -> list[ModelWatch]:
    """The watch on a module, if it has one."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, ModelWatch)]


def last_calls(model: nn.Module) -> list[LastCall]:
    """The `LastCall` of each changed model in `model`, which may be one itself."""
    watches = [watch for module in model.modules() for watch in watches_of(module)]
    return list({id(watch.last): watch.last for watch in watches}.values())


def is_masked(model: nn.Module, name: str) -> bool:
    """Whether the mask of the model around a module is one of the module's tokens. For a model of sound it is not."""
    return getattr(reader_around(model, name), "main_input_name", "input_ids") in ("input_ids", "inputs_embeds")


def reader_around(model: nn.Module, name: str) -> nn.Module:
    """The module around a network whose arguments tell its padding: a layer of torch, or a model."""
    above = model.get_submodule(name.rpartition(".")[0])
    return above if isinstance(above, KINDS) else model_around(model, name)


def reader_of(around: nn.Module) -> TokensReader:
    return LayerReader(around) if isinstance(around, KINDS) else TokensReader(around)


class ModelWatch(Watch):
    """Tells the feed-forward networks of a model of the tokens of each forward, and keeps its losses. It is a part of
    the model, and of its copies.

    Args:
        reader: reads the tokens; None: a model around does.
        ids: reads their ids, where there is no `reader`.
        last: where the call of an outermost forward stays.
    """

    warned: bool
    adapted: bool  # whether the model has had a forward with adapters

    def __init__(self, reader: TokensReader | None, ids: TokensReader, last: LastCall) -> None:
        super().__init__()
        self.reader = reader
        self.ids = ids
        self.last = last
        self.warned = self.adapted = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "next_hook": RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch counts hooks in each process anew: a new hook would replace one that came with the model
        RemovableHandle.next_id = max(RemovableHandle.next_id, state.pop("next_hook"))
        vars(self).update(state)

    def set_on(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, always_call=True)

    def key(self, module: nn.Module) -> nn.Module:
        return module

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        members = feed_forwards(module)
        around = call_stack.current(members[0]) if members else None
        if self.reader is not None:
            tokens = self.reader(args, kwargs)
        else:
            tokens = TokensAround() if around is None else around.tokens
        if tokens.ids is None:
            tokens = tokens._replace(ids=self.ids_of(args, kwargs, tokens.shape, around))
        call = ModelCall(tokens, around)
        # TRL calls so; it asks for router logits unless its `router_aux_loss_coef` is 0
        call.asked = bool(kwargs.get("output_router_logits"))
        call.declined = bool(kwargs.get("fused_lm_head")) and not call.asked
        call.keys = members
        if not self.adapted and "peft_config" in vars(module) and not torch.compiler.is_compiling():
            self.adapted = True
            warn_of_adapters(module)
        if around is None and module.training and call.with_gradients and not torch.compiler.is_compiling():
            self.warn_of_loss(module)
        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            keep_for_checkpointing(module)
        return call

    def ended(self, call: ModelCall, output: object) -> None:
        around, call.around = call.around, None
        if around is None:
            if call.backward in (None, -1):  # not a recomputation in a backward
                self.last.box[0] = call
        elif not call.added and call.with_gradients == around.with_gradients:
            around.losses.extend(call.losses)

    def ids_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, int] | None, around: ModelCall | None
    ) -> Tensor | None:
        """Token ids where the reader found none: the model's own, or those of a model around with as many tokens."""
        if self.reader is None:
            return self.ids.given(args, kwargs).get("input_ids")
        outer = None if around is None else around.tokens.ids
        return None if outer is None or outer.shape != shape else outer

    def warn_of_loss(self, model: nn.Module) -> None:
        """Warn, once, if the last backward reached the outputs of networks, but not their auxiliary losses."""
        last = self.last.box[0]
        if self.warned or last.declined or not last.reached.output or last.reached.loss:
            return
        config = getattr(model, "config", None)
        if config is not None and getattr(config.get_text_config(), "router_aux_loss_coef", 1.0) == 0:
            return  # the user switched the loss off
        self.warned = True
        warnings.warn(
            "a gradient reached the outputs of feed-forward networks, but not their auxiliary loss: "
            f"{type(model).__name__} returned no loss that holds it, or another loss was used, so experts will not "
            "stay balanced. With label smoothing or a loss of your own add aux_loss(model) to it",
            stacklevel=2,
        )


def warn_of_adapters(model: nn.Module) -> None:
    """Warn of adapters of PEFT without the routers of a model that no folder has either."""
    routers = {site.name: weight for site in all_sites(model) for weight in site.gate.parameters()}
    if getattr(model, "name_or_path", None) == "" and (lost := lost_by_adapters(model, routers)):
        warnings.warn(
            f"the routers in {', '.join(lost)} were drawn in memory, and the adapters of {type(model).__name__} do not "
            "save them: a model that is made anew draws others. Save the model and load it (save_pretrained, "
            "from_pretrained) before it gets adapters; or name the gates in LoraConfig(modules_to_save=['gate']), or "
            "merge the adapters in the end and save the whole model",
            stacklevel=2,
        )


@torch.compiler.disable
def keep_for_checkpointing(model: nn.Module) -> None:
    """Wrap the model's own checkpointing, so that layers that run again have their call."""
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and not isinstance(run, CheckpointWithMask) and feed_forwards(module):
            module._gradient_checkpointing_func = CheckpointWithMask(run, module)  # pyright: ignore[reportArgumentType]


class CheckpointWithMask:
    """Wraps the checkpointing function of one layer: the function that it runs becomes a `Remembered`.

    A compiled model has a graph break here, because a graph cannot hold the calls.
    """

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls = [(module, call_stack.current(module) or ModelCall()) for module in feed_forwards(self.layer)]
        return self.checkpoint(Remembered(run, calls), *args, **kwargs)


class Remembered:
    """A function to be recomputed: each run of it gets the calls of the model that were under way when it was made."""

    first: bool

    def __init__(self, run: Callable[..., Any], calls: Sequence[tuple[nn.Module, ModelCall]]) -> None:
        self.run = run
        self.calls: list[tuple[nn.Module, ModelCall]] = []
        for module, call in calls:
            call = copy(call)
            call.remembered = True
            self.calls.append((module, call))
        self.first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with call_stack.within(self.calls):
            if self.first:
                self.first = False
                try:
                    return self.run(*args, **kwargs)
                finally:
                    for _, call in self.calls:  # recomputations need the tokens alone
                        call.again, call.around, call.losses = True, None, []
            return self.run(*args, **kwargs)
