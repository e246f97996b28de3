"""Random configurations for the property tests: routers, experts, inputs, and each one's slow counterpart.

A `Router` or `Bank` (of experts) is a plain description that hypothesis can shrink. `build` makes the package's module
from it, in float64 and with weights from a seed; `reference` makes the slow counterpart *on the same parameters*, so
that gradients of both can be taken with respect to one list of tensors.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixture_of_experts import (
    ExpertChoiceGating,
    ExpertList,
    Experts,
    GatedExperts,
    NoisyTopKGating,
    Top2Gating,
    TopKGating,
)
from support import reference

settings.register_profile(
    "tests",
    derandomize=True,  # the same examples on every run: a failure is never news from another machine
    deadline=None,
    database=None,
    print_blob=False,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("tests")

ATOL = 1e-9  # float64, sums of some hundred terms
PRIORITIES = ("choice", "token", "score")
seeds = st.integers(0, 2**31 - 1)

# Hypothesis prefers what stands first and draws evenly from the rest, so the usual comes first and often, the
# degenerate last and once: most examples are then full of tokens, overflow and drops, and some are empty.
lengths = st.sampled_from([7, 9, 11, 8, 13, 10, 5, 12, 3, 2, 1, 0])
dims = st.sampled_from([3, 2, 4, 1])
expert_counts = st.sampled_from([4, 3, 5, 6, 2, 1])


# Random numbers


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


class RecordDraws(TorchFunctionMode):
    """Keeps what torch draws at random while it is active, in order."""

    NAMES = ("rand", "rand_like", "randn", "randn_like", "uniform_", "normal_")

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.NAMES:
            self.values.append(result.detach().clone())
        return result

    def take(self, router: Router, training: bool) -> dict[str, Tensor] | None:
        """The draws of the next gate that ran, by the name under which the reference knows them."""
        name = router.draws(training)
        return {name: self.values.pop(0)} if name else None


# Routers


@dataclass(frozen=True)
class Router:
    """A router: its kind, the package's arguments (without sizes), and how strongly the weights prefer expert 0."""

    kind: str  # top2, topk, noisy, expert_choice
    arguments: dict
    spread: float = 1.0

    def build(self, dim: int, num_experts: int, seed: int, outer: tuple[int, ...] = ()) -> nn.Module:
        kinds = {
            "top2": Top2Gating,
            "topk": TopKGating,
            "noisy": NoisyTopKGating,
            "expert_choice": ExpertChoiceGating,
        }
        extra = {} if self.kind == "expert_choice" else {"outer_expert_dims": outer}
        gate = kinds[self.kind](dim, num_experts, **self.arguments, **extra).double()
        gen = generator(seed)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(self.spread * normal(gen, *parameter.shape))
            if getattr(gate, "expert_bias", None) is not None:
                gate.expert_bias.copy_(0.3 * normal(gen, *gate.expert_bias.shape))
        return gate

    def reference(self, gate: nn.Module):
        """The slow router on this gate's parameters, in its mode."""
        mode = "train" if gate.training else "eval"
        given = {**DEFAULTS[self.kind], **self.arguments}
        if self.kind == "expert_choice":
            return reference.ExpertChoice(gate.w_gating, given["capacity_factor"])
        common = {
            "capacity_factor": given[f"capacity_factor_{mode}"],
            "min_expert_capacity": given["min_expert_capacity"],
            "priority": given["priority"],
        }
        if self.kind == "top2":
            return reference.Top2(
                gate.w_gating,
                policy=given[f"second_policy_{mode}"],
                threshold=given[f"second_threshold_{mode}"],
                eps=given["eps"],
                second_place_loss=given["second_place_loss"],
                **common,
            )
        if self.kind == "noisy":
            return reference.NoisyTopK(gate.w_gating, w_noise=gate.w_noise, k=given["k"], **common)
        names = ("k", "score", "normalize", "scale", "num_groups", "top_groups", "balance_over")
        bias = None if gate.expert_bias is None else gate.expert_bias.double()
        return reference.TopK(
            gate.w_gating, b_gating=gate.b_gating, expert_bias=bias, **{name: given[name] for name in names}, **common
        )

    def draws(self, training: bool) -> str | None:
        """What this router draws at random in this mode."""
        given = {**DEFAULTS[self.kind], **self.arguments}
        if self.kind == "top2" and given[f"second_policy_{'train' if training else 'eval'}"] == "random":
            return "uniforms"
        if self.kind == "topk" and training and given["jitter"]:
            return "jitter"
        return "noise" if self.kind == "noisy" and training else None


