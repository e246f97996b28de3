"""A complete GPT whose feed-forward networks are dropless mixtures of experts, in seventy lines to copy.

    python examples/gpt.py                                  # two minutes on two CPU cores; uses a GPU if available
    python examples/gpt.py --steps 3000 --dim 256

The model learns to predict the bytes of Python's standard library, and then continues the first bytes.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mixture_of_experts import recipes


def apply_rotary(x):
    """Rotate each pair of features in x (b, h, n, f) by an angle that grows with its position (arXiv 2104.09864)."""
    places, pairs = torch.arange(x.shape[-2], device=x.device), torch.arange(0, x.shape[-1], 2, device=x.device)
    turn = torch.polar(torch.ones_like(places)[:, None].float(), places[:, None] * 10_000.0 ** (-pairs / x.shape[-1]))
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim, depth):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        # each byte uses two of eight SwiGLU experts; the load-balancing loss is scaled for the number of layers
        self.moe = recipes.mixtral(dim, num_experts=8, hidden_dim=2 * dim, layers=depth)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 32)).permute(2, 0, 3, 1, 4)  # heads of 32 features
        seen = F.scaled_dot_product_attention(apply_rotary(q), apply_rotary(k), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        out, aux_loss = self.moe(self.norm2(x))
        return x + out, aux_loss


class GPT(nn.Module):
    def __init__(self, dim, depth):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(256, dim), nn.ModuleList(Block(dim, depth) for _ in range(depth))
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False))

    def forward(self, text):
        x, aux_losses = self.embed(text), []
        for block in self.blocks:
            x, aux_loss = block(x)
            aux_losses.append(aux_loss)
        return self.head(x), sum(aux_losses)


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(steps=300, dim=96, depth=3, context=128, batch=16, rate=3e-3).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options, device = parser.parse_args(given), "cuda" if torch.cuda.is_available() else "cpu"
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(map(Path.read_bytes, files))), device=device)
    model = GPT(options.dim, options.depth).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text) - options.context, (options.batch, 1), device=device)
        windows = text[starts + torch.arange(options.context + 1, device=device)]
        logits, aux_loss = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        (loss + aux_loss).backward()  # the auxiliary loss balances the experts' loads
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    written = text[None, :40]
    with torch.no_grad():
        for _ in range(200):
            logits, _ = model.eval()(written[:, -options.context :])
            following = torch.multinomial((logits[:, -1] / 0.7).softmax(-1), num_samples=1)
            written = torch.cat((written, following), dim=1)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
