"""The matrix: any layer on any path, drawn as one `Configuration`, and held to the slow reference.

    layer        one level or two, of any routers, or a recipe; group_size, shared expert, losses
    experts      Experts, GatedExperts, a list, a batched module of one's own, a subclass of RoutedExperts, and those
                 around others
    call         shape, mask, side inputs, mode, activation checkpointing, frozen parts
    computation  dtype or autocast, way of `ops`, eager or compiled or exported

A configuration is plain values: hypothesis shrinks it, and its repr is all that is needed to run it again. What is
not possible is drawn too. Then the layer has to refuse it by an error of its own, which `refusal` foretells.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import HeirarchicalMoE, MoE, ops, recipes

from . import reference
from . import strategies as make
from .strategies import Bank, Router

IMPLEMENTATIONS = ("auto", "cpu", "grouped", "batched", "plain", "triton")
RUNS = ("eager", "compiled", "exported")

# dtype of the module, what autocast casts to, tolerance beside the largest number of a tensor, and what of a router's
# numbers may come out differently: choices that it turns are ties, not mistakes
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None, float, float]] = {
    "float64": (torch.float64, None, 1e-9, 1e-12),
    "float32": (torch.float32, None, 2e-4, 1e-5),
    "bfloat16": (torch.bfloat16, None, 6e-2, 1e-5),
    "float16": (torch.float16, None, 1e-2, 1e-5),
    "autocast to bfloat16": (torch.float32, torch.bfloat16, 6e-2, 1e-5),
    "autocast to float16": (torch.float32, torch.float16, 1e-2, 1e-5),
}


@dataclass(frozen=True)
class Configuration:
    """One cell of the matrix, with the numbers that are in it."""

    routers: tuple[Router, ...]  # of one level, or of two
    sizes: tuple[int, ...]  # e, or (eo, ei)
    dim: int
    bank: Bank
    recipe: str | None
    group_size: int | None
    shared: bool
    shape: tuple[int, ...]  # (..., n)
    masked: float | None  # share of the tokens that are real
    side: tuple[str, ...]
    training: bool
    checkpointing: str | None  # "layer", "experts"
    frozen: tuple[str, ...]  # parameters that are trained do not begin so; "x" are the inputs
    dtype: str
    implementation: str
    run: str
    seed: int

    @property
    def num_experts(self) -> int | tuple[int, ...]:
        return self.sizes[0] if len(self.sizes) == 1 else self.sizes

    @property
    def options(self) -> dict[str, Any]:
        """What layer and reference take alike."""
        if self.recipe is None:
            return {"loss_coef": 0.5, "z_loss_coef": 0.1, "group_size": self.group_size}
        model, k = recipes.MODELS[self.recipe], self.routers[0].arguments.get("k", 0)
        coefs = {"loss_coef": 1e-2, "z_loss_coef": 0.0, **model.layer}
        coefs.pop("loss_coefs", None)  # losses by name have a reference of their own: test_balance_losses.py
        if model.router_aux_loss_coef is not None:
            coefs["loss_coef"] = model.router_aux_loss_coef[0] * k / model.router_aux_loss_coef[1]
        return {**coefs, "group_size": self.group_size}

    def axes(self) -> list[str]:
        """The values of the matrix' axes in it, to be counted."""
        dropless = [router.is_dropless(self.training) for router in self.routers]
        routers = [router.kind for router in self.routers]
        return [
            "router " + " over ".join(routers),
            f"recipe {self.recipe}",
            "dropless" if all(dropless) else "capacity",
            f"experts {self.bank.kind}",
            f"dtype {self.dtype}",
            f"way {self.implementation}",
            self.run,
            "training" if self.training else "eval",
            f"checkpointing {self.checkpointing}",
            "mask" if self.masked is not None else "no mask",
            "group_size" if self.group_size else "no group_size",
            *(f"side input {name}" for name in self.side),
            *(f"frozen {name}" for name in self.frozen),
        ]


# What cannot be


