"""GPTQ (arXiv 2210.17323): 4-bit experts whose rounding errors cancel on the tokens that they process.

python examples/gptq.py  # the error of a small layer's outputs, rounded to nearest and by GPTQ
"""

import copy

import torch

from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.unstack import UnstackedExperts, restack, unstack


@torch.no_grad()
def moments(model, batches, part=None):
    """XᵀX of the inputs of w1 (and w3) and w2 of each expert, for all experts of the model or of a part of it."""
    found, part = {}, model if part is None else part

    def add(key):
        def hook(layer, args):
            x = args[0].flatten(0, -2).float()
            found.setdefault(key, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.mT, x)

        return hook

    unstack(part)  # into linear layers: one for each expert, which gets the expert's tokens alone
    try:
        for stack, experts in part.named_modules():
            for i, expert in enumerate(experts if isinstance(experts, UnstackedExperts) else ()):
                for key in ("w1", "w2"):
                    getattr(expert, key).register_forward_pre_hook(add((stack, key, i)))
        for batch in batches:
            model(batch)
    finally:
        restack(part)
    return found


def gptq(moments, damping=0.01):
    """Return a function for `rounding=`. With XᵀX = LᵀL, the squared error of the outputs is |L (weight - rounded)|²;
    row i contains the errors of inputs up to i, and the rounded value of input i minimizes it."""

    def rounding(name, expert, weight):
        stack, _, key = name.rpartition(".")
        if not any(stack == known for known, *_ in moments):
            raise ValueError(f"{stack} has no moments: give quantize_experts the model, or the part, that moments got")
        moment = moments.get((stack, "w1" if key == "w3" else key, expert))
        if moment is None or not moment.any():
            return None  # no token came here
        low, high = weight.aminmax(dim=1, keepdim=True)
        step = ((high - low) / 15).bfloat16().float()  # as it is stored
        zero = (low + 8 * step).bfloat16().float()
        step[step == 0] = 1
        order = moment.diagonal().argsort(descending=True)  # large inputs first
        moment = moment[order][:, order].double()
        moment.diagonal().add_(damping * moment.diagonal().mean())
        lower = torch.linalg.cholesky(moment.flip(0, 1), upper=True).flip(0, 1)
        lower = (lower / lower.diagonal().unsqueeze(1)).float()
        weights, steps, zeros = (of.expand_as(weight).flatten(0, 1)[order] for of in (weight, step, zero))
        levels, errors = torch.empty_like(weights), torch.empty_like(weights)
        for i in range(len(order)):
            wanted = weights[i] + lower[i, :i] @ errors[:i]
            levels[i] = ((wanted - zeros[i]) / steps[i] + 8).round().clamp(0, 15)
            errors[i] = weights[i] - (levels[i] - 8) * steps[i] - zeros[i]
        return levels[order.argsort()].view_as(weight), step, zero

    return rounding


def main():
    torch.manual_seed(0)
    moe = MoE(dim=64, gate=TopKGating(64, num_experts=4), experts=GatedExperts(64, 4, 128)).eval().requires_grad_(False)
    texts = torch.randn(9, 200, 64).cumsum(dim=-1)  # neighboring inputs are correlated
    rounding, errors = gptq(moments(moe, texts[:8])), []
    for choose in (None, rounding):
        small = quantize_experts(copy.deepcopy(moe), bits=4, rounding=choose)
        errors.append((small(texts[8])[0] - moe(texts[8])[0]).norm())
    print(f"error on another text: {errors[0]:.2f} rounded to nearest, {errors[1]:.2f} by GPTQ")


if __name__ == "__main__":
    main()
