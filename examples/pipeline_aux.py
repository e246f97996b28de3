"""A layer for pipeline parallelism that adds its auxiliary loss in the backward. See docs/distributed/trainers.md."""

import torch
from torch import nn


class AuxInBackward(nn.Module):
    """Returns only a layer's output. The backward adds the gradient of `scale * aux_loss`."""

    def __init__(self, moe, scale=1.0):
        super().__init__()
        self.moe, self.scale = moe, scale

    def forward(self, x, mask=None):
        out, aux_loss = self.moe(x, mask)
        return AddGradient.apply(out, aux_loss, self.scale)


class AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, aux_loss, scale):
        ctx.gradient = torch.full_like(aux_loss, scale)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.gradient, None
