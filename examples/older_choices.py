"""Route with earlier weights, which DeepSeek-V4 calls anticipatory routing (arXiv 2606.19348).

python examples/older_choices.py  # takes seconds

The weights from a few steps earlier choose the experts, and the current weights compute everything else. The choices
for each batch are recorded when it is fetched, and replayed at its training step.
"""

from collections import deque

import torch

from mixture_of_experts import MoE, TopKGating, balance_experts
from mixture_of_experts.replay import record_routing, replay_routing


def with_older_choices(model, batches, delay):
    """Yield each batch with the choices that the model made for it `delay` steps earlier."""
    waiting = deque()
    for batch in batches:
        with torch.no_grad(), record_routing(model) as records:
            model(batch)
        waiting.append((batch, records))
        if len(waiting) > delay:
            yield waiting.popleft()
    yield from waiting


def main(delay=3, steps=10):
    """Train a layer to reverse the features of each token, and return the losses."""
    moe, found = MoE(dim=32, gate=TopKGating(32, 8, expert_bias=True)), []
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    balance_experts(moe, optimizer)
    for batch, records in with_older_choices(moe, torch.randn(steps, 2, 16, 32), delay):
        with replay_routing(moe, records):
            out, aux_loss = moe(batch)
            loss = (out - batch.flip(-1)).square().mean()
            (loss + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    print(f"loss {found[0]:.3f} in the first step, {found[-1]:.3f} in the last")
    return found


if __name__ == "__main__":
    main()
