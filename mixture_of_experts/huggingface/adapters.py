"""Where the feed-forward networks of known models are, and how to read and replace them: a table entry for each.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.ops.activations import make_activation


@dataclass(frozen=True)
class Adapter:
    """The parts of a feed-forward network, as paths below the module whose class the table names.

    Args:
        up: the first linear layer; of a gated network the one that is not under the activation.
        down: the last one.
        gate: the linear layer under the activation of a gated network. The same path as `up`, if one layer holds both:
            the first half of its results is the gate.
        activation: the activation, a module or a function.
        hidden_dropout: dropout between activation and `down`: a module, or a number.
        output_dropout: a dropout module after `down`, within the network.
        slot: the parts stand in a layer that does other things too and calls them one by one. Then the MoE takes the
            place of `down`, and those that `bypass` names become identities; otherwise it takes the whole module's.
        bypass: see `slot`.
        masked: whether the attention mask of the model around it is of the tokens that come here.
    """

    up: str
    down: str
    gate: str | None = None
    activation: str = "act_fn"
    hidden_dropout: str | None = None
    output_dropout: str | None = None
    slot: bool = False
    bypass: tuple[str, ...] = field(default=())
    masked: bool = True


LLAMA = Adapter(up="up_proj", down="down_proj", gate="gate_proj")
BERT = Adapter(
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    slot=True,
    bypass=("intermediate",),
)
OPT = Adapter(up="fc1", down="fc2", activation="activation_fn", slot=True, bypass=("fc1", "activation_fn"))
WHISPER = Adapter(
    up="fc1",
    down="fc2",
    activation="activation_fn",
    hidden_dropout="activation_dropout",
    slot=True,
    bypass=("fc1", "activation_fn"),
)
# the encoder hears all of its frames, also those that a mask of the sound calls padding
WHISPER_ENCODER = Adapter(**{**vars(WHISPER), "masked": False})

#: class name of a module in `transformers`: where its parts are
ADAPTERS: dict[str, Adapter] = {
    "BertLayer": BERT,
    "GPT2MLP": Adapter(up="c_fc", down="c_proj", activation="act", output_dropout="dropout"),
    "GPTNeoXMLP": Adapter(up="dense_h_to_4h", down="dense_4h_to_h", activation="act"),
    "Gemma2MLP": LLAMA,
    "Gemma3MLP": LLAMA,
    "GemmaMLP": LLAMA,
    "LlamaMLP": LLAMA,
    "MistralMLP": LLAMA,
    "OPTDecoderLayer": OPT,
    "Phi3MLP": Adapter(up="gate_up_proj", down="down_proj", gate="gate_up_proj", activation="activation_fn"),
    "PhiMLP": Adapter(up="fc1", down="fc2", activation="activation_fn"),
    "Qwen2MLP": LLAMA,
    "Qwen3MLP": LLAMA,
    "RobertaLayer": BERT,
    "T5DenseActDense": Adapter(up="wi", down="wo", activation="act", hidden_dropout="dropout"),
    "T5DenseGatedActDense": Adapter(up="wi_1", down="wo", gate="wi_0", activation="act", hidden_dropout="dropout"),
    "ViTMLP": Adapter(up="fc1", down="fc2", activation="activation_fn"),
    "WhisperDecoderLayer": WHISPER,
    "WhisperEncoderLayer": WHISPER_ENCODER,
}


@dataclass(frozen=True)
class Dense:
    """A dense feed-forward network, read: `act(x w1 + b1) w2 + b2`, gated `(act(x w1 + b1) * (x w3 + b3)) w2 + b2`.

    Weights are views of its own: w1, w3 `(d, h)`, w2 `(h, d)`, b1, b3 `(h,)`, b2 `(d,)`.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    b3: Tensor | None
    activation: nn.Module
    output_dropout: nn.Module | None

    @property
    def dim(self) -> int:
        return self.w1.shape[0]

    @property
    def hidden_dim(self) -> int:
        return self.w1.shape[1]

    def weights(self) -> dict[str, Tensor]:
        """Those that are there, by the names that experts give them."""
        found = {name: getattr(self, name) for name in ("w1", "w2", "w3", "b1", "b2", "b3")}
        return {name: weight for name, weight in found.items() if weight is not None}


def read_dense(module: nn.Module, adapter: Adapter) -> Dense:
    """Read a network by its adapter.

    Raises:
        TypeError: a part is no plain linear layer, as after quantisation or under a LoRA adapter.
    """
    w2, b2 = read_linear(module, adapter.down)
    w3 = b3 = None
    w1, b1 = read_linear(module, adapter.up)
    if adapter.gate == adapter.up:
        (w1, w3), (b1, b3) = w1.chunk(2, dim=-1), (None, None) if b1 is None else b1.chunk(2)
    elif adapter.gate is not None:
        (w3, b3), (w1, b1) = (w1, b1), read_linear(module, adapter.gate)
    biases = [b1, b2] if adapter.gate is None else [b1, b2, b3]
    if len({bias is None for bias in biases}) != 1:
        raise TypeError(f"{type(module).__name__} has a bias in some of its linear layers only: that has no experts")
    activation = read_activation(part(module, adapter.activation))
    dropout = 0.0 if adapter.hidden_dropout is None else part(module, adapter.hidden_dropout)
    dropout = nn.Dropout(dropout) if isinstance(dropout, float | int) else dropout
    if dropout.p:
        activation = nn.Sequential(activation, dropout)  # of a gated network too: a factor is a factor
    outer = None if adapter.output_dropout is None else part(module, adapter.output_dropout)
    return Dense(w1, w2, w3, b1, b2, b3, activation, outer)


def read_linear(module: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight `(in, out)` and bias of a linear layer, or of GPT-2's `Conv1D`, which is one that keeps it so."""
    linear = part(module, path)
    if type(linear) is Conv1D:
        return linear.weight.detach(), linear.bias.detach()
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"{path} of {type(module).__name__} is {type(linear).__name__}, not nn.Linear: replace feed-forward "
            "networks before a model is quantised, sharded or given adapters"
        )
    return linear.weight.detach().T, None if linear.bias is None else linear.bias.detach()


def part(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


#: activations of `transformers` that torch has too, for which the experts have fast ways
OF_TORCH = {
    "GELUActivation": nn.GELU,
    "GELUTanh": lambda: nn.GELU("tanh"),
    "NewGELUActivation": lambda: nn.GELU("tanh"),
    "SiLUActivation": nn.SiLU,
}


def read_activation(activation: Any) -> nn.Module:
    """The module torch has for it, else itself."""
    make = OF_TORCH.get(type(activation).__name__)
    return make_activation(activation) if make is None else make()