def find_expected_error(c: Configuration) -> str | None:
    """A pattern of the error by which the layer has to refuse a configuration; None if it is possible.

    In the order in which the layer notices: where two things are wrong, the first is told.
    """
    for router, e in zip(c.routers, c.sizes, strict=True):
        k = router.arguments.get("k")
        if k is not None and (error := make.KINDS[router.kind].refused(k, e)) is not None:
            return error
        groups = router.arguments.get("num_groups")
        if groups is not None and e % groups:
            return rf"num_groups={groups} must divide num_experts={e}"
        if groups is not None and router.arguments["top_groups"] * (e // groups) < k:
            return "top_groups=.* must contain at least k="
    if c.bank.takes_two and c.bank.kind == "ffn":
        return r"takes \(gate, up\) as arguments, so it requires GatedExperts"
    if c.bank.kind == "identity" and len(c.sizes) == 2:
        return "experts must be RoutedExperts with an integer num_experts"
    if "expert_choice" in (router.kind for router in c.routers) and len(c.sizes) == 2:
        return "must be a token-choice router"
    return find_side_input_error(c) or find_implementation_error(c)


GIVEN_EXPERTS, GIVEN_INNER = "given_experts", "given_experts_inner"


def reads_side_input(c: Configuration, level: int) -> set[str]:
    """The side inputs that a level's gate reads, by the layer's names."""
    kind = c.routers[level].kind
    given = {GIVEN_INNER if level else GIVEN_EXPERTS} if make.KINDS[kind].described_arguments else set()
    return {"router_input", *given, *(["token_ids"] if kind == "hash" else [])}


def find_side_input_error(c: Configuration) -> str | None:
    """Side inputs that no gate reads, or that one needs."""
    known = set().union(*(reads_side_input(c, level) for level in range(len(c.routers))))
    if unknown := set(c.side) - known:
        named = "".join(f"(?=.*'{name}')" for name in sorted(unknown))  # in the order of the call
        return f"the gate does not support the side input {named}[^;]*; it reads"
    for level, router in enumerate(c.routers):
        if router.kind == "hash" and not {"token_ids", GIVEN_INNER if level else GIVEN_EXPERTS} & set(c.side):
            return "HashGating requires token ids"
    return None


def find_implementation_error(c: Configuration) -> str | None:
    """A way that cannot compute these experts, or not here. Those that compute by themselves are not concerned."""
    if c.implementation in ("auto", "plain") or c.bank.kind not in ("ffn", "gated", "enclosed", "identity"):
        return None
    known = c.bank.activation in make.KNOWN_ACTIVATIONS
    possible = {
        "cpu": c.run == "eager" and known,
        "batched": c.run != "exported" and known,
        "grouped": c.run != "exported",
        "triton": False,  # its interpreter is a process' own: tests/test_triton.py
    }[c.implementation]
    return None if possible else f"'{c.implementation}' is requested, but it does not support this call"


# The layer and what it is called with


def build_layer(c: Configuration) -> Any:
    """The layer, with weights from the seed, in its dtype and mode."""
    gen = make.make_generator(c.seed)
    seeds = torch.randint(2**31 - 1, (4,), generator=gen).tolist()
    if c.recipe is not None:
        layer = build_recipe_layer(c)
        for module, seed in zip((layer.gate, layer.experts, layer.shared_expert), seeds, strict=False):
            if module is not None:
                make.draw_parameters(module, seed, 1.0 if module is layer.gate else 0.7)
    else:
        gates = [
            router.build(c.dim, e, seed, c.sizes[:level])
            for level, (router, e, seed) in enumerate(zip(c.routers, c.sizes, seeds, strict=False))
        ]
        names = ["gate"] if len(gates) == 1 else ["gate_outer", "gate_inner"]
        experts = c.bank.build(c.dim, c.num_experts, seeds[2])
        kind: Any = MoE if len(gates) == 1 else HeirarchicalMoE
        shared = make.draw_parameters(nn.Linear(c.dim, c.dim).double(), seeds[3], 0.7) if c.shared else None
        parts = {"experts": experts, "shared_expert": shared, **dict(zip(names, gates, strict=True))}
        layer = kind(c.dim, c.num_experts, **parts, **c.options)
    layer = layer.to(DTYPES[c.dtype][0]).train(c.training)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not any(name.startswith(part) for part in c.frozen))
    return layer


