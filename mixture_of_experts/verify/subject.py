"""`Subject`: a module under verification, and what a step of it computed.

Axes: b sequences, n tokens of a sequence, d model dim, e experts, k choices of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import HeirarchicalMoE, MoE
from mixture_of_experts.stats import routing_of

Outcome = dict[str, Tensor]  # what a step computed: "output", "loss", "counts", "gradient of NAME"
Run = Callable[..., Any]  # calls a function with tensors: as it is, checkpointed, compiled, ...
MODES = {True: "training", False: "eval"}
COUNTS = ("expert_counts", "choice_counts")  # buffers of our gates
INPUTS = "the inputs"
OF_TOKENS = ("output", f"gradient of {INPUTS}")  # tensors of an outcome that have an entry for each token
LIMIT = 1e-4  # difference that is rounding, relative to the largest number of a tensor


class DoesNotApplyError(Exception):
    """Says why a property means nothing for a module."""


class Gap(NamedTuple):
    """A difference, and where it is."""

    number: float
    where: str = ""


class Case(NamedTuple):
    """Sizes and seed of a batch. Sample of a crowd are alike, so that they ask for the same experts."""

    sequences: int
    tokens: int
    seed: int
    crowd: bool = False

    def __str__(self) -> str:
        return f"{self.sequences} x {self.tokens} tokens{' that are alike' * self.crowd}, seed {self.seed}"


@dataclass(frozen=True)
class Sample:
    """Inputs `(b, n, d)`, the gradient of the outputs, and the mask `(b, n)`, True where a token is real."""

    x: Tensor
    cotangent: Tensor
    mask: Tensor | None = None

    def at(self, index: Any) -> Sample:
        """Some of the sequences, or some of the tokens of all sequences; without a mask."""
        return Sample(self.x[index], self.cotangent[index])

    def padded(self, real: Tensor, padding: float | None = None) -> Sample:
        """The same tokens where `real` `(b, m)` is True, and padding elsewhere: noise, or one number."""
        x = torch.randn(*real.shape, self.x.shape[-1], dtype=self.x.dtype).to(self.x) * 3
        x = x if padding is None else torch.full_like(x, padding)
        cotangent = torch.zeros_like(x)
        x[real], cotangent[real] = self.x.flatten(0, 1), self.cotangent.flatten(0, 1)
        return Sample(x, cotangent, real.to(x.device))


class Subject:
    """A module, and what is told about it. The module itself never runs: every measurement takes a fresh copy."""

    module: nn.Module
    told: dict[str, Any]
    limit: float
    like: Tensor
    dim: int
    draws: dict[bool, bool]

    def __init__(self, module: nn.Module, dim: int | None = None, **told: Any) -> None:
        self.module, self.told, self.limit = module, told, LIMIT
        tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
        self.like = tensors[0] if tensors else torch.zeros(())
        if isinstance(module, MoE | HeirarchicalMoE):
            counting = any(name.split(".")[-1] in COUNTS for name, _ in module.named_buffers())
            known = {"mask": "mask", "loss": 1, "counts": counted_by_gates if counting else None}
            told |= {what: how for what, how in known.items() if told.get(what) is None}
            dim = dim or module.dim
        self.dim = dim or self._find_dim()
        with suppress(ValueError):  # there is no gate that the package knows
            if told.get("router") is None and len(routing_of(self.fresh(False), self.sample(Case(1, 2, 0)).x)) == 1:
                told["router"] = chosen_by_gate
        self.draws = {training: self._draws(training) for training in MODES}
        self.limit = min(max(LIMIT, 4 * self._rounding()), 0.05)  # no module rounds more

    def fresh(self, training: bool) -> nn.Module:
        """A copy of the module, in one mode."""
        return copy.deepcopy(self.module).train(training)

    def sample(self, case: Case, dtype: torch.dtype | None = None) -> Sample:
        """The tokens of a case."""
        generator = torch.Generator().manual_seed(case.seed)
        x, cotangent = torch.randn(2, case.sequences, case.tokens, self.dim, generator=generator)
        if case.crowd:
            x = 0.4 * x + torch.randn(self.dim, generator=generator)
        return Sample(*(each.to(self.like.device, dtype or self.like.dtype) for each in (x, cotangent)))

    def call(self, module: nn.Module, sample: Sample, run: Run | None = None) -> Outcome:
        """The output, in the shape of the inputs, and the loss if it is told."""
        mask, tell, loss = sample.mask, self.told.get("mask"), self.told.get("loss")

        def forward(x: Tensor) -> Any:
            if mask is None or tell is None:
                return module(x)
            return module(x, **{tell: mask}) if isinstance(tell, str) else tell(module, x, mask)

        out = returned = forward(sample.x) if run is None else run(forward, sample.x)
        while not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple | list) else next(iter(dict(out).values()))
        if callable(loss):
            loss = loss(module, returned)
        elif loss is not None:
            loss = getattr(returned, loss) if isinstance(loss, str) else returned[loss]
        found = {"output": out.reshape(sample.x.shape)}
        return found | {"loss": loss.sum()} if isinstance(loss, Tensor) else found

    def counted(self, module: nn.Module) -> Outcome:
        """The counts of a module, if they are told."""
        tell = self.told.get("counts")
        return {} if tell is None else {"counts": module.get_buffer(tell) if isinstance(tell, str) else tell(module)}

    @torch.no_grad()
    def chosen(self, module: nn.Module, x: Tensor) -> Tensor:
        """`(b, n, e)` bool, the experts of each token; e is any number above the largest chosen."""
        torch.manual_seed(0)
        tell = self.told["router"]
        told = integers_of(module, tell, x) if isinstance(tell, str) else tell(module, x)
        told = told.reshape(*x.shape[:2], -1)  # -1 is no expert
        return told if told.dtype == torch.bool else nn.functional.one_hot(told + 1).sum(dim=-2)[..., 1:] > 0

    def _find_dim(self) -> int:
        found = []
        for size in sorted({size for parameter in self.module.parameters() for size in parameter.shape if size > 1}):
            self.dim = size
            with suppress(Exception):
                Trial(self, Case(2, 3, 0), training=False).forward()
                found.append(size)
        if len(found) != 1:
            raise ValueError(f"tokens of {type(self.module).__name__} could be {found} wide: give dim=")
        return found[0]

    def _draws(self, training: bool) -> bool:
        trials = [Trial(self, case, training) for case in (Case(4, 48, 0), Case(3, 32, 5, True))]  # many near a tie
        gaps = (gap(trial.forward(seed=seed), trial.forward()) for trial in trials for seed in (1, 2))
        return any(each.number > 1e-5 for each in gaps)

    def _rounding(self) -> float:
        """The second difference of the output along the inputs: large only of a module that computes in bfloat16."""
        trial = Trial(self, Case(2, 16, 0), training=False)
        sample, module = trial.sample(), trial.fresh()
        a, b, c = (trial.forward(replace(sample, x=sample.x * by), module)["output"] for by in (0.9999, 1, 1.0001))
        return gap({"output": (a + c) / 2}, {"output": b}).number


class Trial(NamedTuple):
    """A subject, a case and a mode: what one measurement is made of."""

    subject: Subject
    case: Case
    training: bool

    def __str__(self) -> str:
        return f"{self.case}, in {MODES[self.training]}"

    def sample(self, number: int = 0, dtype: torch.dtype | None = None) -> Sample:
        """The tokens of the case; others for another number."""
        return self.subject.sample(self.case._replace(seed=self.case.seed + 100 * number), dtype)

    def fresh(self) -> nn.Module:
        return self.subject.fresh(self.training)

    def forward(self, sample: Sample | None = None, module: nn.Module | None = None, seed: int = 0) -> Outcome:
        """A forward alone, of its sample and a fresh module unless others are given: output and loss; in eval without
        gradients."""
        module, sample = self.fresh() if module is None else module, sample or self.sample()
        torch.manual_seed(seed)
        with torch.set_grad_enabled(module.training):
            found = self.subject.call(module, sample)
        return {name: tensor.detach() for name, tensor in found.items()}

    def step(
        self,
        sample: Sample | None = None,
        module: nn.Module | None = None,
        run: Run | None = None,
        of: str = "all",
        scale: float = 1,
    ) -> Outcome:
        """A forward, and the backward of the output times the cotangent, plus the loss; or of "output" or "loss" alone.
        Returns output, loss, gradients of inputs and parameters, divided by `scale` again, and of "all" the counts."""
        module, sample = self.fresh() if module is None else module, sample or self.sample()
        x = sample.x.detach().requires_grad_()  # strides stay
        torch.manual_seed(0)
        found = self.subject.call(module, replace(sample, x=x), run)
        total = (found["output"] * sample.cotangent).sum()
        total = total * (of != "loss")  # a loss may reach its gradient through the output
        if "loss" in found and of != "output":
            total = total + found["loss"]
        if total.requires_grad:
            (total * scale).backward()
        leaves = {INPUTS: x} | {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, leaf in leaves.items():
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / scale
        counts = self.subject.counted(module) if of == "all" else {}
        return {name: tensor.detach().clone() for name, tensor in (found | counts).items()}


def counted_by_gates(module: nn.Module) -> Tensor:
    """What the gates of this package counted."""
    return torch.cat([b.flatten() for name, b in module.named_buffers() if name.split(".")[-1] in COUNTS])


def chosen_by_gate(module: nn.Module, x: Tensor) -> Tensor:
    """The experts that compute each token, by the one gate that the package knows in a module."""
    (routing,) = routing_of(module, x).values()
    return routing.dispatch_tensor().any(dim=-1)


def integers_of(module: nn.Module, path: str, x: Tensor) -> Tensor:
    """The tensor of integers that a submodule returns while the module computes `x`."""
    found: list[Any] = []
    module = copy.deepcopy(module)
    module.get_submodule(path).register_forward_hook(lambda router, inputs, output: found.append(output))
    module(x)
    values = found[0] if isinstance(found[0], tuple | list) else found
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_floating_point()]
    if len(tensors) != 1:
        raise ValueError(f"router={path!r} returned {len(tensors)} tensors of integers, not one: give a function")
    return tensors[0]


def in_checkpoint(reentrant: bool) -> Run:
    """Runs a function under activation checkpointing. The reentrant one takes tuples of tensors only."""

    def run(function: Run, x: Tensor) -> Any:
        made: list[Any] = []

        def flat(x: Tensor) -> Any:
            made[:] = [function(x)]
            return tuple(made[0].values()) if isinstance(made[0], dict) else made[0]

        out: Any = checkpoint(flat, x, use_reentrant=reentrant)
        kind = type(made[0])
        if isinstance(made[0], dict):
            return kind(**dict(zip(made[0], out, strict=True)))
        return kind(*out) if hasattr(kind, "_fields") else out

    return run


#: both kinds, by what is said where one of them differs
CHECKPOINTS = {f", use_reentrant={reentrant}": in_checkpoint(reentrant) for reentrant in (False, True)}


def without_tokens(outcome: Outcome) -> Outcome:
    """An outcome without what has an entry for each token."""
    return {name: tensor for name, tensor in outcome.items() if name not in OF_TOKENS}


def gap(found: Outcome, wanted: Outcome, of: str = "", how: str = "") -> Gap:
    """The largest difference of two outcomes, relative to the largest number of its tensor, or to a thousandth of the
    largest gradient; infinite if one is NaN.

    Args:
        of: compares only tensors whose names begin so.
        how: added to where the gap is.
    """
    grads = [tensor for name, tensor in wanted.items() if name.startswith("gradient") and tensor.numel()]
    largest, worst = max((grad.abs().max().item() for grad in grads), default=0.0), Gap(0.0)
    for name, tensor in wanted.items():
        if not name.startswith(of) or not tensor.numel():
            continue
        floor = max(1e-3 * largest if name.startswith("gradient") else 0.0, 1e-7)
        far = (found[name].to(tensor.dtype) - tensor).abs() / tensor.abs().max().clamp(min=floor)
        number = far.nan_to_num(torch.inf, torch.inf).max().item()
        if number > worst.number:
            worst = Gap(number, name + how)
    return worst
