"""Who moves the expert bias: the bias of every gate in a model, once for each step of an optimizer.

Gates of this package count by themselves (`gating/expert_bias.py`). Blocks of `transformers` have a bias, frozen, and
experts that are given what was chosen; nothing of that package is imported.

Axes: t tokens, k choices of a token, e experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mixture_of_experts import under_way
from mixture_of_experts.checks import check_choice, check_number, check_process_group
from mixture_of_experts.gating import Gate
from mixture_of_experts.gating.expert_bias import count_in_backward, towards_mean
from mixture_of_experts.losses import global_sum
from mixture_of_experts.model_tokens import TokensAround, TokensReader, model_around
from mixture_of_experts.private_torch import ignore_in_ddp
from mixture_of_experts.under_way import CallUnderWay

#: what the bias of blocks of `transformers` is called
THEIRS = ("e_score_correction_bias", "expert_bias")

Rule = Literal["sign"]
#: from the loads `(..., e)` int64 and the rate to the step of the bias `(..., e)`
RULES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "sign": lambda load, rate: rate * towards_mean(load),  # arXiv 2408.15664
}


def balance_experts(
    model: nn.Module,
    optimizer: Optimizer,
    rule: Rule = "sign",
    rate: float = 1e-3,
    *,
    group: dist.ProcessGroup | None = None,
) -> ExpertBalancing:
    """Move the expert bias of every gate in `model` once after each step of `optimizer`.

    Gates are `TopKGating(expert_bias=True)`, and the blocks of `transformers` that have such a bias (DeepSeek-V3,
    GLM 4, Kimi, MiniMax-M2, Ernie 4.5, ...), whose attention mask tells which tokens are padding. It moves by the
    choices of all real tokens, before capacity, in training forwards whose backward ran since it moved last: those of
    all micro-batches, once each also under activation checkpointing. A step that a gradient scaler skips moves nothing;
    its choices count in the next one. The bias is in the state dict, and after a step nothing else is to be saved.

    Args:
        model: before DDP or `torch.compile` wrap it, so that DDP leaves the counts of each rank alone.
        optimizer: whose steps count, bare or wrapped by accelerate.
        rule: how loads move the bias. "sign": by `rate * sign(mean load - load)` (Wang 2024, arXiv 2408.15664).
        rate: of a step; `balancing.rate` can be set anew (DeepSeek-V3 ends with 0).
        group: the ranks that share a batch, over which loads are summed; by default all ranks if
            `torch.distributed` is initialised. Every one of them has to step.

    Returns:
        An object whose `remove()` ends it.

    Raises:
        ValueError: no gate has an expert bias, or an argument is not allowed.

    Example:
        >>> import torch
        >>> from mixture_of_experts import MoE, TopKGating, balance_experts
        >>> moe = MoE(dim=8, gate=TopKGating(8, num_experts=4, expert_bias=True))
        >>> optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        >>> balancing = balance_experts(moe, optimizer)
        >>> moe(torch.randn(2, 16, 8))[0].sum().backward()
        >>> optimizer.step()
        >>> bool((moe.gate.expert_bias.abs() <= 1e-3).all())
        True
    """
    check_choice("rule", rule, tuple(RULES))
    check_process_group("group", group)
    balancing = ExpertBalancing(model, rule, rate, group)
    leave_counts_alone(model)
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's, which has no hooks
        optimizer = inner
    balancing._hooks.callback(optimizer.register_step_post_hook(balancing._after_step).remove)
    return balancing


class ExpertBalancing:
    """The bias of all gates of a model, moved after each step of an optimizer."""

    def __init__(self, model: nn.Module, rule: Rule, rate: float, group: dist.ProcessGroup | None) -> None:
        self.rule = rule
        self.rate = rate
        self.group = group
        self._hooks = ExitStack()
        self._biases: list[Ours | Theirs] = [Ours(gate) for gate in gates_with_bias(model)]
        self._biases += find_theirs(model, self._hooks)
        if not self._biases:
            raise ValueError(
                f"no gate of {type(model).__name__} has an expert bias: build its gates with TopKGating(..., "
                "expert_bias=True)"
            )

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._rate = check_number("rate", value, at_least=0.0)

    def remove(self) -> None:
        """End it."""
        self._hooks.close()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # of a fused optimizer, which skips a step within it
        group = self.group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        for bias in self._biases:
            done = 1 if skipped is None else (skipped == 0).to(device=bias.counts.device, dtype=torch.int64)
            load = global_sum(bias.counts, group) * done
            bias.move(RULES[self.rule](load, self.rate))
            bias.counts.mul_(1 - done)


class Ours:
    """The bias of a gate of this package."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate

    @property
    def counts(self) -> Tensor:
        return self.gate.expert_counts

    def move(self, step: Tensor) -> None:
        self.gate.move_bias(step)