def build_recipe_layer(c: Configuration) -> Any:
    """The layer of a record, with the changes of the configuration's router."""
    model, given = recipes.MODELS[c.recipe], c.routers[0].arguments
    names = ("k", "num_groups", "top_groups", "tolerance", *(name for name in given if name.startswith("capacity")))
    changes = {name: given[name] for name in names if name in given and given[name] is not None}
    layer = recipes.build(model, c.dim, c.bank.computing(c.sizes[0]), c.bank.hidden_dim, **changes).double()
    layer.group_size, layer.loss_coefs = c.group_size, {}
    return layer


@dataclass
class Call:
    """What a layer is called with."""

    x: Tensor
    mask: Tensor | None
    side: dict[str, Tensor]

    def arguments(self) -> dict[str, Tensor]:
        return {} if self.mask is None else {"mask": self.mask}

    def to_float64(self) -> Call:
        """The same values as leaves of their own."""
        side = {n: v.detach().clone().double() if v.is_floating_point() else v for n, v in self.side.items()}
        return Call(self.x.detach().clone().double(), self.mask, side)


def make_call(c: Configuration, redraw: int = 0) -> Call:
    """Inputs from the seed; NaN where they are masked."""
    gen, dtype = make.make_generator(c.seed + 7919 * (redraw + 1)), DTYPES[c.dtype][0]
    x = make.normal(gen, *c.shape, c.dim).to(dtype)
    mask = None if c.masked is None else torch.rand(c.shape, generator=gen) < c.masked
    side: dict[str, Tensor] = {}
    if "router_input" in c.side:
        side["router_input"] = make.normal(gen, *c.shape, c.dim).to(dtype)
    if "token_ids" in c.side:
        side["token_ids"] = torch.randint(make.NUM_IDS, c.shape, generator=gen)
    k = [router.arguments.get("k", 2) for router in c.routers]
    if GIVEN_EXPERTS in c.side:
        side[GIVEN_EXPERTS] = given_experts(gen, (*c.shape, k[0]), c.sizes[0])
    if GIVEN_INNER in c.side:
        side[GIVEN_INNER] = given_experts(gen, (*c.shape, *k[-2:]), c.sizes[-1])
    return Call(make.poison_padding(x, mask), mask, side)


def given_experts(gen: torch.Generator, shape: tuple[int, ...], num_experts: int) -> Tensor:
    """Experts, choices that are not made, or are weighed and not computed, and tokens that the gate decides."""
    expert = torch.rand(*shape[:-1], max(num_experts, shape[-1]), generator=gen).argsort(dim=-1)[..., : shape[-1]]
    kind, live = torch.rand(shape, generator=gen), torch.rand(*shape[:-1], 1, generator=gen) < 0.2
    expert = torch.where(kind < 0.7, expert, torch.where((kind < 0.85) & (expert < num_experts), -2 - expert, -1))
    return torch.where(live, reference.LIVE, torch.where(expert < num_experts, expert, -1))


# Both


@dataclass
class Results:
    """What one side computed: output, loss, and gradients by name."""

    out: Tensor
    aux_loss: Tensor
    grads: dict[str, Tensor]


def make_results(out: Tensor, aux_loss: Tensor, leaves: dict[str, Tensor]) -> Results:
    """With the gradients of a loss that weighs every output differently."""
    loss = (out.double() * make.normal(make.make_generator(1), *out.shape)).sum() + aux_loss.double()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = make.compute_gradients(loss, list(wanted.values())) if wanted else []
    return Results(out.detach(), aux_loss.detach(), dict(zip(wanted, grads, strict=True)))


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Warnings that say what was drawn on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="group_size")
        warnings.filterwarnings("ignore", message=".* received one token per sequence in eval")
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of torch's RMSNorm
        warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
        yield