DEFAULTS = {
    "top2": {
        "eps": 1e-9,
        "second_policy_train": "random",
        "second_policy_eval": "random",
        "second_threshold_train": 0.2,
        "second_threshold_eval": 0.2,
        "capacity_factor_train": 1.25,
        "capacity_factor_eval": 2.0,
        "min_expert_capacity": 4,
        "second_place_loss": False,
        "priority": "choice",
    },
    "topk": {
        "k": 2,
        "score": "softmax",
        "normalize": None,
        "scale": 1.0,
        "jitter": 0.0,
        "capacity_factor_train": None,
        "capacity_factor_eval": None,
        "min_expert_capacity": 4,
        "priority": "choice",
        "num_groups": None,
        "top_groups": None,
        "balance_over": "group",
    },
    "noisy": {
        "k": 2,
        "capacity_factor_train": None,
        "capacity_factor_eval": None,
        "min_expert_capacity": 4,
        "priority": "choice",
    },
    "expert_choice": {"capacity_factor": 2.0},
}

# 0 makes every score equal; 1000 makes probabilities of exactly 0, so choices of weight 0
spreads = st.sampled_from([1.0, 0.3, 3.0, 2.0, 0.0, 1000.0])
factors = st.sampled_from([0.6, 1.0, 1.25, 2.0])


@st.composite
def capacities(draw, dropless: bool | None = None, priority: str | None = None) -> dict:
    """Capacity and priority arguments that token-choice routers share."""
    is_dropless = draw(st.booleans()) if dropless is None else dropless
    return {
        "capacity_factor_train": None if is_dropless else draw(factors),
        "capacity_factor_eval": None if is_dropless else draw(factors),
        "min_expert_capacity": draw(st.sampled_from([1, 1, 2, 4])),
        "priority": draw(st.sampled_from(PRIORITIES)) if priority is None else priority,
    }


@st.composite
def top2_routers(draw, policies=("all", "none", "threshold", "random"), **limits) -> Router:
    return Router(
        "top2",
        {
            "second_policy_train": draw(st.sampled_from(policies)),
            "second_policy_eval": draw(st.sampled_from(policies)),
            "second_threshold_train": draw(st.sampled_from([0.2, 0.45, 0.0])),
            "second_threshold_eval": draw(st.sampled_from([0.2, 0.45, 0.0])),
            "second_place_loss": draw(st.booleans()),
            **draw(capacities(**limits)),
        },
        draw(spreads),
    )


@st.composite
def topk_routers(draw, num_experts: int, jitter: bool = True, **limits) -> Router:
    groups = draw(st.sampled_from([None, *(g for g in range(1, num_experts + 1) if num_experts % g == 0)]))
    top_groups = None if groups is None else draw(st.integers(1, groups))
    open_experts = num_experts if groups is None else num_experts // groups * top_groups
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    return Router(
        "topk",
        {
            "k": draw(st.sampled_from(sorted(range(1, min(3, open_experts) + 1), key=lambda k: k != 2))),
            "score": score,
            "normalize": draw(st.sampled_from([None, True, False])),
            "scale": draw(st.sampled_from([1.0, 2.5])),
            "bias": draw(st.booleans()),
            "jitter": draw(st.sampled_from([0.0, 0.1])) if jitter else 0.0,
            "num_groups": groups,
            "top_groups": top_groups,
            "expert_bias": draw(st.booleans()),
            "balance_over": draw(st.sampled_from(["group", "batch"])),
            **draw(capacities(**limits)),
        },
        draw(spreads) if score == "softmax" else draw(st.sampled_from([1.0, 0.3, 3.0, 0.0])),
    )


@st.composite
def noisy_routers(draw, num_experts: int, **limits) -> Router:
    k = draw(st.sampled_from(sorted(range(1, min(4, num_experts)), key=lambda k: k != 2)))
    return Router("noisy", {"k": k, **draw(capacities(**limits))}, draw(st.sampled_from([1.0, 0.3])))


@st.composite
def expert_choice_routers(draw) -> Router:
    return Router("expert_choice", {"capacity_factor": draw(st.sampled_from([0.5, 1.0, 1.7, 2.0]))}, draw(spreads))


TOKEN_CHOICE = ("top2", "topk", "noisy")
ALL_POLICIES = ("all", "none", "threshold", "random")
QUIET = ("all", "none", "threshold")  # those that draw nothing


def routers(kind: str, num_experts: int, policies=ALL_POLICIES, **limits):
    """Routers of one kind; `limits` fix `dropless` or `priority` of a token-choice router."""
    if kind == "top2":
        return top2_routers(policies=policies, **limits)
    if kind == "topk":
        return topk_routers(num_experts, **limits)
    return noisy_routers(num_experts, **limits) if kind == "noisy" else expert_choice_routers()


def counts_for(kind: str, counts=expert_counts):
    """Numbers of experts that a kind of router can work with: the noisy one needs a next best."""
    return counts.filter(lambda e: e > 1) if kind == "noisy" else counts


# Tokens


@st.composite
def masks(draw, *shape: int) -> Tensor | None:
    """No mask, or any pattern of padding, fully masked groups included."""
    share = draw(st.sampled_from([None, 0.7, None, 0.9, None, 0.4, 0.8, 0.0]))
    if share is None:
        return None
    return torch.rand(shape, generator=generator(draw(seeds))) < share


@st.composite
def importances(draw, *shape: int) -> Tensor | None:
    if draw(st.booleans()):
        return None
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    return values[torch.randint(len(values), shape, generator=generator(draw(seeds)))]


