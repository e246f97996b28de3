"""Train a multi-gate mixture of experts on tabular data (MMoE, Ma et al. 2018): two tasks share experts, not gates.

    python examples/train_table.py                 # seconds on a CPU
    python examples/train_table.py --k 1           # sparse: each task sends a row to one expert

The program generates the table. Each row describes a shopper in one of four segments. Its two labels state whether the
shopper clicks and whether the shopper buys. Each segment has its own rules for computing the labels from the columns,
and the two tasks agree only in some segments. The baseline is a shared bottom: a single network for both tasks, with as
many parameters as the mixture.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixture_of_experts import Experts, MoE, TopKGating

COLUMNS, SEGMENTS, TASKS = 16, 4, ("clicks", "buys")


def table(rows: int, rules: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Generate columns `(rows, 16)`, and labels `(rows, 2)` that follow the segments' `rules` `(4, 2, 16)`."""
    x = torch.randn(rows, COLUMNS, generator=generator)
    segment = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()  # two columns determine the segment
    score = torch.einsum("rtc,rc->rt", rules[segment], x)
    noise = 0.3 * torch.randn(rows, len(TASKS), generator=generator)
    return x, (score + noise > 0).float()


class MultiGate(nn.Module):
    """One layer for each task. All layers share the same experts."""

    def __init__(self, dim: int, num_experts: int, k: int) -> None:
        super().__init__()
        experts = Experts(COLUMNS, num_experts, hidden_dim=dim)
        gates = {task: TopKGating(COLUMNS, num_experts, k=k, bias=True) for task in TASKS}
        self.mixtures = nn.ModuleDict({task: MoE(COLUMNS, gate=gates[task], experts=experts) for task in TASKS})
        self.heads = nn.ModuleDict({task: nn.Linear(COLUMNS, 1) for task in TASKS})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, losses = [], []
        for task in TASKS:
            out, aux_loss = self.mixtures[task](x)  # a row is a token
            logits.append(self.heads[task](x + out))
            losses.append(aux_loss)
        return torch.cat(logits, dim=-1), torch.stack(losses).sum()


class SharedBottom(nn.Module):
    """One network for all tasks, with as many parameters as all experts together."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        hidden = num_experts * dim
        self.bottom = nn.Sequential(nn.Linear(COLUMNS, hidden), nn.GELU(), nn.Linear(hidden, COLUMNS))
        self.head = nn.Linear(COLUMNS, len(TASKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x + self.bottom(x)), x.new_zeros(())


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,), generator=generator)
        logits, aux_loss = model(x[rows])
        loss = F.binary_cross_entropy_with_logits(logits, y[rows]) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=4000, help="number of training rows")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, help="experts per row for each task; default: all, as published")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    rules = torch.randn(SEGMENTS, len(TASKS), COLUMNS, generator=generator)
    rules[:2, 1] = rules[:2, 0]  # in two segments, shoppers who click also buy
    x, y = table(args.rows, rules, generator)
    new_x, new_y = table(10_000, rules, generator)

    torch.manual_seed(args.seed)
    mixture = MultiGate(16, args.experts, args.k or args.experts)
    for name, model in (("shared bottom", SharedBottom(16, args.experts)), ("mixture", mixture)):
        train(model, x, y, args.steps, torch.Generator().manual_seed(args.seed))
        with torch.no_grad():
            right = ((model.eval()(new_x)[0] > 0) == (new_y > 0)).float().mean(dim=0).tolist()
        count = sum(parameter.numel() for parameter in model.parameters())
        told = ", ".join(f"{task} {share:.1%}" for task, share in zip(TASKS, right, strict=True))
        print(f"{name:14} {count:6,} parameters, accuracy on new rows: {told}")

    for task, layer in mixture.mixtures.items():  # which experts each task uses
        weights = torch.zeros(args.experts).index_add(0, (told := layer.gate(new_x[None])).expert[0], told.weight[0])
        print(f"{task:7}", " ".join(f"{share:.0%}" for share in (weights / weights.sum()).tolist()))


if __name__ == "__main__":
    main()
