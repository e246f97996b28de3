"""Train a vision transformer with expert choice: each expert selects patches, so an empty patch may get no expert.

    python examples/train_vision.py                # about a minute on a CPU
    python examples/train_vision.py --steps 1000

The program generates the pictures, so it needs no data: each shows a digit of a small font at a random position on
16 x 16 noisy pixels. Expert choice uses the whole picture, which is allowed in a classifier.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import ExpertChoiceGating, MoE
from mixture_of_experts.stats import track_routing

FONT = """
111 010 111 111 101 111 111 111 111 111
101 110 001 001 101 100 100 001 101 101
101 010 111 111 111 111 111 001 111 111
101 010 100 001 001 001 101 001 101 001
111 111 111 111 001 111 111 001 111 111
"""
GLYPHS = torch.tensor([[[int(bit) for bit in glyph] for glyph in row.split()] for row in FONT.split("\n")[1:-1]])
GLYPHS = GLYPHS.permute(1, 0, 2).float()  # (10, 5, 3)
SIDE, PATCH = 16, 4


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Generate pictures `(count, 16, 16)` and return them with their digits."""
    digits = torch.randint(10, (count,), generator=generator)
    image = 0.3 * torch.randn(count, SIDE, SIDE, generator=generator)
    glyphs = GLYPHS.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)  # 10 x 6 pixels
    places = torch.stack([torch.randint(SIDE - size, (count,), generator=generator) for size in (10, 6)], dim=1)
    for i, (digit, (y, x)) in enumerate(zip(digits.tolist(), places.tolist(), strict=True)):
        image[i, y : y + 10, x : x + 6] += glyphs[digit]
    return image, digits


class Block(nn.Module):
    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads=4, batch_first=True)
        self.moe = MoE(dim, gate=ExpertChoiceGating(dim, num_experts, capacity_factor=2.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.moe(self.moe_norm(x))[0]  # auxiliary loss is 0: expert choice balances the load


class VisionTransformer(nn.Module):
    def __init__(self, dim: int = 64, depth: int = 2, num_experts: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, kernel_size=PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_experts) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image.unsqueeze(1)).flatten(2).mT + self.position  # (batch, 16 patches, dim)
        return self.head(self.blocks(x).mean(dim=1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for step in range(args.steps):
        image, digits = pictures(args.batch, generator)
        loss = F.cross_entropy(model(image), digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(args.steps // 8, 1) == 0:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)

    image, digits = pictures(1000, generator)  # not seen in training
    with torch.no_grad(), track_routing(model.eval()) as stats:
        right = (model(image).argmax(dim=-1) == digits).float().mean()
    print(f"accuracy on new pictures: {right:.1%}")
    for layer in stats.layers:
        print(f"{layer}: {stats.last(layer).unseen:.0%} of the patches went to no expert")


if __name__ == "__main__":
    main()
