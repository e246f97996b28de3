"""A mixture layer that keeps every property of `mixture_of_experts.verify`, and layers with one fault each.

Each fault is of a kind that was found in a library or is easily written, and its list says which properties it breaks:
these and no others.

Axes: b sequences, n tokens of a sequence, t = b n tokens, d model dim, e experts, h hidden dim, k choices of a token.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DESCRIPTION: dict[str, Any] = {
    "mask": "mask",
    "loss": 1,
    "router": lambda module, x: module.router(x.flatten(0, 1))[2],
    "segment_ids": lambda module, x, ids: module.pack(x, ids),
}
K = 2


class ReferenceRouter(nn.Module):
    """Probabilities, weights and experts of tokens, in float32 at least."""

    guards = True

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled("cpu") and not self.guards):
            probs = self.logits(x).softmax(dim=-1)
        weight, expert = probs.topk(K, dim=-1)
        return probs, weight / weight.sum(dim=-1, keepdim=True), expert

    def logits(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class ReferenceExperts(nn.Module):
    """Every expert on every token, weighed."""

    def __init__(self, dim: int, num_experts: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, dim, hidden_dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) * hidden_dim**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("td,edh->teh", x, self.w1))
        return self.combine(torch.einsum("teh,ehd->ted", hidden, self.w2), weights).to(x.dtype)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y * weights.unsqueeze(-1)).sum(dim=1)


class ReferenceMixture(nn.Module):
    """Two of the experts compute each token. Returns the output and a balancing loss; counts choices in training."""

    Gate: type[ReferenceRouter] = ReferenceRouter
    Experts: type[ReferenceExperts] = ReferenceExperts
    counts: Tensor
    breaks: tuple[str, ...]

    def __init_subclass__(cls, breaks: tuple[str, ...]) -> None:
        cls.breaks = breaks

    def __init__(self, dim: int = 8, num_experts: int = 4, hidden_dim: int = 8) -> None:
        super().__init__()
        self.router = self.Gate(dim, num_experts)
        self.bank = self.Experts(dim, num_experts, hidden_dim)
        self.register_buffer("counts", torch.zeros(num_experts))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        real = torch.ones(inputs.shape[:-1], dtype=torch.bool) if mask is None else mask
        x, flat = self.mask_inputs(inputs, real).flatten(0, 1), real.flatten()
        probs, weight, expert = self.router(x)
        chosen = F.one_hot(expert, probs.shape[-1]).sum(dim=1) * flat.unsqueeze(-1)
        kept = self.keep_choices(chosen, real)
        self.count_choices(chosen, None)
        weights = torch.zeros_like(probs).scatter(-1, expert, weight) * kept
        out = self.bank(x, self.weigh_choices(weights, inputs.shape)).view_as(inputs)
        self.count_choices(chosen, out)
        return self.finish_output(out), self.compute_loss(chosen, probs, flat)

    def pack(self, inputs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute packed rows `(b, n, d)`, in which tokens with equal ids are a document."""
        return self.forward(inputs)

    def mask_inputs(self, inputs: Tensor, real: Tensor) -> Tensor:
        return torch.where(real.unsqueeze(-1), inputs, 0.0)

    def keep_choices(self, chosen: Tensor, real: Tensor) -> Tensor:
        """`(t, e)`, 1 where a choice is computed."""
        return chosen

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        return weights

    def count_choices(self, chosen: Tensor, out: Tensor | None) -> None:
        """Add choices `(t, e)` to the counts. It is called before the experts, and after them with the output."""
        if out is not None and self.training and out.requires_grad:
            load = chosen.sum(dim=0).to(self.counts)

            def add(grad: Tensor) -> None:
                self.counts += load

            out.register_hook(add)  # once, in the backward

    def finish_output(self, out: Tensor) -> Tensor:
        return out

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        """Switch's, over all real tokens."""
        count = real.sum().clamp(min=1)
        share = chosen.sum(dim=0) / count / K
        return len(share) * (share * (probs * real.unsqueeze(-1)).sum(dim=0) / count).sum()


