"""The module that stands in the place of a feed-forward network.

Axes: b sequences, n tokens of a sequence, d model dim.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from mixture_of_experts import under_way
from mixture_of_experts.auxiliary import refuse_reentrant
from mixture_of_experts.gating import reads_of
from mixture_of_experts.model_tokens import TokensAround
from mixture_of_experts.moe import MoE
from mixture_of_experts.tracing import in_checkpoint, in_transform
from mixture_of_experts.under_way import CallUnderWay


class ModelCall(CallUnderWay):
    """A forward of the model around.

    Args:
        tokens: what it knows of its tokens.
        around: the call of a larger model, of which this one is a part.
    """

    tokens: TokensAround
    with_gradients: bool
    reached: Reached

    def __init__(self, tokens: TokensAround | None = None, around: ModelCall | None = None) -> None:
        self.tokens = TokensAround() if tokens is None else tokens
        self.around = around
        self.with_gradients = torch.is_grad_enabled()
        self.losses: list[Tensor] = []  # auxiliary ones, of the feed-forward networks that ran
        self.added = False  # whether they are in the loss that the model returned
        self.reached = Reached() if around is None else around.reached
        self.remembered = False  # whether activation checkpointing has it, so that what runs again has it too
        self.again = False  # whether this is activation checkpointing running it again


class Reached:
    """Where a backward came by: hooks on tensors, which hold nothing else."""

    output: bool
    loss: bool

    def __init__(self) -> None:
        self.output = False
        self.loss = False

    def at_output(self, grad: Tensor) -> None:
        self.output = True

    def at_loss(self, grad: Tensor) -> None:
        self.loss = True


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

    The padding mask, and token ids for a gate that reads them, come from the call of the model around that is under
    way, and the auxiliary loss goes there (`padding.py`, `losses.py`). Called alone it knows no padding and no ids, and
    its auxiliary loss goes nowhere.

    Args:
        moe: the layer.
        dropout: dropout after it, as the network had it.
        masked: whether the mask of the model around is of these tokens.
        stands_for: path of a linear layer of the network, below it; "" if that is the place itself. See `Replaced`.

    Shape:
        `(b, n, d)`, or flattened `(b n, d)`, to the same.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        call = under_way.current(self) or ModelCall()
        mask, shape = self._mask(call, x), call.tokens.shape
        tokens = x
        if x.ndim == 2 and shape is not None and shape[0] * shape[1] == x.shape[0]:
            tokens = x.view(*shape, x.shape[-1])  # the router sees sequences, also where the model flattens them
        elif x.ndim == 2 and mask is not None:
            raise RuntimeError(
                f"{x.shape[0]} tokens came without their shape, and the mask of this forward is {tuple(mask.shape)}"
            )
        side = self._side(call, tokens)
        if mask is not None or tokens is not x or side:
            self._refuse_forgetting(call)
        out, aux_loss = self.moe(tokens, mask=mask, **side)
        if not call.again:
            self._give(call, out, aux_loss)
        out = out.view(x.shape)
        return out if self.dropout is None else self.dropout(out)

    def _give(self, call: ModelCall, out: Tensor, aux_loss: Tensor) -> None:
        """The auxiliary loss to the call, which learns whether gradients reach it."""
        call.losses.append(aux_loss)
        if not (self.moe.loss_coef or self.moe.z_loss_coef or self.moe.loss_coefs):
            return
        if call.with_gradients or not call.keys:  # a forward without any has nothing to lose
            refuse_reentrant(self.moe)
        if not torch.compiler.is_compiling() and out.requires_grad and aux_loss.requires_grad and not in_transform():
            out.register_hook(call.reached.at_output)
            aux_loss.register_hook(call.reached.at_loss)

    def _side(self, call: ModelCall, tokens: Tensor) -> dict[str, Tensor]:
        """The ids of tokens `(b, n, d)`, if the gate reads them."""
        if "token_ids" not in reads_of(self.moe.gate):
            return {}
        ids = call.tokens.ids if self.masked else None
        if ids is None or ids.shape != tokens.shape[:-1]:
            got = "was given none, as with inputs_embeds" if ids is None else f"has {tuple(ids.shape)} of them"
            raise ValueError(
                f"a {type(self.moe.gate).__name__} reads the ids of {tuple(tokens.shape[:-1])} tokens, but the model "
                f"{got}: call the model with input_ids"
            )
        return {"token_ids": ids}

    def _refuse_forgetting(self, call: ModelCall) -> None:
        """Checkpointing that is not the model's own would run this again without what the call knows of the tokens."""
        if torch.compiler.is_compiling() or not self.training or not call.with_gradients or call.remembered:
            return
        if in_checkpoint(call.frame):
            raise RuntimeError(
                "a feed-forward network runs under torch.utils.checkpoint, which will run it again when its padding "
                "mask is not known any more: checkpoint by model.activation_checkpointing_enable()"
            )

    def _mask(self, call: ModelCall, x: Tensor) -> Tensor | None:
        """`(b, n)` for tokens `(b, n, d)` or `(b n, d)`."""
        if not self.masked:
            return None
        mask, unknown = call.tokens.mask, call.tokens.unknown
        dropless = not self.training and getattr(self.moe.gate, "capacity_factor", 0.0) is None
        if unknown is not None and not dropless:  # dropless in eval padding changes nothing for other tokens
            raise ValueError(f"the router cannot know which tokens are padding: {unknown}")
        if mask is None:
            return None
        if mask.numel() * x.shape[-1] != x.numel() or (x.ndim == 3 and mask.shape != x.shape[:-1]):
            raise ValueError(
                f"an attention mask for {tuple(mask.shape)} tokens does not fit {tuple(x.shape[:-1])} tokens of a "
                "feed-forward network: call it once, on all tokens of the forward"
            )
        return mask

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