def poisoned(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with NaN at the masked positions."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, torch.nan)


@dataclass
class Padded:
    """Sequences with padding strewn among their tokens, and the same without."""

    plain: Tensor  # (b, n, d) a leaf
    x: Tensor  # (b, n + padding, d) made from it, NaN in the padding
    mask: Tensor  # (b, n + padding)
    rows: Tensor  # (b, n) and
    positions: Tensor  # (b, n): where plain's tokens stand in x

    def tokens(self, values: Tensor) -> Tensor:
        """What belongs to the real tokens: (b, n + padding, ...) -> (b, n, ...)."""
        return values[self.rows, self.positions]


@st.composite
def padded_batches(draw, dim: int) -> Padded:
    b, n, padding = draw(st.sampled_from([2, 3, 1])), draw(lengths), draw(st.sampled_from([3, 1, 6]))
    gen = generator(draw(seeds))
    plain = normal(gen, b, n, dim).requires_grad_()
    return pad(plain, padding, gen)


def pad(plain: Tensor, padding: int, gen: torch.Generator) -> Padded:
    """Spread each row's tokens over `padding` more positions, in order."""
    b, n, dim = plain.shape
    shuffled = torch.rand(b, n + padding, generator=gen).argsort(dim=1)
    positions = shuffled[:, :n].sort(dim=1).values
    rows = torch.arange(b).unsqueeze(1).expand(b, n)
    x = torch.full((b, n + padding, dim), torch.nan, dtype=plain.dtype).index_put((rows, positions), plain)
    mask = torch.zeros(b, n + padding, dtype=torch.bool).index_put((rows, positions), torch.tensor(True))
    return Padded(plain, x, mask, rows, positions)


# Experts


class ScaledExperts(nn.Module):
    """A batched module of one's own: (*e, s, d) -> (*e, s, d)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + 0.5) * self.scale.unsqueeze(-2)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": torch.tanh,
    "tanh gelu": nn.GELU(approximate="tanh"),
}


@dataclass(frozen=True)
class Bank:
    """A bank of experts of one kind."""

    kind: str  # ffn, gated, list, custom
    bias: bool = False
    activation: str = "gelu"
    hidden_dim: int = 5

    def build(self, dim: int, num_experts: int | tuple[int, int], seed: int) -> nn.Module:
        sizes = num_experts if isinstance(num_experts, tuple) else (num_experts,)
        if self.kind == "ffn":
            experts = Experts(dim, num_experts, self.hidden_dim, ACTIVATIONS[self.activation], bias=self.bias)
        elif self.kind == "gated":
            experts = GatedExperts(dim, num_experts, self.hidden_dim, ACTIVATIONS[self.activation], bias=self.bias)
        elif self.kind == "list":
            experts = ExpertList(nn.Linear(dim, dim, bias=self.bias) for _ in range(torch.Size(sizes).numel()))
        else:
            experts = ScaledExperts(*sizes, dim)
        gen = generator(seed)
        with torch.no_grad():
            for parameter in experts.double().parameters():
                parameter.copy_(0.7 * normal(gen, *parameter.shape))
        return experts.double()

    def reference(self, experts: nn.Module, num_inner: int | None = None):
        """The same experts one token at a time; of two levels a list is indexed by outer · num_inner + inner."""
        act = ACTIVATIONS[self.activation]
        act = act() if isinstance(act, type) else act
        if self.kind == "ffn":
            return reference.feed_forward(experts.w1, experts.w2, act, experts.b1, experts.b2)
        if self.kind == "gated":
            weights, biases = (experts.w1, experts.w3, experts.w2), (experts.b1, experts.b3, experts.b2)
            return reference.gated_feed_forward(*weights, act, *biases)
        if self.kind == "list":
            single = reference.listed(experts)
            return single if num_inner is None else lambda pair, x: single(pair[0] * num_inner + pair[1], x)
        return lambda index, x: torch.tanh(x + 0.5) * experts.scale[index]


@st.composite
def banks(draw) -> Bank:
    kind = draw(st.sampled_from(["ffn", "gated", "list", "gated", "ffn", "custom"]))
    return Bank(kind, draw(st.booleans()), draw(st.sampled_from(sorted(ACTIVATIONS))))


# Comparing


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss, zeros where it does not depend on a tensor."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_same(got: Tensor, expected: Tensor, what: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=atol, msg=lambda text: f"{what}: {text}")


def assert_same_gradients(loss: Tensor, expected_loss: Tensor, tensors: dict[str, Tensor], atol: float = ATOL) -> None:
    """Both losses have the same gradients with respect to all these tensors."""
    found = gradients(loss, list(tensors.values()))
    expected = gradients(expected_loss, list(tensors.values()))
    for name, one, other in zip(tensors, found, expected, strict=True):
        assert_same(one, other, f"gradient of {name}", atol)


@contextmanager
def uneven_groups_allowed():
    """`group_size` warns when a length splits badly; here every length is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="group_size")
        yield
