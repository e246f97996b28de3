"""`Trial`: a module, and the tokens and the mode of one measurement; and what a step of it computed.

Axes: b sequences, n tokens of a sequence, d model dim, e experts, k choices of a token, w weights.
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
from mixture_of_experts.stats import routing_of

#: what a step computed: "output", "loss", "input gradient", "gradient of NAME", and "move of NAME" of a buffer
Outcome = dict[str, Tensor]
OF_TOKENS = ("output", "input gradient")  # tensors of an outcome that have an entry for each token
RESULTS = (*OF_TOKENS, "loss", "gradient")  # what tensors begin with that are no moves of buffers
Run = Callable[..., Any]  # calls a function with tokens: checkpointed, compiled, ...
LIMIT = 1e-4  # difference that is rounding, relative to the largest number of a tensor


class DoesNotApplyError(Exception):
    """Says why a property means nothing for a module."""


class Gap(NamedTuple):
    """A difference, and where it is."""

    number: float
    where: str = ""


Gaps = Iterator[Gap]


class Case(NamedTuple):
    """Sizes and seed of a batch. Tokens that are alike ask for the same experts."""

    sequences: int
    tokens: int
    seed: int
    alike: bool = False

    def __str__(self) -> str:
        return f"{self.sequences} x {self.tokens} tokens{' that are alike' * self.alike}, seed {self.seed}"


ONE = Case(2, 16, 0)


@dataclass(frozen=True)
class Trial:
    """What one measurement is made of. The module itself never runs: fresh copies of it do.

    Attributes:
        module, dim, mask, loss, router: as in `verify`.
        case, training: the tokens and the mode.
        limit: the largest difference that is rounding.
        steady: the modes in which the module draws no random numbers, True for training.
    """

    module: nn.Module
    dim: int
    mask: Any = None
    loss: Any = None
    router: Any = None
    case: Case = ONE
    training: bool = False
    limit: float = LIMIT
    steady: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return f"{self.case}, in {'training' if self.training else 'eval'}"

    def fresh(self) -> nn.Module:
        """A copy of the module, in the mode."""
        return copy.deepcopy(self.module).train(self.training)

    def x(self, number: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Tokens `(b, n, d)`; others for another number."""
        b, n, seed, alike = self.case
        generator = torch.Generator().manual_seed(seed + 100 * number)
        x = torch.randn(b, n, self.dim, generator=generator, dtype=torch.float32)  # whatever the default dtype is
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
        run: Run | None = None,
        seed: int = 0,
    ) -> Outcome:
        """The output, in the shape of the tokens, and the loss if it is told; in eval without gradients.

        Args:
            x, module: tokens and a fresh module of this trial unless others are given.
            mask: `(b, n)` bool, True where a token is real.
        """
        x = self.x() if x is None else x
        module = self.fresh() if module is None else module

        def call(x: Tensor) -> Any:
            if mask is None or self.mask is None:
                return module(x)
            return module(x, **{self.mask: mask}) if isinstance(self.mask, str) else self.mask(module, x, mask)

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
        run: Run | None = None,
        of: str = "both",
        scale: float = 1,
    ) -> Outcome:
        """A forward, and the backward of the weighed output, plus the loss; or of "output" or "loss" alone. Gradients
        are divided by `scale` again."""
        module = self.fresh() if module is None else module
        x = (self.x() if x is None else x).detach().requires_grad_()  # strides stay
        found = self.forward(x, mask, module, run)
        total = (found["output"] * weights_of(x, mask)).sum() * (of != "loss")  # a loss may reach x through it
        if "loss" in found and of != "output":
            total = total + found["loss"]
        if total.requires_grad:
            (total * scale).backward()
        leaves = {f"gradient of {name}": p for name, p in module.named_parameters() if p.requires_grad}
        for name, leaf in ({"input gradient": x} | leaves).items():
            found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / scale
        return {name: tensor.detach() for name, tensor in found.items()} | self.moves(module)

    def moves(self, module: nn.Module) -> Outcome:
        """How far the buffers of a module are from those of the module that never ran."""
        found = {}
        for name, buffer in self.module.named_buffers():
            old, new = buffer.double(), module.get_buffer(name).double()
            found[f"move of {name}"] = torch.where(new == old, 0.0, new - old)  # both may be infinite
        return found

    @torch.no_grad()
    def chosen(self, module: nn.Module, x: Tensor) -> Tensor:
        """The experts of each token: `(b, n, k)` integers in order, or `(b, n, e)` bool."""
        torch.manual_seed(0)
        told = self.router(module, x).reshape(*x.shape[:2], -1)
        return told if told.dtype == torch.bool else told.sort(dim=-1).values

    def draws(self) -> bool:
        """Whether what a forward returns depends on random numbers."""
        trials = [replace(self, case=case) for case in (Case(4, 48, 0), Case(3, 32, 5, True))]  # many are near a tie
        return any(gap(trial.forward(seed=1), trial.forward(seed=2)).number > LIMIT / 10 for trial in trials)

    def rounding(self) -> float:
        """The second difference of the output along the inputs: large only of a module that computes in bfloat16."""
        a, b, c = (self.forward(self.x() * by)["output"] for by in (0.9999, 1, 1.0001))
        return gap({"output": (a + c) / 2}, {"output": b}).number