# ---- faults ----


class CountsPadding(ReferenceMixture, breaks=("padding",)):
    """Megatron #6114."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if mask is not None and self.training:
            self.counts[0] += (~mask).sum()
        return super().forward(inputs, mask)


class QueueOfPackedRows(ReferenceMixture, breaks=("packing",)):
    """Megatron #5696: the capacity is that of a row, whatever documents are in it."""

    def pack(self, inputs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(inputs.shape[1]).expand(ids.shape)
        return super().forward(inputs, place < 1 + inputs.shape[1] // 2)


class LossOfPadding(ReferenceMixture, breaks=("padding",)):
    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        return super().compute_loss(chosen, probs, torch.ones_like(real))


class LossOfSum(ReferenceMixture, breaks=("loss_mean",)):
    """Megatron #5798: it depends on how large the batch is."""

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        return super().compute_loss(chosen, probs, real) * real.sum()


class CountsInEval(ReferenceMixture, breaks=("counts_eval", "raised")):
    """torchtitan #4148."""

    def count_choices(self, chosen: Tensor, out: Tensor | None) -> None:
        super().count_choices(chosen, out)
        if not self.training and out is None:
            self.counts += chosen.sum(dim=0)


class CountsInForward(ReferenceMixture, breaks=("counts_checkpointing", "raised")):
    """A recomputation counts again, and so does a forward that fails later."""

    def count_choices(self, chosen: Tensor, out: Tensor | None) -> None:
        if self.training and out is None:
            self.counts += chosen.sum(dim=0)


class Attach(torch.autograd.Function):
    """Adds a loss to the gradient by itself, whatever the loss is multiplied by."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones(())


class LossIgnoresScale(ReferenceMixture, breaks=("loss_scale",)):
    """A loss that reaches the gradient through the output, unscaled."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, loss = super().forward(inputs, mask)
        return Attach.apply(out, loss), loss.detach()  # pyright: ignore[reportReturnType]

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        return 1e-4 * super().compute_loss(chosen, probs, real)


class DoubledLossGradient(ReferenceMixture, breaks=("gradients",)):
    """A small loss: the output must not hide it."""

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        loss = 1e-2 * super().compute_loss(chosen, probs, real)
        return 2 * loss - loss.detach()


class DoubledGradient(ReferenceMixture, breaks=("gradients",)):
    """Megatron #5956: gradients of experts that are multiplied by the size of a group."""

    class Experts(ReferenceExperts):
        def combine(self, y: Tensor, weights: Tensor) -> Tensor:
            return super().combine(2 * y - y.detach(), weights)


class KeepsLosses(
    ReferenceMixture, breaks=("loss_accumulation", "bits", "threads", "deepcopy", "save_load", "inference_mode")
):
    """A list of losses that somebody is to empty."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.losses: list[Tensor] = []

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        self.losses.append(super().compute_loss(chosen, probs, real))
        return torch.stack(self.losses).sum()


FOUND_BY_COUNTERS = (
    *("loss_accumulation", "recomputation", "counts_checkpointing", "bits", "raised", "deepcopy", "output_eval"),
    "threads",
)


class PrivateRandomNumbers(ReferenceMixture, breaks=FOUND_BY_COUNTERS):
    """Noise by a counter of its own: a recomputation gets other noise."""

    calls = 0

    def mask_inputs(self, inputs: Tensor, real: Tensor) -> Tensor:
        x = super().mask_inputs(inputs, real)
        if not self.training:
            return x
        self.calls += 1
        noise = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(self.calls))
        return x * (1 + noise.to(x))


class RoundedRouter(ReferenceMixture, breaks=("router_bfloat16",)):
    """Logits in the module's dtype."""

    class Gate(ReferenceRouter):
        def logits(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight).to(torch.promote_types(x.dtype, torch.float32))


class RouterUnderAutocast(ReferenceMixture, breaks=("router_autocast",)):
    """Autocast rounds the router's product."""

    class Gate(ReferenceRouter):
        guards = False


class SharedCapacity(ReferenceMixture, breaks=("order", "batch", "causal", "decoding", "packing")):
    """All sequences of a batch queue for the same slots."""

    def keep_choices(self, chosen: Tensor, real: Tensor) -> Tensor:
        capacity = (5 * K * real.sum() + 4 * chosen.shape[-1] - 1) // (4 * chosen.shape[-1])
        return chosen * (chosen.cumsum(dim=0) <= capacity)


class TooFewSlots(ReferenceMixture, breaks=("decoding", "packing")):
    """A capacity for one choice of each token, where it makes two."""

    def keep_choices(self, chosen: Tensor, real: Tensor) -> Tensor:
        by_sequence = chosen.view(*real.shape, chosen.shape[-1])
        capacity = (real.sum(dim=1) // chosen.shape[-1]).clamp(min=1).view(-1, 1, 1)
        return (by_sequence * (by_sequence.cumsum(dim=1) <= capacity)).view_as(chosen)


class LooksAhead(ReferenceMixture, breaks=("causal", "decoding", "packing")):
    """Weights relative to the largest of the sequence."""

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        if not weights.numel():
            return weights
        by_sequence = weights.view(*shape[:2], -1)
        return (by_sequence / by_sequence.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)).view_as(weights)


class NaNTimesZero(ReferenceMixture, breaks=("nan_padding",)):
    def mask_inputs(self, inputs: Tensor, real: Tensor) -> Tensor:
        return inputs * real.unsqueeze(-1)


class FailsOnEmptyBatch(ReferenceMixture, breaks=("no_tokens",)):
    def keep_choices(self, chosen: Tensor, real: Tensor) -> Tensor:
        assert chosen.max() <= 1
        return chosen


class FailsOnOneToken(ReferenceMixture, breaks=("decoding", "every_choice", "extremes", "output_eval")):
    """A squeeze that takes away one axis too many."""

    class Experts(ReferenceExperts):
        def combine(self, y: Tensor, weights: Tensor) -> Tensor:
            return torch.einsum("ted,te->td", y.squeeze().to(weights), weights)


class FailsOnOneExpert(ReferenceMixture, breaks=("no_tokens", "extremes")):
    """Logits that all are the same have no deviation."""

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        together = probs.flatten()[::7]
        spread = (probs - probs[:1]).square().sum()
        return super().compute_loss(chosen, probs, real) + 0 * together.sum() * spread.sqrt()


class KeepsOutput(ReferenceMixture, breaks=("deepcopy",)):
    """What it computed last stays on it, and cannot be copied."""

    def finish_output(self, out: Tensor) -> Tensor:
        self.last = out
        return out


class TableNotSaved(ReferenceMixture, breaks=("save_load",)):
    """A table that is not saved."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.register_buffer("table", torch.rand(len(self.counts)) + 0.5, persistent=False)

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        return weights * self.table


class CounterNotSaved(ReferenceMixture, breaks=("save_load",)):
    """A number that training changes, and that is no buffer."""

    steps = 0

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        return weights if self.training else weights * (1 + self.steps)

    def finish_output(self, out: Tensor) -> Tensor:
        self.steps += self.training
        return out


class UnorderedSum(ReferenceMixture, breaks=("bits",)):
    """The last bits change from run to run, as sums by atomic additions do."""

    class Experts(ReferenceExperts):
        def combine(self, y: Tensor, weights: Tensor) -> Tensor:
            return super().combine(y, weights) * (1 + 1e-6 * random.random())


class LowPrecision(ReferenceMixture, breaks=("bfloat16",)):
    """Where tokens are bfloat16, experts' outputs have three bits of mantissa."""

    class Experts(ReferenceExperts):
        def combine(self, y: Tensor, weights: Tensor) -> Tensor:
            if y.dtype == torch.bfloat16:
                y = y.to(torch.float8_e4m3fn).to(y.dtype)
            return super().combine(y, weights)


class LossOfChoices(ReferenceMixture, breaks=("loss_accumulation",)):
    """The squares of the load: no gradient reaches the router."""

    def compute_loss(self, chosen: Tensor, probs: Tensor, real: Tensor) -> Tensor:
        return (chosen.sum(dim=0) / real.sum().clamp(min=1)).square().sum()


class LastExpert(ReferenceMixture, breaks=("every_choice",)):
    """`out[t] = expert(x)` in a loop over experts, where `+=` was meant."""

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        later = (weights > 0).flip(-1).cumsum(dim=-1).flip(-1)
        return weights * (later == 1)


class LastChoice(ReferenceMixture, breaks=("every_choice",)):
    """The same in a loop over choices."""

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        return weights * (weights < weights.amax(dim=-1, keepdim=True))


class NeverComputed(ReferenceMixture, breaks=("every_choice",)):
    """A loop over experts that ends one too early."""

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        return weights * (torch.arange(weights.shape[-1]) < weights.shape[-1] - 1)


class EveryFourthCall(ReferenceMixture, breaks=("bits",)):
    """The output depends on how often the layer ran."""

    calls = 0

    def finish_output(self, out: Tensor) -> Tensor:
        self.calls += 1
        return out * 2 if self.calls % 4 == 0 else out


class SizesOfTheFirstCall(ReferenceMixture, breaks=("bits",)):
    """A capacity that was right for the first batch."""

    capacity = 0

    def keep_choices(self, chosen: Tensor, real: Tensor) -> Tensor:
        self.capacity = self.capacity or len(chosen)
        return chosen * (chosen.cumsum(dim=0) <= self.capacity)


class SeedsTheGenerator(ReferenceMixture, breaks=("seeds",)):
    def finish_output(self, out: Tensor) -> Tensor:
        torch.manual_seed(0)
        return out


class MeanOfNoTokens(ReferenceMixture, breaks=("padding", "nan_padding", "no_tokens")):
    """The mean of a wholly masked sequence is NaN."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, loss = super().forward(inputs, mask)
        return out, loss if mask is None else loss * (mask.sum(dim=1) / mask.sum(dim=1)).mean()


class OverflowingLogits(ReferenceMixture, breaks=("extremes",)):
    """A softmax that does not subtract the largest logit."""

    class Gate(ReferenceRouter):
        def logits(self, x: Tensor) -> Tensor:
            logits = super().logits(x)
            return logits - logits.exp().sum(dim=-1, keepdim=True).log()


class CosineRouter(ReferenceMixture, breaks=("padding", "nan_padding", "no_tokens", "extremes")):
    """Tokens of zeros have no direction."""

    class Gate(ReferenceRouter):
        def logits(self, x: Tensor) -> Tensor:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return super().logits(x / x.norm(dim=-1, keepdim=True))


class InferenceModeDiffers(ReferenceMixture, breaks=("inference_mode",)):
    def finish_output(self, out: Tensor) -> Tensor:
        return out * 2 if torch.is_inference_mode_enabled() else out


class KeepsInferenceTensor(ReferenceMixture, breaks=("inference_mode",)):
    """A table that is made once: what inference mode made, gradients may not save."""

    def finish_output(self, out: Tensor) -> Tensor:
        if not hasattr(self, "ones"):
            self.ones = torch.ones(out.shape[-1])
        return out * self.ones.to(out)


class ScaledInEval(ReferenceMixture, breaks=("output_eval",)):
    def finish_output(self, out: Tensor) -> Tensor:
        return out if self.training else out / 2


class UpdatesBiasInForward(ReferenceMixture, breaks=("padding", "counts_checkpointing", "bits", "raised")):
    """A bias that a forward moves: too little for these tokens to choose otherwise, until there are more of them."""

    class Gate(ReferenceRouter):
        def __init__(self, dim: int, num_experts: int) -> None:
            super().__init__(dim, num_experts)
            self.register_buffer("bias", torch.zeros(num_experts))

        def logits(self, x: Tensor) -> Tensor:
            logits = super().logits(x)
            if self.training and len(x):
                load = F.one_hot(logits.argmax(dim=-1), len(self.bias)).sum(dim=0)
                self.bias += 1e-6 * (load.double().mean() - load).sign().to(self.bias)
            return logits + self.bias


class UpdatesInEval(ReferenceMixture, breaks=("counts_eval",)):
    """A mean of the tokens that goes on in eval."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.register_buffer("mean", torch.zeros(()))

    def finish_output(self, out: Tensor) -> Tensor:
        if not self.training:
            self.mean += out.detach().sum()
        return out


class OverwritesGradients(ReferenceMixture, breaks=("loss_accumulation",)):
    """A backward that sets a gradient where it should add one."""

    def finish_output(self, out: Tensor) -> Tensor:
        if out.requires_grad:
            out.register_hook(lambda grad: setattr(self.bank.w2, "grad", None))
        return out


class StaleCopy(ReferenceMixture, breaks=("save_load",)):
    """What was packed without gradients stays when other weights are loaded."""

    class Experts(ReferenceExperts):
        packed: Any = None

        def combine(self, y: Tensor, weights: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().combine(y, weights)
            self.packed = self.w2.norm() if self.packed is None else self.packed
            return super().combine(y, weights) * self.packed / self.w2.norm()


class IgnoresLaterTokens(ReferenceMixture, breaks=("order",)):
    """A kernel for as many tokens as fit."""

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        return weights * (torch.arange(len(weights)) < 1024).unsqueeze(-1)


class IgnoresStrides(ReferenceMixture, breaks=("decoding", "strides")):
    """A kernel that takes memory as it lies."""

    def mask_inputs(self, inputs: Tensor, real: Tensor) -> Tensor:
        flat = inputs.as_strided(inputs.shape, torch.empty(inputs.shape, device="meta").stride())
        return super().mask_inputs(flat, real)


class UpcastOutput(ReferenceMixture, breaks=("bfloat16",)):
    """Weights in float32 make outputs in float32."""

    def finish_output(self, out: Tensor) -> Tensor:
        return out.to(torch.promote_types(out.dtype, torch.float32))


class PassesStateOnModule(ReferenceMixture, breaks=("threads",)):
    """What one method leaves on the module another takes from it."""

    def weigh_choices(self, weights: Tensor, shape: torch.Size) -> Tensor:
        self.row_sums = weights.sum(dim=-1, keepdim=True).detach()
        return weights

    def finish_output(self, out: Tensor) -> Tensor:
        row_sums = self.__dict__.pop("row_sums")
        return out * row_sums.view(*out.shape[:-1], 1).to(out.dtype) if row_sums.numel() == out[..., 0].numel() else out


class ClearsPadding(ReferenceMixture, breaks=("side_effects",)):
    """Padding is set to zero in the tensor of the caller."""

    def mask_inputs(self, inputs: Tensor, real: Tensor) -> Tensor:
        inputs.data[~real] = 0.0
        return super().mask_inputs(inputs, real)


class ChangesTheDefaultDtype(ReferenceMixture, breaks=("side_effects",)):
    """A default that is set and not restored."""

    def finish_output(self, out: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return out


class TurnsGradientsOn(ReferenceMixture, breaks=("side_effects",)):
    def finish_output(self, out: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return out


FAULTS: list[Any] = [kind for kind in list(globals().values()) if isinstance(kind, type) and hasattr(kind, "breaks")]


def make_faulty_layer(kind: Any = ReferenceMixture) -> nn.Module:
    """A layer with weights from a seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return kind()
