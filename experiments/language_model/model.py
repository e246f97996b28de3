"""A small byte-level transformer language model whose feed-forward layers are dense or mixtures of experts.

Axes: b (sequences), n (bytes per sequence), d (model dim), h (heads), f (features per head).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import MoE

NUM_BYTES = 256


class FeedForward(nn.Module):
    """The dense twin of an MoE layer: a single expert, initialized like those of `Experts` and `GatedExperts`.

    It returns a pair like `MoE` does, with an auxiliary loss of 0, so blocks can use either.
    """

    def __init__(self, dim: int, hidden_dim: int, gated: bool = False):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(dim, hidden_dim)) if gated else None
        for weight in self.parameters():
            bound = math.sqrt(3 / weight.shape[0])  # standard deviation 1 / sqrt(fan in)
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(x @ self.w1) if self.w3 is None else F.silu(x @ self.w1) * (x @ self.w3)
        return hidden @ self.w2, x.new_zeros(())


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))  # (b, n, 3, h, f)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (b, h, n, f) each
        out = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A pre-norm transformer block. Its `ffn` is any module that returns (output, auxiliary loss), like `MoE`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.attention = Attention(dim, heads)
        self.ffn_norm = nn.LayerNorm(dim, bias=False)
        self.ffn: nn.Module

    def forward(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), rotation)
        out, aux_loss = self.ffn(self.ffn_norm(x))
        return x + out, aux_loss


class ByteLM(nn.Module):
    """Computes logits for the next byte at every position, and the sum of the layers' auxiliary losses.

    `make_ffn()` is called once for each layer, after all other parameters are initialized. With the same seed, models
    with different feed-forward layers therefore start with the same attention weights.
    """

    rotation: Tensor

    def __init__(self, make_ffn: Callable[[], nn.Module], *, dim: int, layers: int, heads: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_logits = nn.Linear(dim, NUM_BYTES, bias=False)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.zeros_(self.to_logits.weight)  # start at 8 bits per byte: all bytes are equally likely
        for block in self.blocks:
            block.ffn = make_ffn()
        self.register_buffer("rotation", rotation_table(context, dim // heads), persistent=False)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map bytes (b, n) int64 to logits (b, n, 256) and a 0-dim auxiliary loss."""
        rotation = self.rotation[:, : text.shape[1]]
        x, aux_losses = self.embed(text), []
        for block in self.blocks:
            x, aux_loss = block(x, rotation)
            aux_losses.append(aux_loss)
        return self.to_logits(self.norm(x)), torch.stack(aux_losses).sum()


def rotation_table(context: int, features: int) -> Tensor:
    """Return the cosine and sine of each position's angles: (2, context, features / 2)."""
    frequency = 10_000 ** -(torch.arange(0, features, 2) / features)
    angle = torch.arange(context)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of features in x (b, h, n, f) by the angles of their position."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def count_parameters(model: nn.Module, choices: int) -> tuple[int, int]:
    """Return the total parameters, and those active for a byte that is sent to `choices` experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            for parameter in layer.experts.parameters():  # experts are stacked along dimension 0
                num_experts = parameter.shape[0]
                idle += parameter.numel() // num_experts * (num_experts - choices)
    return total, total - idle
