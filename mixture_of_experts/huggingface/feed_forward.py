"""Defines `MoEFeedForward`, the module that replaces a feed-forward network.

Axes: b (sequences), n (tokens of a sequence), d (model dimension).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_experts.arguments import packing_unsupported_reason
from mixture_of_experts.dispatch.segments import SEGMENT_IDS
from mixture_of_experts.gating import get_side_inputs
from mixture_of_experts.gating.base import COUNTED
from mixture_of_experts.gating.overrides import STATE
from mixture_of_experts.huggingface.private_transformers import collected_logits
from mixture_of_experts.moe import MoE
from mixture_of_experts.providers import TokenMetadata
from mixture_of_experts.support.private_torch import is_in_transform, set_first_hook, unwrap_module
from mixture_of_experts.support.tracing import is_in_activation_checkpoint
from mixture_of_experts.whole_model import call_stack
from mixture_of_experts.whole_model.aux_losses import check_not_reentrant
from mixture_of_experts.whole_model.call_stack import ForwardCall


class ModelCall(ForwardCall):
    """The state of the enclosing model's current forward pass.

    Args:
        tokens: metadata of the tokens in the forward pass.
        enclosing_call: the `ModelCall` of a larger model that contains this one.
    """

    config: Any = None  # the part of the model's configuration that describes routers
    label_share: Tensor | None = None  # this call's fraction of the batch's labels, if the trainer passes the total
    training = False  # whether the model is in training mode and gradients are enabled
    aux_loss_requested = False  # whether the caller requests the auxiliary loss
    aux_loss_declined = False  # whether the caller computes its own loss without the auxiliary losses
    aux_loss_added = False  # whether the loss that the model returned includes the auxiliary losses
    is_checkpointed = False  # whether activation checkpointing will recompute this call
    is_recomputation = False  # whether activation checkpointing is recomputing this call
    returns_logits = False  # whether the model returns router logits, as stock models do

    def __init__(self, tokens: TokenMetadata | None = None, enclosing_call: ModelCall | None = None) -> None:
        self.tokens: TokenMetadata = TokenMetadata() if tokens is None else tokens
        self.enclosing_call = enclosing_call
        self.grad_enabled: bool = torch.is_grad_enabled()
        self.losses: list[Tensor] = []  # auxiliary losses of the feed-forward networks that ran
        #: what the backward pass has reached: "outputs" of feed-forward networks, or the "losses" of their layers
        self.reached: set[str] = set() if enclosing_call is None else enclosing_call.reached


class Replaced(nn.Module):
    """A placeholder for a linear layer of the dense network. The placeholder prevents checkpoints from being loaded
    into the wrong model.

    A checkpoint of the modified model stores a three-dimensional tensor under the linear layer's name. The dense
    `transformers` class expects a matrix there, so it fails to load the checkpoint. Without the placeholder, loading
    would succeed and leave the feed-forward networks randomly initialized.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, 1, 1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].shape != self.weight.shape:
            warnings.warn(
                "the checkpoint has dense feed-forward networks, but this model has experts, which were left "
                "unchanged; load the checkpoint into the dense model and upcycle that model",
                stacklevel=2,
            )
            state_dict[name] = self.weight
            state_dict.pop(f"{prefix}bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return "by experts"


class MoEFeedForward(Replaced):
    """An `MoE` layer that replaces a feed-forward network and maps tokens to tokens.

    During a forward pass of the enclosing model, this module receives the padding mask and, if its gate reads them, the
    token ids. It reports its auxiliary loss to the model (see `model_watch.py`). Outside such a pass, no mask or token
    ids are available, and the auxiliary loss is discarded.

    Args:
        moe: the `MoE` layer.
        dropout: the dropout module applied to the layer's output, if the dense network had one.
        masked: whether the enclosing model's mask applies to this module's tokens.
        replaced_path: path, relative to this module, of the linear layer for which a `Replaced` placeholder is
            inserted. If `replaced_path` is "", this module itself is the placeholder.

    Shape:
        The input has shape `(b, n, d)`, or `(b n, d)` if it is flattened. The output has the same shape as the input.
        If the caller passes side inputs, the output is a tuple (tokens, router state).
    """

    record: Any = None  #: the layer's description in `config.json`, a `LayerRecord`

    def __init__(
        self, moe: MoE, dropout: nn.Module | None = None, *, masked: bool = True, replaced_path: str = ""
    ) -> None:
        super().__init__()
        self.moe = moe
        self.dropout = dropout
        self.masked = masked
        if replaced_path:
            del self.weight
            add_submodule(self, replaced_path, Replaced())

    def forward(self, x: Tensor, **side_inputs: Tensor | None) -> Any:
        call = call_stack.current_call(self) or ModelCall()
        tokens, shape = x, call.tokens.shape
        if x.ndim == 2 and shape is not None and shape[0] * shape[1] == x.shape[0]:
            tokens = x.view(*shape, x.shape[-1])  # the router needs sequences, but the model flattens them
        side = self._get_token_ids_input(call, tokens) | self._get_segment_ids_input(call, tokens)
        # a layer without packing support treats each row as one group, including padding
        if call.tokens.segment_ids is None or SEGMENT_IDS in side:
            side |= self._get_mask_input(call, x)
        if side or tokens is not x:
            self._check_checkpointing(call)
        out, aux_loss, *state = self.moe(tokens, **side, **side_inputs)
        if not call.is_recomputation:
            self._collect_aux_loss(call, out, aux_loss)
        out = out.view(x.shape)
        out = out if self.dropout is None else self.dropout(out)
        return (out, *state) if side_inputs else out

    def _collect_aux_loss(self, call: ModelCall, out: Tensor, aux_loss: Tensor) -> None:
        """Add the auxiliary loss to `call`, and register hooks that record whether gradients reach the loss."""
        call.losses.append(aux_loss)
        if not (self.moe.loss_coef or self.moe.z_loss_coef or self.moe.loss_coefs):
            return
        if call.grad_enabled or not call.keys:  # losses need no gradient if nothing else requires one
            check_not_reentrant(self.moe, call.is_checkpointed)
        if not torch.compiler.is_compiling() and out.requires_grad and aux_loss.requires_grad and not is_in_transform():
            reached = call.reached  # a local variable, so that the hooks keep no tensors alive
            out.register_hook(lambda _: reached.add("outputs"))
            aux_loss.register_hook(lambda _: reached.add("losses"))

    def _get_token_ids_input(self, call: ModelCall, tokens: Tensor) -> dict[str, Tensor]:
        """Return the token ids as a side input, or {} if the gate does not read them. `tokens` is `(b, n, d)`."""
        if "token_ids" not in get_side_inputs(self.moe.gate):
            return {}
        ids = call.tokens.ids if self.masked else None
        if ids is None or ids.shape != tokens.shape[:-1]:
            got = "was called without ids, as with inputs_embeds" if ids is None else f"has {tuple(ids.shape)} ids"
            raise ValueError(
                f"{type(self.moe.gate).__name__} requires token ids of shape {tuple(tokens.shape[:-1])}, but the model "
                f"{got}; call the model with input_ids"
            )
        return {"token_ids": ids}

    def _get_segment_ids_input(self, call: ModelCall, tokens: Tensor) -> dict[str, Tensor]:
        """Return the document ids of packed tokens `(b, n, d)` as a side input.

        Return {} if the rows are not packed, or if the layer does not support packing and treats each row as one group.
        """
        ids = call.tokens.segment_ids if self.masked else None
        if ids is None or ids.shape != tokens.shape[:-1]:
            return {}
        reason = packing_unsupported_reason(self.moe.group_size, [self.moe.gate], self.moe.experts)
        return {SEGMENT_IDS: ids} if reason is None else {}

    def _check_checkpointing(self, call: ModelCall) -> None:
        """Raise RuntimeError if this module runs under activation checkpointing other than the model's own. A
        recomputation would lack both the mask and the token ids."""
        if torch.compiler.is_compiling() or not self.training or not call.grad_enabled or call.is_checkpointed:
            return
        if is_in_activation_checkpoint(call.frame):
            raise RuntimeError(
                "a feed-forward network runs under torch.utils.checkpoint, which would recompute it without its "
                "padding mask; use model.activation_checkpointing_enable() instead"
            )

    def _get_mask_input(self, call: ModelCall, x: Tensor) -> dict[str, Tensor]:
        """Return the padding mask `(b, n)` as a side input, given tokens `(b, n, d)` or `(b n, d)`.

        The name of the side input determines how the layer handles padding. Return {} if there is no padding.

        Dense networks also process padding tokens, and models use the results: with left padding, the first token is
        predicted from a padding token. Dropless gates therefore route padding tokens, but exclude them from all
        statistics and losses.
        """
        mask, unknown = call.tokens.mask, call.tokens.mask_unknown_reason
        dropless = getattr(self.moe.gate, "capacity_factor", 0.0) is None
        # padding matters only during training or if tokens may be dropped
        if self.masked and unknown is not None and (self.training or not dropless):
            raise ValueError(f"the router cannot determine which tokens are padding: {unknown}")
        if mask is None or not self.masked:
            return {}
        if mask.numel() * x.shape[-1] != x.numel() or (x.ndim == 3 and mask.shape != x.shape[:-1]):
            raise ValueError(
                f"the attention mask has shape {tuple(mask.shape)}, but the feed-forward network received tokens of "
                f"shape {tuple(x.shape[:-1])}; call the network once per forward pass, with all tokens"
            )
        return {COUNTED if dropless and COUNTED in get_side_inputs(self.moe.gate) else "mask": mask}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.record is not None:
            self.record.bind_layer(self)

    def extra_repr(self) -> str:
        return "" if self.masked else "masked=False"


class LogitsCall(ForwardCall):
    """The state of a gate's current forward pass in a model that returns the gate's logits.

    Args:
        x: the tokens as the stock block's router would receive them.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        # a recomputation under activation checkpointing collects no logits, but must perform the same computation
        found = collected_logits()
        self.collected: list[Tensor] = [] if found is None else found


def collect_logits(gate: Any, args: object, output: object) -> None:
    """A forward hook that adds a gate's logits `(t, e)` for all tokens to the logits that `transformers` collects.

    The hook computes these logits itself, because the gate's own logits may be grouped, contain additional tokens, or
    lack the padding tokens.
    """
    call = call_stack.current_call(gate)
    if call is None:
        return
    x = call.x.reshape(1, -1, call.x.shape[-1])
    bias = getattr(gate, "b_gating", None)
    logits = (
        gate.compute_logits(x, gate.w_gating, bias)
        if hasattr(gate, "compute_logits")
        else gate.product(x, gate.w_gating)
    )
    call.collected.append(logits.squeeze(0))


class SparseFeedForward(MoEFeedForward):
    """An `MoE` layer that replaces a sparse block of `transformers` and keeps its call signature.

    Args:
        block: the class name of the replaced block.
        reports: whether the layer passes its router logits to the model, which can then return them
            (`output_router_logits`) and compute its own auxiliary loss from them.
        settings: the remaining arguments of `MoEFeedForward`.

    Shape:
        The shapes are the same as for `MoEFeedForward`, with two exceptions. If the replaced block also returned router
        scores, the output is (tokens, None). If the block's router takes a state as an additional input, the output is
        (tokens, state).
    """

    reports: bool = False

    def __init__(self, moe: MoE, block: str, reports: bool = False, **settings: Any) -> None:
        super().__init__(moe, **settings)
        self.block = block
        self.reports = reports
        if reports:  # registered now, because the first request for logits may occur in a traced graph
            set_first_hook(unwrap_module(moe.gate), "mixture_of_experts_logits", collect_logits)

    def forward(
        self, x: Tensor, prev_router_hidden_states: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Any:
        call = call_stack.current_call(self) if self.reports else None
        if call is None or not call.returns_logits:
            return self.as_block(x, prev_router_hidden_states)
        if call.grad_enabled:  # a loss computed from these logits would have no gradient
            check_not_reentrant(self.moe, call.is_checkpointed)
        gate = unwrap_module(self.moe.gate)
        set_first_hook(gate, "mixture_of_experts_logits", collect_logits)
        with call_stack.activate_calls([(gate, LogitsCall(x))]):
            return self.as_block(x, prev_router_hidden_states)

    def as_block(self, x: Tensor, prev_router_hidden_states: Tensor | None) -> Any:
        if STATE in get_side_inputs(self.moe.gate):
            return super().forward(x, **{STATE: prev_router_hidden_states})
        out = super().forward(x)  # a gate that reads token ids gets them from the enclosing model
        return (out, None) if self.block in BLOCKS_WITH_ROUTER_SCORES else out

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [self.block, super().extra_repr()]))


#: blocks that also return router scores, which their models ignore
BLOCKS_WITH_ROUTER_SCORES = ("GptOssMLP", "Llama4TextMoe", "OpenAIPrivacyFilterMLP")


def find_layers(model: nn.Module) -> dict[str, Any]:
    """Return all `MoEFeedForward` modules of a model, keyed by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MoEFeedForward)}


def get_named_tensors(module: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, keyed by name."""
    return dict((*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)))


def add_submodule(module: nn.Module, path: str, child: nn.Module) -> None:
    """Add a child at a path, creating missing parent modules."""
    *above, last = path.split(".")
    for name in above:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(last, child)


def find_feed_forwards(model: nn.Module) -> list[MoEFeedForward]:
    """Return all `MoEFeedForward` modules in a model, in the same order as `model.modules()`. The model may be wrapped.

    This function runs in every forward pass, and therefore once per token during decoding. It is faster than
    `model.modules()`, because it skips modules without children and does not descend into a `MoEFeedForward`, which
    cannot contain another one.
    """
    if torch.compiler.is_compiling():
        return [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    pending, found = [model], {}
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = isinstance(module, MoEFeedForward)
            if not found[module]:
                parts = reversed(module._modules.values())
                pending += [part for part in parts if part is not None and part._modules]
    return [module for module, is_feed_forward in found.items() if is_feed_forward]
