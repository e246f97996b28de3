"""Defines `Trial`, which combines a module with the tokens and mode of one measurement, and functions that compare
outcomes.

Axes: b (sequences), n (tokens per sequence), d (model dimension), e (experts), k (choices per token), w (weights).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts import HeirarchicalMoE, MoE
from mixture_of_experts.arguments import packing_unsupported_reason
from mixture_of_experts.dispatch.segments import SEGMENT_IDS
from mixture_of_experts.stats import routing_of

#: the results of a step: "output", "loss", "input gradient", "gradient of NAME", and "move of NAME" for buffers
Outcome = dict[str, Tensor]
TOKEN_TENSORS = ("output", "input gradient")  # tensors of an outcome that have one entry per token
RESULT_PREFIXES = (*TOKEN_TENSORS, "loss", "gradient")  # name prefixes of all tensors except buffer changes
RunFunction = Callable[..., Any]  # runs a function on tokens, for example with checkpointing or compilation
ROUNDING_LIMIT = 1e-4  # maximum difference due to rounding, relative to the largest absolute value of a tensor


class NotApplicableError(Exception):
    """Raised if a property does not apply to a module. The error message states the reason."""


class Deviation(NamedTuple):
    """A measured difference and its location."""

    value: float
    where: str = ""


Deviations = Iterator[Deviation]


class Case(NamedTuple):
    """The size and seed of a batch. Similar tokens request the same experts."""

    num_sequences: int
    num_tokens: int
    seed: int
    has_similar_tokens: bool = False

    def __str__(self) -> str:
        return (
            f"{self.num_sequences} x {self.num_tokens} tokens{' that are similar' * self.has_similar_tokens}, seed "
            f"{self.seed}"
        )


DEFAULT_CASE = Case(2, 16, 0)


@dataclass(frozen=True)
class Trial:
    """The configuration of one measurement. All runs use fresh copies of the module, never the module itself.

    Attributes:
        module, dim, mask, loss, router, segment_ids: see `verify`.
        case, training: the case that defines the tokens, and whether the module is in training mode.
        limit: the largest difference that counts as rounding error.
        deterministic_modes: the modes in which the module draws no random numbers. True means training mode, and False
            means eval mode.
    """

    module: nn.Module
    dim: int
    mask: Any = None
    loss: Any = None
    router: Any = None
    segment_ids: Any = None
    case: Case = DEFAULT_CASE
    training: bool = False
    limit: float = ROUNDING_LIMIT
    deterministic_modes: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return f"{self.case}, in {'training' if self.training else 'eval'}"

    def copy_module(self) -> nn.Module:
        """Return a copy of the module in the trial's mode."""
        return copy.deepcopy(self.module).train(self.training)

    def make_tokens(self, index: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw random tokens `(b, n, d)`, which differ for each `index`."""
        b, n, seed, alike = self.case
        generator = torch.Generator().manual_seed(seed + 100 * index)
        x = torch.randn(b, n, self.dim, generator=generator, dtype=torch.float32)  # regardless of the default dtype
        if alike:
            x = 0.4 * x + torch.randn(self.dim, generator=generator, dtype=torch.float32)
        tensors = (*self.module.parameters(), *self.module.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), x)
        return x.to(like.device, dtype or like.dtype)

    def forward(
        self,
        x: Tensor | None = None,
        mask: Tensor | None = None,
        module: nn.Module | None = None,
        run: RunFunction | None = None,
        seed: int = 0,
        segment_ids: Tensor | None = None,
    ) -> Outcome:
        """Return the output, reshaped to the shape of the tokens, and the loss if `self.loss` is set. In eval mode,
        gradients are enabled only if `x` requires them.

        Args:
            x, module: the tokens and the module to run. Default: the trial's tokens and a fresh copy of its module.
            mask: bool `(b, n)`, True for real tokens.
            segment_ids: int64 `(b, n)`, the document ids of packed rows.
        """
        x = self.make_tokens() if x is None else x
        module = self.copy_module() if module is None else module

        assert mask is None or segment_ids is None

        def call(x: Tensor) -> Any:
            for argument, value in ((self.segment_ids, segment_ids), (self.mask, mask)):
                if argument is not None and value is not None:
                    named = isinstance(argument, str)
                    return module(x, **{argument: value}) if named else argument(module, x, value)
            return module(x)

        torch.manual_seed(seed)
        with torch.set_grad_enabled(module.training or x.requires_grad):
            out = returned = call(x) if run is None else run(call, x)
        while not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple | list) else next(iter(dict(out).values()))
        found = {"output": out.reshape(x.shape)}
        if self.loss is None:
            return found
        loss: Any = self.loss(module, returned) if callable(self.loss) else returned[self.loss]
        return found if loss is None else found | {"loss": loss.sum()}

    def step(
        self,
        x: Tensor | None = None,
        mask: Tensor | None = None,
        module: nn.Module | None = None,
        run: RunFunction | None = None,
        loss_from: str = "both",
        scale: float = 1,
        segment_ids: Tensor | None = None,
    ) -> Outcome:
        """Run a forward and a backward pass. By default, the objective is the weighted output plus the loss. If
        `loss_from` is "output" or "loss", the objective is only the weighted output or only the loss. The objective is
        multiplied by `scale` for the backward pass, and the gradients are divided by `scale` afterwards."""
        module = self.copy_module() if module is None else module
        x = (self.make_tokens() if x is None else x).detach().requires_grad_()  # `detach` preserves strides
        found = self.forward(x, mask, module, run, segment_ids=segment_ids)
        # multiplied by 0 instead of omitted, because a loss may reach x through the output
        total = (found["output"] * make_output_weights(x, mask)).sum() * (loss_from != "loss")
        if "loss" in found and loss_from != "output":
            total = total + found["loss"]
        if total.requires_grad:
            (total * scale).backward()
        leaves = {f"gradient of {name}": p for name, p in module.named_parameters() if p.requires_grad}
        for name, leaf in ({"input gradient": x} | leaves).items():
            found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / scale
        return {name: tensor.detach() for name, tensor in found.items()} | self.measure_buffer_changes(module)

    def measure_buffer_changes(self, module: nn.Module) -> Outcome:
        """Return the differences between a module's buffers and those of the trial's module, which is never run."""
        found = {}
        for name, buffer in self.module.named_buffers():
            old, new = buffer.double(), module.get_buffer(name).double()
            found[f"move of {name}"] = torch.where(new == old, 0.0, new - old)  # both values may be infinite
        return found

    @torch.no_grad()
    def read_choices(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the experts of each token as sorted integers `(b, n, k)` or a bool tensor `(b, n, e)`."""
        torch.manual_seed(0)
        choices = self.router(module, x).reshape(*x.shape[:2], -1)
        return choices if choices.dtype == torch.bool else choices.sort(dim=-1).values

    def is_random(self) -> bool:
        """Return whether the results of a forward pass depend on random numbers."""
        # cases with many near-ties
        trials = [replace(self, case=case) for case in (Case(4, 48, 0), Case(3, 32, 5, True))]
        return any(
            compare_outcomes(trial.forward(seed=1), trial.forward(seed=2)).value > ROUNDING_LIMIT / 10
            for trial in trials
        )

    def estimate_rounding(self) -> float:
        """Return the second-order difference of the output when the inputs are scaled. The result is large only if the
        module computes in bfloat16. The 2% of tokens that differ most are ignored, because scaling may change their
        choices."""
        trial = replace(self, case=Case(4, 48, 0))
        a, b, c = (trial.forward(trial.make_tokens() * factor)["output"].double() for factor in (0.9999, 1, 1.0001))
        differences = ((a + c) / 2 - b).abs().amax(dim=-1).flatten()
        return (differences.quantile(0.98) / b.abs().max().clamp(min=1e-7)).item()


def infer_arguments(trial: Trial) -> Trial:
    """Infer a trial's missing arguments from its module."""
    module = trial.module
    if isinstance(module, MoE | HeirarchicalMoE):
        loss = 1 if trial.loss is None else trial.loss
        of_layer = {"mask": trial.mask or "mask", "segment_ids": trial.segment_ids or SEGMENT_IDS}
        trial = replace(trial, dim=trial.dim or module.dim, loss=loss, **of_layer)
    trial = replace(trial, dim=trial.dim or infer_width(trial))
    with suppress(ValueError):  # the module may have no supported gate
        if trial.router is None and len(routing_of(trial.copy_module(), trial.make_tokens())) == 1:
            trial = replace(trial, router=read_gate_choices)
    steady = tuple(training for training in (True, False) if not replace(trial, training=training).is_random())
    # rounding errors of modules do not exceed 0.05
    return replace(
        trial, deterministic_modes=steady, limit=min(max(ROUNDING_LIMIT, 4 * trial.estimate_rounding()), 0.05)
    )


def make_output_weights(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the weights that multiply the output in a step's objective. The weights depend only on the tokens, and are
    0 for padding."""
    weights = 1 + x.detach().flip(-1)
    return weights if mask is None else torch.where(mask.unsqueeze(-1), weights, 0.0)


def layer_packing_unsupported_reason(module: nn.Module) -> str | None:
    """Return the reason why a layer does not support packed rows. The result is None if the layer supports them, or if
    the module is not a layer of this package."""
    if not isinstance(module, MoE | HeirarchicalMoE):
        return None
    gates = [getattr(module, name) for name in module.gate_names]
    return packing_unsupported_reason(module.group_size, gates, module.experts)


def infer_width(trial: Trial) -> int:
    """Return the weight dimension that works as the module's input width. Raise a ValueError if no dimension or more
    than one dimension works."""
    found = []
    for size in sorted({size for parameter in trial.module.parameters() for size in parameter.shape if size > 1}):
        with suppress(Exception):
            replace(trial, dim=size).forward()
            found.append(size)
    if len(found) != 1:
        raise ValueError(
            f"cannot infer the token width of {type(trial.module).__name__} from the candidates {found}; pass dim="
        )
    return found[0]


def read_gate_choices(module: nn.Module, x: Tensor) -> Tensor:
    """Return a bool tensor `(..., n * e)` that marks the experts that compute each token. The module must have exactly
    one supported gate."""
    (routing,) = routing_of(module, x).values()
    cell = routing.token * routing.num_experts + routing.expert
    none = torch.zeros_like(routing.probs).flatten(-2)
    return none.scatter_add(-1, cell, routing.kept.to(none.dtype)) > 0


@torch.no_grad()
def compare_outcomes(
    found: Outcome, wanted: Outcome, names: str | tuple[str, ...] = "", context: str = ""
) -> Deviation:
    """Return the largest difference between two outcomes. Differences are relative to the largest absolute value of
    each tensor. The reference for a gradient is at least one thousandth of the largest gradient. A NaN difference
    counts as infinite.

    Args:
        found, wanted: the outcome to check and the expected outcome.
        names: name prefix, or tuple of prefixes, of the tensors to compare.
        context: text that is appended to the location of the deviation.
    """
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.numel()}
    grads = [tensor.abs().max().item() for name, tensor in wanted.items() if "gradient" in name]
    worst = Deviation(0.0)
    for name, tensor in wanted.items():
        if name.startswith(names):
            floor = max(1e-3 * max(grads), 1e-7) if "gradient" in name else 1e-7
            far = (found[name].to(tensor.dtype) - tensor).abs() / tensor.abs().max().clamp(min=floor)
            number = far.nan_to_num(torch.inf, torch.inf).max().item()
            worst = max(worst, Deviation(number, name + context))
    return worst


def count_non_finite(outcome: Outcome, context: str) -> Deviation:
    """Return how many tensors of an outcome contain non-finite values, and their names."""
    wrong = [name for name, tensor in outcome.items() if not tensor.isfinite().all()]
    return Deviation(len(wrong), f"not finite: {', '.join(wrong)}{context}")