def gates_with_bias(model: nn.Module) -> list[Gate]:
    """The gates of this package that count for a bias."""
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    return [gate for gate in gates if getattr(gate, "expert_counts", None) is not None]


def leave_counts_alone(model: nn.Module) -> None:
    """Have `DistributedDataParallel` not copy the counts of the first rank to the others before a forward."""
    names = {name for name, _ in model.named_buffers() if name.rpartition(".")[2] == "expert_counts"}
    ignore_in_ddp(model, names)


# Blocks of transformers


class Theirs:
    """The bias of a block of `transformers`, and a hook on its experts that counts what they are given."""

    def __init__(self, name: str, bias: Tensor, reader: TokensOfCall) -> None:
        self.bias = bias
        self.reader = reader
        self.total = torch.zeros(bias.numel(), dtype=torch.int64, device=bias.device)
        if bias.dtype.itemsize < 4:
            warnings.warn(
                f"{name} is {bias.dtype}, in which small steps of a bias are lost: keep it in float32", stacklevel=4
            )

    @property
    def counts(self) -> Tensor:
        if self.total.device != self.bias.device:  # the model moved
            self.total = self.total.to(self.bias.device)
        return self.total

    def move(self, step: Tensor) -> None:
        self.bias.add_(step.view_as(self.bias).to(self.bias.dtype))

    def hook(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of experts, which are given hidden `(t, d)`, expert and weight `(t, k)`: the weights count
        when their gradient comes."""
        if not experts.training or not torch.is_grad_enabled():
            return None
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        expert, weight = given["top_k_index"], given["top_k_weights"]
        counted = self.reader.real(expert).unsqueeze(-1) & (expert >= 0) & (expert < self.bias.numel())
        load = torch.zeros_like(self.counts).scatter_add(
            0, torch.where(counted, expert, 0).flatten().to(torch.int64), counted.flatten().to(torch.int64)
        )
        weight = count_in_backward(weight, load, self.counts)
        if len(args) > 2:
            return (*args[:2], weight, *args[3:]), kwargs
        return args, {**kwargs, "top_k_weights": weight}


class TokensCall(CallUnderWay):
    """A forward of the model around experts."""

    def __init__(self, tokens: TokensAround) -> None:
        self.tokens = tokens


class TokensOfCall:
    """Which tokens are real, in the forward of a model that is under way."""

    def __init__(self, model: nn.Module) -> None:
        self.read = TokensReader(model)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        under_way.begin(TokensCall(self.read(args, kwargs)), self)

    def end(self, model: nn.Module, args: object, output: object) -> None:
        under_way.end(self)

    def real(self, expert: Tensor) -> Tensor:
        """`(t,)` bool for choices `(t, k)`."""
        call = under_way.current(self)
        mask = None if call is None else call.tokens.mask
        if mask is None or mask.numel() != expert.shape[0]:
            return torch.ones(expert.shape[0], dtype=torch.bool, device=expert.device)
        return mask.flatten().to(expert.device)


def find_theirs(model: nn.Module, hooks: ExitStack) -> Iterable[Theirs]:
    """The biases of blocks of `transformers`, each with a hook on its experts, which `hooks` removes."""
    modules, readers = dict(model.named_modules()), {}
    for name, module in modules.items():
        kind = next((kind for kind in THEIRS if isinstance(getattr(module, kind, None), Tensor)), None)
        if kind is None or isinstance(module, Gate):
            continue
        experts, path = experts_of(modules, name)
        around = model_around(model, path)
        if around not in readers:
            reader = readers[around] = TokensOfCall(around)
            hooks.callback(around.register_forward_pre_hook(reader.begin, with_kwargs=True).remove)
            hooks.callback(around.register_forward_hook(reader.end, always_call=True).remove)
        theirs = Theirs(f"{name}.{kind}", getattr(module, kind), readers[around])
        hooks.callback(experts.register_forward_pre_hook(theirs.hook, with_kwargs=True).remove)
        yield theirs


def experts_of(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The experts that a bias belongs to: those of the module that has it, or of a module around."""
    path = name
    for _ in range(3):
        at = f"{path}.experts".lstrip(".")
        if at in modules:
            return modules[at], at
        path = path.rpartition(".")[0]
    raise ValueError(f"{name} has a bias for choosing experts, but no experts stand beside it")
