"""GPTQ (arXiv 2210.17323): quantizes experts to 4 bits so that rounding errors cancel on the tokens they process.

python examples/gptq.py  # compares the output errors of rounding to nearest and GPTQ
"""

import copy

import torch

from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.unstack import UnstackedExperts, restack, unstack


@torch.no_grad()
def moments(model, batches, part=None):
    """Compute XᵀX for the inputs of each expert's w1 (and w3) and w2, in the whole model or in a part of it."""
    found, part = {}, model if part is None else part

    def add(key):
        def hook(layer, args):
            x = args[0].flatten(0, -2).float()
            found.setdefault(key, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.mT, x)

        return hook

    unstack(part)  # each expert gets its own linear layers, which receive only that expert's tokens
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
    """Return a function for `rounding=`.

    With XᵀX = LᵀL, the squared error of the outputs is |L (weight - rounded)|². Row i of the product contains the
    errors of inputs up to i, and the rounded value of input i minimizes this row.
    """

    def rounding(name, expert, weight):
        stack, _, key = name.rpartition(".")
        if not any(stack == known for known, *_ in moments):
            raise ValueError(f"{stack} has no moments: give quantize_experts the model, or the part, passed to moments")
        moment = moments.get((stack, "w1" if key == "w3" else key, expert))
        if moment is None or not moment.any():
            return None  # this expert received no tokens
        low, high = weight.aminmax(dim=1, keepdim=True)
        step = ((high - low) / 15).bfloat16().float()  # the stored precision
        zero = (low + 8 * step).bfloat16().float()
        step[step == 0] = 1
        order = moment.diagonal().argsort(descending=True)  # largest inputs first
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
