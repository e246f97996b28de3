"""The table of cases: a shape, a way of routing, who runs and which ratios are read off. Nothing here needs torch.

b groups, n tokens of a group, d model dim, h hidden dim, e experts, k choices, c capacity
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Literal

MIN_CAPACITY = 4
# What a case's name begins with, and what it says of the setting
GROUPS = {
    "train": "Training, top 2, capacity factor 1.25",
    "zipf": "Training, skewed routing",
    "eval": "Inference, top 2, capacity factor 2",
    "hierarchical": "Inference, two levels",
    "mixtral": "Mixtral's SwiGLU experts, top 2, dropless",
    "qwen3": "Qwen3's SwiGLU experts, top 8, dropless",
    "decode": "Decoding, one token a call",
    "experts": "Training, few to many experts",
    "compiled": "Under torch.compile",
    "packed": "Training, eight packed documents",
    "choose": "Training, other choices, dropless, dtype",
}
HALVES = ("ordinary", "huge")  # ordinary pages; THP_MEM_ALLOC_ENABLE=1


@dataclass(frozen=True)
class Figure:
    """One ratio: `numerator` over `reference`, and the most it should be.

    `reference` is timed twice. A tuple of references stands for whichever of them turned out fastest.
    `target` is for ordinary pages, `target_huge` for huge pages; None where there is no target.
    """

    numerator: str
    reference: str | tuple[str, ...]
    target: float | None = None
    target_huge: float | None = None
    quantity: Literal["time", "memory"] = "time"

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference,) if isinstance(self.reference, str) else self.reference

    @property
    def label(self) -> str:
        under = self.reference if isinstance(self.reference, str) else f"fastest of ({', '.join(self.reference)})"
        return f"{self.numerator} ÷ {under}" + (", peak memory" if self.quantity == "memory" else "")

    def target_for(self, half: str) -> float | None:
        return self.target_huge if half == "huge" else self.target


@dataclass(frozen=True)
class Case:
    """One row of the table. `b` groups of `n` tokens; in decode, `b` single tokens called one after the other.

    mode: 'train' is forward and backward; 'forward' is eval under no_grad; 'decode' the same, a token a call;
    'construct' builds the layer. factor: the capacity factor, None for dropless. skew: the probability of expert i as
    a token's first choice is proportional to (i + 1)^-skew, so 0 is balanced and 1 is Zipf's law. fill: the share of
    all slots that the choices would take if none overflowed (second choices are removed by policy 'threshold' until
    it is reached). inner: experts of the second level, 0 for one level.
    """

    name: str
    mode: Literal["train", "forward", "decode", "construct"]
    b: int
    n: int
    d: int
    h: int
    e: int
    k: int = 2
    factor: float | None = 1.25
    gated: bool = False
    skew: float = 0.0
    fill: float | None = None
    policy: Literal["all", "none", "threshold"] = "all"
    inner: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    figures: tuple[Figure, ...] = ()
    extras: tuple[str, ...] = ()
    quick: bool = False

    @property
    def contestants(self) -> tuple[str, ...]:
        """Everybody who runs, in order of first mention."""
        named = [name for figure in self.figures for name in (figure.numerator, *figure.references)]
        return tuple(dict.fromkeys([*named, *self.extras]))

    @property
    def references(self) -> tuple[str, ...]:
        """Those who are timed twice."""
        named = [name for figure in self.figures if figure.quantity == "time" for name in figure.references]
        return tuple(dict.fromkeys(named))

    @property
    def all_experts(self) -> int:
        return self.e * max(1, self.inner)

    @property
    def group(self) -> str:
        """What it has in common with the cases beside it, in words."""
        return GROUPS.get(self.name.split("/")[0], "")

    @property
    def title(self) -> str:
        """What it is within its group, in words."""
        prefix = self.name.split("/")[0]
        tokens = [] if self.mode == "decode" else [f"{self.b} × {self.n} tokens"]
        experts = f"{self.e} × {self.inner} experts" if self.inner else f"{self.e} experts"
        words = [*tokens, f"width {self.d}", experts]
        if prefix == "compiled":
            words.insert(0, {"train": "training", "forward": "inference", "decode": "decoding"}[self.mode])
        elif prefix == "mixtral" and self.mode == "forward":
            words.append("inference")
        elif prefix == "choose":
            changed = self.name.split("/")[1].split("-")[0]
            words.insert(0, {"dropless": "dropless", "bf16": "bfloat16"}.get(changed, f"top {self.k}"))
        if self.h != 4 * self.d:
            words.append(f"hidden width {self.h}")
        if self.factor is None and prefix in ("decode", "zipf", "packed"):
            words.append("SwiGLU, dropless" if self.gated else "dropless")
        if self.fill is not None:
            words.append(f"slots {self.fill:.0%} full")
        if self.mode == "construct":
            words.append("to build it")
        if self.skew and prefix != "zipf":
            words.append("one choice, skewed")
        return ", ".join(words)

    @property
    def router_is_top2(self) -> bool:
        """Top2Gating with plain experts; else TopKGating, which has no policy and counts its factor per choice."""
        return self.k == 2 and not self.gated

    @property
    def capacity(self) -> int | None:
        """Slots of one expert in one group (of one inner expert, where there are two levels); None where dropless."""
        if self.factor is None:
            return None
        choices = 1 if self.router_is_top2 else self.k
        first = count_slots(self.n, self.factor * choices, self.e)
        return count_slots(first, self.factor, self.inner) if self.inner else first

    @property
    def rows_per_expert(self) -> int:
        """Rows that each expert's products take: its slots, or an even share of the choices where dropless."""
        if self.capacity is None:
            return -(-self.b * self.n * self.k // self.e)
        return self.b * self.capacity

    @property
    def rows(self) -> int:
        return self.all_experts * self.rows_per_expert


def count_slots(n: int, factor: float, e: int) -> int:
    """An expert's capacity in a group of n tokens."""
    return max(min(n, int(n * factor / e)), MIN_CAPACITY)


def make_case_name(b: int, n: int, d: int, e: int) -> str:
    return f"{b}x{n}-d{d}-e{e}"


# b, n, d, e; then the most that fwd+bwd may cost ÷ products (ordinary, huge pages) and ÷ 0.2.3
TRAINING = (
    (4, 1024, 512, 16, 1.00, 1.05, 0.65),
    (1, 8192, 256, 64, 1.08, 1.05, 0.12),
    (4, 1024, 256, 64, 1.08, 1.05, 0.55),
    (4, 1024, 128, 128, 1.20, 1.10, 0.55),
)
EXTRA_CONTESTANTS = ("loop", "dense")


def training() -> list[Case]:
    """Forward and backward of the default top-2 layer, factor 1.25."""
    cases = []
    for b, n, d, e, ordinary, huge, published in TRAINING:
        figures = [Figure("layer", "products", ordinary, huge), Figure("layer", "0.2.3", published)]
        figures.append(Figure("layer", "router + products"))
        figures += [Figure("roofline", reference) for reference in ("products", "0.2.3")]
        headline = (d, e) in ((512, 16), (256, 64))
        if n == 8192:
            figures.append(Figure("layer", "0.2.3", 0.15, 0.15, "memory"))
        name = "train/" + make_case_name(b, n, d, e)
        cases.append(
            Case(name, "train", b, n, d, 4 * d, e, figures=tuple(figures), extras=EXTRA_CONTESTANTS, quick=headline)
        )
    return cases


def skewed() -> list[Case]:
    """The same shapes under Zipf-skewed routing, against themselves when balanced."""
    cases = []
    for b, n, d, e, *_ in TRAINING:
        for kind, factor, target in (("capacity", 1.25, 1.05), ("dropless", None, 1.15)):
            figures = (Figure("layer", "layer balanced", target, target),)
            name = f"zipf/{kind}/{make_case_name(b, n, d, e)}"
            cases.append(Case(name, "train", b, n, d, 4 * d, e, factor=factor, skew=1.0, figures=figures))
    return cases


def evaluation() -> list[Case]:
    """Eval forward at factor 2.0 with slots more and less full, against the products on all padded slots."""
    base = Case("", "forward", 4, 1024, 256, 1024, 64, factor=2.0)
    cases = []
    for fill in (0.5, 0.65, 0.8, 1.0):
        target = 0.80 if fill == 0.65 else 1.03
        policy = {0.5: "none", 1.0: "all"}.get(fill, "threshold")
        figures = (Figure("layer", "products", target, target),)
        extras = ("0.2.3", "loop", "dense") if fill == 1.0 else ()
        name = f"eval/fill-{fill:.2f}/{make_case_name(4, 1024, 256, 64)}"
        changed = {"fill": fill, "policy": policy, "figures": figures, "extras": extras}
        cases.append(replace(base, name=name, quick=fill == 0.65, **changed))
    figures = (Figure("layer", "products", 0.80, 0.80),)
    name = f"eval/fill-0.65/{make_case_name(1, 8192, 256, 64)}"
    cases.append(replace(base, name=name, b=1, n=8192, fill=0.65, policy="threshold", figures=figures))
    figures = (Figure("layer", "products", 1.03, 1.03),)
    name = f"eval/zipf-none/{make_case_name(4, 1024, 256, 64)}"
    cases.append(replace(base, name=name, skew=1.0, policy="none", figures=figures))
    name = f"eval/fill-1.00/{make_case_name(4, 1024, 512, 16)}"
    cases.append(replace(base, name=name, d=512, h=2048, e=16, fill=1.0, figures=figures))
    return cases


def transformers_blocks() -> list[Case]:
    """Dropless SwiGLU experts against the blocks of transformers (batched_mm copies weights per token: decode only)."""
    mixtral, qwen3 = (tuple(f"{m} {i}" for i in ("eager", "grouped_mm")) for m in ("mixtral", "qwen3"))
    base = Case("", "train", 2, 1024, 512, 1024, 16, factor=None, gated=True, extras=("loop", "products", "dense"))
    versus_mixtral = (
        Figure("layer", mixtral, 0.85),
        Figure("layer", "products"),
        Figure("roofline", mixtral),
    )
    versus_qwen3 = (Figure("layer", qwen3), Figure("layer", "products"))
    small = {"d": 256, "h": 512, "e": 64}
    return [
        replace(base, name="mixtral/2048-d512-h1024-e16", figures=versus_mixtral),
        replace(base, name="mixtral/2048-d256-h512-e64", figures=versus_mixtral, quick=True, **small),
        replace(base, name="qwen3/2048-d256-h512-e64-k8", figures=versus_qwen3, k=8, **small),
        replace(base, name="mixtral/forward-2048-d256-h512-e64", mode="forward", figures=versus_mixtral[:1], **small),
    ]


def decoding() -> list[Case]:
    """One token a call, another token each time, so that the chosen experts' weights are cold."""
    base = Case("", "decode", 16, 1, 512, 2048, 64, factor=2.0)
    backends = tuple(f"mixtral {i}" for i in ("eager", "grouped_mm", "batched_mm"))
    figures = (Figure("layer", "by hand", 1.2, 1.2),)
    gated = (*figures, Figure("layer", backends))
    return [
        replace(base, name="decode/d512-h2048-e64", figures=figures, extras=("0.2.3", "loop"), quick=True),
        replace(base, name="decode/dropless-d512-h2048-e64", figures=figures, factor=None),
        replace(base, name="decode/mixtral-d512-h1024-e64", h=1024, factor=None, gated=True, figures=gated),
    ]


def expert_counts() -> list[Case]:
    """Few to hundreds of experts over the same tokens: the layer against router and products at each number."""
    figures = (Figure("layer", "router + products", 1.10, 1.10),)
    return [Case(f"experts/{e}", "train", 1, 4096, 256, 1024, e, figures=figures) for e in (8, 64, 512)]


def hierarchical() -> list[Case]:
    """A billion parameters in 22 x 22 experts."""
    base = Case("", "forward", 1, 1024, 512, 2048, 22, inner=22, factor=2.0)
    return [
        replace(
            base, name="hierarchical/forward", figures=(Figure("layer", "products", 1.10, 1.10),), extras=("0.2.3",)
        ),
        replace(base, name="hierarchical/construct", mode="construct", figures=(Figure("layer", "0.2.3", 1.0, 1.0),)),
    ]


def compiled() -> list[Case]:
    """The layer under torch.compile beside itself in eager mode."""
    figures = (Figure("layer compiled", "layer"), Figure("layer compiled", "products"))
    decode = (Figure("layer compiled", "layer"), Figure("layer compiled", "by hand"))
    return [
        Case("compiled/train-4x1024-d512-e16", "train", 4, 1024, 512, 2048, 16, figures=figures),
        Case("compiled/train-1x8192-d256-e64", "train", 1, 8192, 256, 1024, 64, figures=figures),
        Case("compiled/forward-4x1024-d256-e64", "forward", 4, 1024, 256, 1024, 64, factor=2.0, figures=figures),
        Case("compiled/decode-d512-h2048-e64", "decode", 16, 1, 512, 2048, 64, factor=2.0, figures=decode),
    ]


def choices() -> list[Case]:
    """What to choose when: the number of choices, dropless or capacity, the dtype."""
    base = Case("", "train", 4, 1024, 256, 1024, 64)
    versus_products = (Figure("layer", "products"),)
    cases = [
        replace(base, name="choose/dropless-4x1024-d256-e64", figures=(Figure("layer dropless", "layer"),)),
        replace(base, name="choose/bf16-4x1024-d256-e64", figures=(Figure("layer bfloat16", "layer"),)),
    ]
    large = {"d": 512, "h": 2048, "e": 16}
    cases += [
        replace(base, name="choose/dropless-4x1024-d512-e16", figures=(Figure("layer dropless", "layer"),), **large),
        replace(base, name="choose/bf16-4x1024-d512-e16", figures=(Figure("layer bfloat16", "layer"),), **large),
    ]
    for k, h in ((1, 1024), (4, 256), (8, 128)):
        cases.append(replace(base, name=f"choose/k{k}-4x1024-d256-e64", k=k, h=h, figures=versus_products))
    return cases


def packed() -> list[Case]:
    """Eight documents in one row, by `segment_ids`, against the same row as one document."""
    base = Case("", "train", 1, 4096, 256, 256, 128, k=8, gated=True)
    dropless, limited = (Figure("layer packed", "layer", most, most) for most in (1.05, 1.15))
    small = {"e": 8, "k": 2, "h": 1024}
    return [
        replace(base, name="packed/dropless-4096-d256-e128-k8", factor=None, figures=(dropless,)),
        replace(base, name="packed/capacity-4096-d256-e128-k8", figures=(limited,)),
        replace(base, name="packed/dropless-4096-d256-e8-k2", factor=None, figures=(dropless,), **small),
        replace(base, name="packed/capacity-4096-d256-e8-k2", figures=(limited,), **small),
    ]


def smoke_test_cases() -> list[Case]:
    """Seconds only, for the smoke test: run when `--only` names them."""
    figures = (Figure("layer", "products"), Figure("layer", "0.2.3"), Figure("layer", "0.2.3", quantity="memory"))
    return [Case("toy/train", "train", 2, 64, 32, 64, 8, figures=figures, extras=("loop", "dense"))]


def list_cases() -> list[Case]:
    groups = (
        training,
        skewed,
        evaluation,
        transformers_blocks,
        decoding,
        expert_counts,
        hierarchical,
        compiled,
        choices,
        packed,
    )
    return [case for group in groups for case in group()] + smoke_test_cases()


def select_cases(pattern: str | None, quick: bool, figures_only: bool = False) -> list[Case]:
    """The cases whose name contains `pattern` (or matches it, if it has wildcards); toys only when asked for."""
    pattern = pattern or "*"
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [case for case in list_cases() if fnmatch(case.name, wanted)]
    if not pattern.startswith("toy"):
        found = [case for case in found if not case.name.startswith("toy/")]
    if quick:
        found = [case for case in found if case.quick or case.name.startswith("toy/")]
    return [replace(case, extras=()) if quick or figures_only else case for case in found]
