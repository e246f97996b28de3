"""Muon for stacked expert weights: orthogonalizes the update of each matrix, for all experts at once.

python examples/muon.py  # trains a small layer for one step, with AdamW for its router
"""

import torch

from mixture_of_experts import MoE, TopKGating


def orthogonal(x):
    """Set the singular values of each matrix in x (..., p, q) near 1 with five Newton-Schulz steps.

    The result is scaled by 0.2 √max(p, q).
    """
    p, q = x.shape[-2:]
    y = (x if p <= q else x.mT).reshape(-1, min(p, q), max(p, q))
    y = y.to(torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, gram, y, beta=3.4445)
    return 0.2 * max(p, q) ** 0.5 * (y if p <= q else y.mT).reshape(x.shape)


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, fused=None):
        """In groups with `fused=1`, dimension 1 contains two matrices per expert: gate, then up."""
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, fused=fused))

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure and torch.enable_grad()(closure)()
        for group in self.param_groups:
            fused, momentum = group["fused"], group["momentum"]
            for weight in [weight for weight in group["params"] if weight.grad is not None]:
                if not self.state[weight]:
                    self.state[weight]["mean"] = torch.zeros_like(weight)
                mean = self.state[weight]["mean"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(mean, momentum)
                halves = [update] if fused is None else update.chunk(2, fused)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(torch.cat([orthogonal(half) for half in halves], fused or 0), alpha=group["lr"])
        return loss


def main():
    torch.manual_seed(0)
    moe = MoE(dim=64, hidden_dim=128, gate=TopKGating(64, num_experts=4, k=2))
    stacks = [p for name, p in moe.named_parameters() if name.startswith("experts.w")]  # plus attention matrices
    others = [p for name, p in moe.named_parameters() if not name.startswith("experts.w")]  # routers, embeddings, norms
    muon, adamw = Muon(stacks, lr=3e-3), torch.optim.AdamW(others, lr=3e-3)

    out, aux_loss = moe(torch.randn(2, 10, 64))
    (out.square().mean() + aux_loss).backward()
    before = moe.experts.w1.clone()
    muon.step(), adamw.step()
    change = (moe.experts.w1 - before).square().mean().sqrt().item()
    print(f"root mean square of the change of w1: {change:.5f}, at a learning rate of 0.003")


if __name__ == "__main__":
    main()
