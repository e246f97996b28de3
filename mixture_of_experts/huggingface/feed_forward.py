"""The module that stands in the place of a feed-forward network.

Axes: b sequences, n tokens of a sequence, d model dim.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.auxiliary import refuse_reentrant
from mixture_of_experts.moe import MoE
from mixture_of_experts.tracing import in_checkpoint


class Call(NamedTuple):
    """What the model around knows of the tokens of its forward that is under way."""

    mask: Tensor | None = None  # (b, n) bool, True where a token is real; None if all are
    shape: tuple[int, int] | None = None  # (b, n), where it can be told
    unknown: str | None = None  # why the mask cannot be told
    again: bool = False  # whether activation checkpointing runs this forward again


class Replaced(nn.Module):
    """Stands where a linear layer of the dense network stood, so that weights of one are not taken for the other's.

    A checkpoint of a swapped model has under this name a tensor of three dimensions. A class of `transformers` that
    knows nothing of experts asks for a matrix, and fails, instead of starting from random feed-forward networks.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, 1, 1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].shape != self.weight.shape:
            warnings.warn(
                "the checkpoint has dense feed-forward networks where this model has experts, which stay as they are: "
                "load it into the dense model and give that to upcycle",
                stacklevel=2,
            )
            state_dict[name] = self.weight
            state_dict.pop(f"{prefix}bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return "by experts"


class MoEFeedForward(Replaced):
    """A `MoE` layer in the place of a feed-forward network: takes tokens, returns their outputs alone.

    The padding mask comes from the model around it (`padding.py`), and the auxiliary loss goes there (`losses.py`);
    both are kept only as long as they are needed, and neither copied nor saved.

    Args:
        moe: the layer.
        dropout: dropout after it, as the network had it.
        masked: whether the mask of the model around is of these tokens.
        stands_for: path of a linear layer of the network, below it; "" if that is the place itself. See `Replaced`.

    Shape:
        `(b, n, d)`, or flattened `(b n, d)`, to the same.
    """

    call: Call | None
    aux_loss: Tensor | None

    def __init__(
        self, moe: MoE, dropout: nn.Module | None = None, *, masked: bool = True, stands_for: str = ""
    ) -> None:
        super().__init__()
        self.moe = moe
        self.dropout = dropout
        self.masked = masked
        if stands_for:
            del self.weight
            add_below(self, stands_for, Replaced())
        self.was_masked = False
        self.begin(None)

    def begin(self, call: Call | None) -> None:
        """Before a forward of the model around."""
        self.call = call
        self.aux_loss = None
        self.aux_used = False

    def forward(self, x: Tensor) -> Tensor:
        call = self._outside() if self.call is None else self.call
        mask = self._mask(call, x)
        tokens = x
        if x.ndim == 2 and call.shape is not None and call.shape[0] * call.shape[1] == x.shape[0]:
            tokens = x.view(*call.shape, x.shape[-1])  # the router sees sequences, also where the model flattens them
        elif x.ndim == 2 and mask is not None:
            raise RuntimeError(
                f"{x.shape[0]} tokens came without their shape, and the mask of this forward is {tuple(mask.shape)}"
            )
        out, aux_loss = self.moe(tokens, mask=mask)
        if not call.again:
            if self.moe.loss_coef or self.moe.z_loss_coef or self.moe.loss_coefs:
                refuse_reentrant(self.moe)
            self.aux_loss = aux_loss if self.aux_loss is None else self.aux_loss + aux_loss
        out = out.view(x.shape)
        return out if self.dropout is None else self.dropout(out)

    def _outside(self) -> Call:
        """Nobody knows the tokens: a direct call, or checkpointing that is not the model's own, which runs it again."""
        if torch.compiler.is_compiling() or not self.training or not in_checkpoint():
            return Call()
        if self.was_masked:
            raise RuntimeError(
                "a feed-forward network runs again under torch.utils.checkpoint, where its padding mask is not known "
                "any more: checkpoint by model.activation_checkpointing_enable()"
            )
        return Call(again=True)

    def _mask(self, call: Call, x: Tensor) -> Tensor | None:
        """`(b, n)` for tokens `(b, n, d)` or `(b n, d)`."""
        if not self.masked:
            return None
        dropless = not self.training and getattr(self.moe.gate, "capacity_factor", 0.0) is None
        if call.unknown is not None and not dropless:  # dropless in eval padding changes nothing for other tokens
            raise ValueError(f"the router cannot know which tokens are padding: {call.unknown}")
        mask = call.mask
        if mask is None:
            return None
        self.was_masked = True
        if mask.numel() * x.shape[-1] != x.numel() or (x.ndim == 3 and mask.shape != x.shape[:-1]):
            raise ValueError(
                f"an attention mask for {tuple(mask.shape)} tokens does not fit {tuple(x.shape[:-1])} tokens of a "
                "feed-forward network: call it once, on all tokens of the forward"
            )
        return mask

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what belongs to a forward stays behind, its graph could not be copied."""
        return {**self.__dict__, "call": None, "aux_loss": None, "aux_used": False}

    def extra_repr(self) -> str:
        return "" if self.masked else "masked=False"


def add_below(module: nn.Module, path: str, child: nn.Module) -> None:
    """Add a child at a path, and what has to be there above it."""
    *above, last = path.split(".")
    for name in above:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(last, child)


def feed_forwards(model: nn.Module) -> list[MoEFeedForward]:
    """Those of a model, wrapped or not, in its order."""
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]
