"""Compare a dense language model with a mixture of experts on a GPU, at equal active parameters and training time.

    python examples/train_gpu.py --seconds 60                       # trains both, compiled, in bfloat16
    python examples/train_gpu.py --device cpu --eager --dim 64 --seconds 10

The program trains both models for the same time on the source code of Python's standard library. It prints the loss on
held-out files, in bits per byte, over the training time, which excludes compilation.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mixture_of_experts import GatedExperts, MoE, TopKGating


class Dense(nn.Module):
    """A gated feed-forward network that is as wide as k experts together."""

    def __init__(self, dim, width):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x)), x.new_zeros(())


def mixture(dim, width, experts=32, k=4):
    gate, made = TopKGating(dim, experts, k), GatedExperts(dim, experts, hidden_dim=width // k)
    return MoE(dim, gate=gate, experts=made)


class Block(nn.Module):
    def __init__(self, dim, heads, feed_forward):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.before, self.between, self.feed_forward = nn.LayerNorm(dim), nn.LayerNorm(dim), feed_forward

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        out, aux_loss = self.feed_forward(self.between(x))
        return x + out, aux_loss


class LanguageModel(nn.Module):
    def __init__(self, feed_forward, dim, depth, context):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, dim), nn.Parameter(torch.randn(context, dim) / 50)
        self.blocks = nn.ModuleList(Block(dim, dim // 32, feed_forward(dim, 4 * dim)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, text):
        x, total = self.embed(text[:, :-1]) + self.place, 0.0
        for block in self.blocks:
            x, aux_loss = block(x)
            total = total + aux_loss
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), total


def train(model, texts, arguments, together=10):
    device, context = arguments.device, arguments.context
    run = model if arguments.eager else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.rate, fused=device == "cuda")
    draw, window = torch.Generator().manual_seed(0), torch.arange(context + 1)

    def loss_on(text):
        windows = text[torch.randint(len(text) - context, (arguments.batch, 1), generator=draw) + window].long()
        with torch.autocast(device, torch.bfloat16):
            return run(windows.to(device))

    seconds, step, report = 0.0, 0, 0.0
    while seconds < arguments.seconds:
        before, step = time.perf_counter(), step + together
        cosine = 0.55 + 0.45 * math.cos(math.pi * seconds / arguments.seconds)
        optimizer.param_groups[0]["lr"] = arguments.rate * cosine * min(step / 100, 1.0)  # a warm-up, then cosine decay
        for _ in range(together):  # reading the clock waits for the GPU, so do it once for several steps
            loss, aux_loss = loss_on(texts[0])
            (loss + aux_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        seconds += time.perf_counter() - before if step > together else 0.0  # the first steps compile
        if seconds >= min(report, arguments.seconds):
            with torch.no_grad():
                model.eval()
                held_out = sum(loss_on(texts[1])[0].item() for _ in range(8)) / 8 / math.log(2)
            model.train()
            report = seconds + arguments.seconds / 6
            print(f"  {seconds:6.1f} s, step {step:5}: {held_out:.3f} bits a byte", flush=True)


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    for name, value in dict(seconds=60.0, rate=1e-3, dim=512, depth=6, context=512, batch=32).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args(given)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [file for place, file in enumerate(files) if place % 10], files[::10]
    texts = [torch.tensor(list(b"".join(map(Path.read_bytes, part))), dtype=torch.uint8) for part in parts]
    for name, feed_forward in {"dense": Dense, "mixture": mixture}.items():
        torch.manual_seed(0)
        model = LanguageModel(feed_forward, arguments.dim, arguments.depth, arguments.context).to(arguments.device)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
        train(model, texts, arguments)


if __name__ == "__main__":
    main()