def known(trial: Trial) -> Trial:
    """A trial, and what can be found out about its module."""
    module = trial.module
    if isinstance(module, MoE | HeirarchicalMoE):
        loss = 1 if trial.loss is None else trial.loss
        trial = replace(trial, dim=trial.dim or module.dim, mask=trial.mask or "mask", loss=loss)
    trial = replace(trial, dim=trial.dim or width_of(trial))
    with suppress(ValueError):  # there is no gate that the package knows
        if trial.router is None and len(routing_of(trial.fresh(), trial.x())) == 1:
            trial = replace(trial, router=chosen_by_gate)
    steady = tuple(training for training in (True, False) if not replace(trial, training=training).draws())
    return replace(trial, steady=steady, limit=min(max(LIMIT, 4 * trial.rounding()), 0.05))  # no module rounds more


def weights_of(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights of the outputs of tokens in what a step differentiates; they go with the tokens. None of padding."""
    weights = 1 + x.detach().flip(-1)
    return weights if mask is None else torch.where(mask.unsqueeze(-1), weights, 0.0)


def width_of(trial: Trial) -> int:
    """The one size of the weights with which the module runs."""
    found = []
    for size in sorted({size for parameter in trial.module.parameters() for size in parameter.shape if size > 1}):
        with suppress(Exception):
            replace(trial, dim=size).forward()
            found.append(size)
    if len(found) != 1:
        raise ValueError(f"tokens of {type(trial.module).__name__} could be {found} wide: give dim=")
    return found[0]


def chosen_by_gate(module: nn.Module, x: Tensor) -> Tensor:
    """`(..., n * e)` bool, the experts that compute each token, by the one gate that the package knows in a module."""
    (routing,) = routing_of(module, x).values()
    cell = routing.token * routing.num_experts + routing.expert
    none = torch.zeros_like(routing.probs).flatten(-2)
    return none.scatter_add(-1, cell, routing.kept.to(none.dtype)) > 0


@torch.no_grad()
def gap(found: Outcome, wanted: Outcome, of: str | tuple[str, ...] = "", how: str = "") -> Gap:
    """The largest difference of two outcomes, relative to the largest number of its tensor, or to a thousandth of the
    largest gradient; infinite if one is NaN.

    Args:
        of: compares only tensors whose names begin so.
        how: added to where the gap is.
    """
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.numel()}
    grads = [tensor.abs().max().item() for name, tensor in wanted.items() if "gradient" in name]
    worst = Gap(0.0)
    for name, tensor in wanted.items():
        if name.startswith(of):
            floor = max(1e-3 * max(grads), 1e-7) if "gradient" in name else 1e-7
            far = (found[name].to(tensor.dtype) - tensor).abs() / tensor.abs().max().clamp(min=floor)
            number = far.nan_to_num(torch.inf, torch.inf).max().item()
            worst = max(worst, Gap(number, name + how))
    return worst


def finite(outcome: Outcome, how: str) -> Gap:
    """How many tensors of an outcome are not finite, and which."""
    wrong = [name for name, tensor in outcome.items() if not tensor.isfinite().all()]
    return Gap(len(wrong), f"not finite: {', '.join(wrong)}{how}")
