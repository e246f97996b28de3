"""The GPT of `examples/gpt.py` by AdamW, and by Muon on its matrices and stacks of experts beside AdamW on the rest.

    python -m experiments.muon adamw=0.006 muon=0.012 --seeds 0 1 2  # 3 minutes of a core for each run
    python -m experiments.muon --times                               # of a step for 128 experts of 256 x 128

Muon is the recipe of docs/stacked_experts.md. Losses are means over the last 50 of 300 steps, in bits a byte.
"""

import argparse
import math
import re
import sysconfig
import time
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gpt

page, names = Path(__file__).parents[1] / "docs" / "stacked_experts.md", {}
exec(re.search(r"^```python\n([^`]*?^class Muon.*?)^moe = ", page.read_text(encoding="utf-8"), re.M | re.S)[1], names)
Muon = names["Muon"]


def train(name: str, rate: float, seed: int, text: torch.Tensor, steps: int = 300) -> float:
    torch.manual_seed(seed)
    model, bits, groups = gpt.GPT(dim=96, depth=3), [], {True: [], False: []}
    for path, parameter in model.named_parameters():
        groups[name == "muon" and bool(re.search(r"experts\.w|qkv|\.out\.", path))].append(parameter)
    used = [kind(groups[key], rate) for key, kind in ((True, Muon), (False, torch.optim.AdamW)) if groups[key]]
    used += [torch.optim.lr_scheduler.OneCycleLR(one, rate, steps, cycle_momentum=False) for one in used]
    for _ in range(steps):
        windows = text[torch.randint(len(text) - 128, (16, 1)) + torch.arange(129)]
        logits, aux_loss = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        model.zero_grad()
        (loss + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in used:
            each.step()
        bits.append(loss.item() / math.log(2))
    return sum(bits[-50:]) / 50


def times() -> None:
    stack = nn.Parameter(torch.randn(128, 256, 128))
    views = [nn.Parameter(matrix) for matrix in stack.data]
    for weight in (stack, *views):
        weight.grad = torch.randn_like(weight)
    for one in (Muon([stack]), torch.optim.Muon(views)):
        seconds = timeit.repeat(one.step, number=1, repeat=5, timer=time.process_time)
        print(f"{len(one.param_groups[0]['params'])} tensors: {sorted(seconds)[2]:.2f} s")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="an optimizer and its rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(map(Path.read_bytes, files))))
    for name, rate in (run.split("=") for run in options.runs):
        print(name, rate, *(f"{train(name, float(rate), seed, text):.3f}" for seed in options.seeds), flush=True)
    if options.times:
        times()


if __name__ == "__main__":
    main()