def get_leaves(c: Configuration, layer: nn.Module, call: Call) -> dict[str, Tensor]:
    """What gets gradients: inputs, side inputs, parameters."""
    floating = {name: value for name, value in call.side.items() if value.is_floating_point()}
    for name, value in {"x": call.x, **floating}.items():
        value.requires_grad_(name not in c.frozen)
    return {"x": call.x, **floating, **dict(layer.named_parameters())}


def run_layer(c: Configuration, layer: nn.Module, call: Call) -> Results:
    """The package's side."""
    autocast = DTYPES[c.dtype][1]
    leaves = get_leaves(c, layer, call)
    with (
        ignore_warnings(),
        ops.use(c.implementation),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        function = wrap_call(c, layer, call)
        torch.default_generator.manual_seed(c.seed)  # `torch.manual_seed` asks for GPUs
        out, aux_loss = function(call.x, **call.arguments(), **call.side)
    with ignore_warnings(), ops.use(c.implementation):
        return make_results(out, aux_loss, leaves)


def wrap_call(c: Configuration, layer: nn.Module, call: Call) -> Any:
    """The layer as the configuration runs it."""
    if c.checkpointing == "experts":
        inner = layer.experts.forward
        layer.experts.forward = lambda *args: checkpoint(inner, *args, use_reentrant=False)
    function: Any = layer
    if c.checkpointing == "layer":
        function = lambda x, **given: checkpoint(layer, x, use_reentrant=False, **given)  # noqa: E731
    if c.run == "compiled":
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")
    if c.run == "exported":
        return torch.export.export(layer, (call.x,), {**call.arguments(), **call.side}).module()
    return function


def run_reference(c: Configuration, layer: Any, call: Call, draws: make.RecordDraws, shake: float = 0.0):
    """The slow side, in float64 on the same numbers, and what it decided."""
    slow, exact = copy.deepcopy(layer).double(), call.to_float64()
    gates = [slow.gate] if len(c.routers) == 1 else [slow.gate_outer, slow.gate_inner]
    if shake:
        noise = make.normal(make.make_generator(3), *exact.x.shape)
        for value in (exact.x, *(value for value in exact.side.values() if value.is_floating_point())):
            value.mul_(1 + shake * noise)
    leaves = get_leaves(c, slow, exact)
    taken = [draws.take_draws(router, c.training) for router in c.routers]
    routers = [router.reference(gate) for router, gate in zip(c.routers, gates, strict=True)]
    experts = c.bank.reference(slow.experts, None if len(c.sizes) == 1 else c.sizes[1])
    options = {
        **c.options,
        "mask": exact.mask,
        "draws": taken,
        "side": exact.side,
        "after": getattr(slow.experts, "after", None) if c.bank.kind == "enclosed" else None,
        "shared_expert": slow.shared_expert,
    }
    return reference.run_layer(exact.x, routers, experts, **options), leaves


def list_choices(decisions: list[reference.ReferenceDecision]) -> list[tuple]:
    """What was decided, without what it weighs."""
    return [
        (level, *c.group.index, c.token.position, c.order, c.expert, c.slot, c.kept, bool(c.weight == 0))
        for level, assignments in enumerate(decisions)
        for c in assignments.choices
    ]


# Comparing


class Mismatch(AssertionError):  # noqa: N818  (what is found, which is no error of the run)
    """The layer and the reference differ."""


def check_configuration(c: Configuration, redraw: int = 0) -> str:
    """Hold one configuration to the reference: "equal", "refused" where that is right, or a `Mismatch`.

    "redrawn": rounding decided a tie between two choices, and with other numbers both are equal.
    """
    expected = find_expected_error(c)
    if expected is not None:
        check_refused(c, expected)
        return "refused"
    call = make_call(c, redraw)
    try:
        compare_with_reference(c, call)
    except Mismatch:
        if redraw < 2 and is_tie(c, call):
            return check_configuration(c, redraw + 1)
        raise
    return "redrawn" if redraw else "equal"


def check_refused(c: Configuration, pattern: str) -> None:
    """The layer says no, and why."""
    try:
        run_layer(c, build_layer(c), make_call(c))
    except Exception as error:
        text = str(error) + str(error.__cause__ or "")
        if not re.search(pattern, text):
            raise Mismatch(f"refused, but not by {pattern!r}: {error!r}") from error
        return
    raise Mismatch(f"not refused, expected {pattern!r}")


def record_case(c: Configuration, layer: Any, call: Call) -> make.RecordDraws:
    """What the layer draws in this call."""
    with make.RecordDraws() as draws, ignore_warnings(), torch.no_grad():
        torch.default_generator.manual_seed(c.seed)
        copy.deepcopy(layer)(call.x.detach(), **call.arguments(), **call.side)
    return draws


def compare_with_reference(c: Configuration, call: Call) -> None:
    layer = build_layer(c)
    draws = (
        record_case(c, layer, call) if any(r.uses_random_numbers(c.training) for r in c.routers) else make.RecordDraws()
    )
    found, leaves = run_reference(c, layer, call, draws)
    if draws.values:
        raise Mismatch(f"{len(draws.values)} draws more than the routers make")
    try:
        got = run_layer(c, layer, call)
    except Exception as error:
        raise Mismatch(f"refused by {error!r}") from error
    expected = make_results(found.out, found.aux_loss, leaves)
    tolerance = DTYPES[c.dtype][2]
    if got.out.dtype != call.x.dtype:
        raise Mismatch(f"out has dtype {got.out.dtype}")
    if call.mask is not None and got.out[~call.mask].count_nonzero():
        raise Mismatch("masked tokens are not 0")
    if got.grads.keys() != expected.grads.keys():
        raise Mismatch(f"gradients of {sorted(got.grads)} instead of {sorted(expected.grads)}")
    assert_close("out", got.out, expected.out, tolerance)
    # router arithmetic is float32 whatever the experts' dtype is
    assert_close("aux_loss", got.aux_loss, expected.aux_loss, min(tolerance, 2e-4))
    # a gate's gradient is a sum in which experts' outputs of low precision cancel
    of_gradients = tolerance if c.dtype.startswith("float") and c.dtype != "float16" else 2 * tolerance
    for name, grad in expected.grads.items():
        assert_close(f"gradient of {name}", got.grads[name], grad, of_gradients)


def assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a tolerance beside the largest number, which products of many are rounded by."""
    if got.shape != expected.shape:
        raise Mismatch(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    off = (got.double() - expected).abs()
    if not (off <= tolerance * size).all():
        raise Mismatch(f"{what} is off by {off.max().item():.3g}, allowed {tolerance * size:.3g}")


def is_tie(c: Configuration, call: Call) -> bool:
    """Whether the reference itself comes out otherwise when its inputs change by as much as rounding does."""
    layer, tolerance, seen = build_layer(c), DTYPES[c.dtype][2], []
    draws = record_case(c, layer, call)
    for shake in (0.0, DTYPES[c.dtype][3], -DTYPES[c.dtype][3]):
        these = make.RecordDraws()
        these.values = list(draws.values)
        found, leaves = run_reference(c, layer, call, these, shake)
        seen.append((list_choices(found.decisions), make_results(found.out, found.aux_loss, leaves)))
    if any(decisions != seen[0][0] for decisions, _ in seen):
        return True
    try:  # a kink: the gradient of ReLU at 0
        for _, results in seen[1:]:
            for name, grad in seen[0][1].grads.items():
                assert_close(name, results.grads[name], grad, tolerance)
    except Mismatch:
        return True
    return False


# Drawing


@st.composite
def configurations(draw, runs: tuple[str, ...] = ("eager",)) -> Configuration:
    """Any configuration that is run in one of these ways."""
    run, dtype = draw(st.sampled_from(runs)), draw(st.sampled_from([*DTYPES, "float64", "float64"]))
    if draw(st.integers(0, 3)) == 3:
        rough = () if dtype in ("float32", "float64") else ("relu",)
        routers_known = [kind.make for kind in make.KINDS.values()]
        known = {name: model for name, model in recipes.MODELS.items() if model.gate_class in routers_known}
        plain = {name: model for name, model in known.items() if not model.latent}  # that has a test of its own
        names = [name for name, model in plain.items() if model.experts.get("activation") not in rough]
        recipe = draw(st.sampled_from(sorted(names)))
        router, bank, size, shared = draw(make.recipe_parts(recipe))
        routers, sizes, dim = (router,), (size,), draw(st.sampled_from([3, 4]))
    else:
        recipe, shared, dim = None, draw(st.booleans()), draw(make.dims)
        levels = draw(st.sampled_from([1, 1, 2]))
        sizes = tuple(draw(st.sampled_from([4, 3, 2, 5, 6, 1] if levels == 1 else [3, 2, 4, 1])) for _ in range(levels))
        kinds = list(make.KINDS)
        if levels == 2 and draw(st.integers(0, 9)) < 9:
            kinds.remove("expert_choice")
        routers = tuple(draw(make.KINDS[draw(st.sampled_from(kinds))].drawn(e)) for e in sizes)
        bank = draw(make.matrix_banks(smooth=dtype not in ("float32", "float64")))
    if dtype != "float64":
        routers = tuple(router.without_underflow() for router in routers)
    side = draw(side_inputs(routers))
    checkpointing = draw(st.sampled_from([None, None, "layer", "experts"])) if run != "exported" else None
    parts = ["x", "experts", "gate", "experts.w1", "experts.w2", "shared_expert"]
    return Configuration(
        routers=routers,
        sizes=sizes,
        dim=dim,
        bank=bank,
        recipe=recipe,
        group_size=draw(st.sampled_from([None, None, None, 4, 3, 1])),
        shared=shared,
        shape=draw(shapes()),
        masked=draw(st.sampled_from([None, 0.7, None, 0.9, 0.4, 0.0])),
        side=side,
        training=draw(st.booleans()) if run != "exported" else False,
        checkpointing=checkpointing,
        frozen=draw(st.sampled_from([(), (), ()] + [(part,) for part in parts])),
        dtype=dtype,
        implementation=draw(st.sampled_from([*IMPLEMENTATIONS[:-1]] * 3 + ["triton"])),
        run=run,
        seed=draw(make.seeds),
    )


@st.composite
def shapes(draw) -> tuple[int, ...]:
    """`(..., n)`: few tokens, for the reference takes a millisecond for each."""
    leading = draw(st.sampled_from([(1,), (2,), (), (3,), (2, 1), (0,)]))
    lengths = [6, 9, 5, 7, 11, 3, 4, 2, 1, 0] if leading in ((1,), ()) else [3, 4, 5, 6, 2, 1, 0]
    return (*leading, draw(st.sampled_from(lengths)))


@st.composite
def side_inputs(draw, routers: tuple[Router, ...]) -> tuple[str, ...]:
    """Mostly what the gates read, sometimes what they do not."""
    kinds = [router.kind for router in routers]
    names = []
    if draw(st.integers(0, 4)) == 4:
        names.append("router_input")
    # those that the others make of given choices is theirs to say, and tests/test_replay.py holds them to it
    for name, router in zip((GIVEN_EXPERTS, GIVEN_INNER), routers, strict=False):
        likely = make.KINDS[router.kind].rare_arguments
        if likely and "scales" not in router.arguments and draw(st.integers(1, likely)) == likely:
            names.append(name)
    if draw(st.integers(0, 9)) < 9 if "hash" in kinds else draw(st.integers(0, 40)) == 40:
        names.append("token_ids")
    return tuple(names)
