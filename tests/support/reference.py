"""The slow, obvious reference: every router and both layers, one token at a time.

Decisions are made with plain Python lists, loops and `sorted`; numbers are torch tensors, so that autograd gives every
gradient. Nothing here is shared with the package: this file is a second reading of the same definitions, to compare the
fast paths with.

Padding is *removed* before anything is decided: a `Group` holds its real tokens only. That a padded sequence behaves as
the same sequence without its padding is therefore true here by construction, and is what the package is compared with.

Axes: b groups, n tokens of a group, d model dim, e experts, k choices a token, h hidden dim;
eo, ei outer and inner experts of the two-level layer, c slots of an outer expert.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LIVE = -(1 << 15)  # of given choices: one's own

# Tokens, groups, choices


@dataclass(eq=False)
class Token:
    """A real token (or a slot of an outer expert) as a router sees it."""

    x: Tensor  # (d,)
    position: int  # its place in the group, padding counted: the order in which tokens queue
    importance: float = 1.0
    uniforms: Tensor | None = None  # (), the draw of Top2's policy 'random'
    noise: Tensor | None = None  # (e,), the draw of the noisy router
    jitter: Tensor | None = None  # (d,), the factors on the router's input
    exponential: Tensor | None = None  # (e, k), the draws by which SparseMixer samples each choice
    whole: Tensor | None = None  # (1, k), the draws that say whether it weighs all of it
    router_input: Tensor | None = None  # (d,), what the router reads instead of x
    given_experts: Tensor | None = None  # (k,), choices of somebody else: -1 none, -2 - i not computed, LIVE one's own
    given_experts_inner: Tensor | None = None  # (k, k of level two), the same for each of its choices
    token_ids: Tensor | None = None  # (), the id of a hash layer


@dataclass(eq=False)
class Group:
    """Tokens that compete for the same slots."""

    tokens: list[Token]
    length: float  # n: the number of real positions, over which capacity and means are taken
    index: tuple[int, ...]  # (*outer, group)

    @property
    def outer_experts(self) -> tuple[int, ...]:
        """The outer expert whose gate weights decide; () for a gate without outer experts."""
        return self.index[:-1]


@dataclass(eq=False)
class Choice:
    """One expert that one token asks for."""

    group: Group
    token: Token
    order: int  # 0 is the token's first choice
    expert: int
    weight: Tensor  # ()
    score: float = 0.0  # the token's top probability, for priority 'score'
    slot: int = -1
    kept: bool = True
    computed: bool = True  # or only weighed beside the others, and counted with them


@dataclass
class ReferenceDecision:
    """What a router decided for a list of groups."""

    choices: list[Choice]
    balance_loss: Tensor
    z_loss: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


def make_groups(x, importance=None, mask=None, **of_tokens) -> list[Group]:
    """Groups of real tokens from x (*outer, b, n, d); all others have the shape of the tokens and what may follow.

    `of_tokens` are the draws ("uniforms", "noise", ...) and the side inputs, by the names of a token's attributes.
    """
    groups, given = [], {name: value for name, value in of_tokens.items() if value is not None}
    n = x.shape[-2]
    for index in all_indices(x.shape[:-2]):
        real = [t for t in range(n) if mask is None or mask[index][t]]
        tokens = [
            Token(
                x[index][t],
                t,
                1.0 if importance is None else float(importance[index][t]),
                **{name: value[index][t] for name, value in given.items()},
            )
            for t in real
        ]
        groups.append(Group(tokens, len(real), index))
    return groups


def all_indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Every index of an array of this shape, in row-major order."""
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices


# Capacity and slots


def compute_capacity(length: float, per_token: float, factor: float | None, num_experts: int, minimum: int) -> float:
    """Slots an expert has in a group of `length` tokens: infinite without a factor, 0 without real positions."""
    if factor is None:
        return math.inf
    if length == 0:
        return 0
    return max(int(min(length, per_token * length * factor / num_experts)), minimum)


def queue_key(priority: str) -> Callable[[Choice], tuple]:
    """The order in which a group's choices queue for slots."""
    return {
        "choice": lambda choice: (choice.order, choice.token.position),
        "token": lambda choice: (choice.token.position, choice.order),
        "score": lambda choice: (choice.order, -choice.score, choice.token.position),
    }[priority]


def assign_slots(choices: list[Choice], priority: str, limit: float) -> None:
    """Give every choice of one group its slot: the number of choices before it that ask for the same expert.

    A choice of weight 0 holds a slot though nothing is computed in it; without a capacity there is none to hold, and
    nobody to be served first: slots follow the tokens.
    """
    priority = "token" if limit == math.inf else priority
    waiting: dict[int, int] = defaultdict(int)
    for choice in sorted(choices, key=queue_key(priority)):
        if not choice.computed or (limit == math.inf and choice.weight == 0):
            choice.kept = False
            continue
        choice.slot = waiting[choice.expert]
        choice.kept = choice.slot < limit
        waiting[choice.expert] += 1


# Small numbers


def compute_mean(values: list[Tensor], like: Tensor) -> Tensor:
    """Mean of 0-dim tensors; an empty mean is 0."""
    return sum(values, like.new_zeros(())) / len(values) if values else like.new_zeros(())


def squared_variation(values: Tensor) -> Tensor:
    """CV² of a vector: population variance over squared mean; 0 when the mean is 0."""
    center = values.mean()
    if center == 0:
        return values.sum() * 0
    return ((values - center) ** 2).mean() / center**2


def largest_indices(values: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest values, the lowest index first on a tie."""
    listed = values.tolist()
    return sorted(range(len(listed)), key=lambda i: (-listed[i], i))[:count]


def z_loss(groups: list[Group], logits: dict[Token, Tensor], like: Tensor) -> Tensor:
    """Mean of logsumexp(logits)² over the tokens of importance 1, pooled over all groups."""
    counted = [logits[t] for g in groups for t in g.tokens if t.importance == 1]
    return compute_mean([torch.logsumexp(row, 0) ** 2 for row in counted], like)


def router_input(token: Token) -> Tensor:
    x = token.x if token.router_input is None else token.router_input
    return x if token.jitter is None else x * token.jitter


def to_inner_token(choice: Choice, position: int, importance: float) -> Token:
    """A choice of level one as a token of level two: what was drawn for it is not handed on, side inputs are."""
    above = choice.token
    given = None if above.given_experts_inner is None else above.given_experts_inner[choice.order]
    side = dict(router_input=above.router_input, given_experts=given, token_ids=above.token_ids)
    return Token(above.x, position, importance, **side)


def split_by_outer(groups: list[Group]) -> list[list[Group]]:
    """The groups of each outer expert."""
    found: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        found[group.outer_experts].append(group)
    return list(found.values())


# Routers. Each is a plain record of its settings for *one* mode (train or eval); `w_gating` is (*outer, d, e).


@dataclass
class TokenChoice:
    """What the routers share in which a token chooses its experts."""

    w_gating: Tensor
    capacity_factor: float | None = None
    min_expert_capacity: int = 4
    priority: str = "choice"
    k: int = 2

    @property
    def num_experts(self) -> int:
        return self.w_gating.shape[-1]

    @property
    def per_token(self) -> float:
        """How many slots a token is given by a capacity factor of 1."""
        return self.k

    def choices_of(self, token: Token) -> int:
        """How many of its k choices a token may make."""
        if token.importance == 1:
            return self.k
        return 1 if token.importance > 0 else 0

    def limit(self, length: float) -> float:
        return compute_capacity(
            length, self.per_token, self.capacity_factor, self.num_experts, self.min_expert_capacity
        )

    def is_handed_on(self, choice: Choice) -> float:
        """The importance that a second level sees in this choice."""
        return 1.0 if choice.order == 0 else 0.5

    def assign_choices(self, groups: list[Group], choices: list[Choice]) -> list[Choice]:
        """The same choices with their slots."""
        for group in groups:
            assign_slots([c for c in choices if c.group is group], self.priority, self.limit(group.length))
        return choices


@dataclass
class Top2(TokenChoice):
    """Two choices with a policy for the second (GShard, arXiv 2006.16668)."""

    policy: str = "all"
    threshold: float = 0.2
    eps: float = 1e-9
    second_place_loss: bool = False

    @property
    def per_token(self) -> float:
        return 1

    def is_handed_on(self, choice: Choice) -> float:
        return 0.5 * ((choice.weight.item() > 0.5) + (choice.weight.item() > 0))

    def decide(self, groups: list[Group]) -> ReferenceDecision:
        choices, logits, losses = [], {}, []
        for group in groups:
            probs, firsts, seconds = {}, {}, {}
            for token in group.tokens:
                logits[token] = router_input(token) @ self.w_gating[group.outer_experts]
                probs[token] = logits[token].softmax(0)
                choices += self.choose(group, token, probs[token], firsts, seconds)
            if group.length > 0:
                losses.append(self.group_loss(group, probs, firsts, seconds))
        balance = compute_mean(losses, self.w_gating)
        z = z_loss(groups, logits, self.w_gating)
        return ReferenceDecision(self.assign_choices(groups, choices), balance, z)

    def choose(self, group, token, probs, firsts, seconds) -> list[Choice]:
        """Choices of one token that queue for slots; notes its first and second expert for the losses."""
        top = largest_indices(probs, 1)[0]
        takes_first = token.importance == 1
        rest = probs * torch.tensor([not (takes_first and e == top) for e in range(self.num_experts)])
        second = largest_indices(rest, 1)[0]
        takes_second = token.importance > 0
        first_gate = probs[top] if takes_first else probs[top] * 0
        second_gate = rest[second]
        total = first_gate + second_gate + self.eps
        first_gate, second_gate = first_gate / total, second_gate / total
        made = []
        if takes_first:
            firsts[token] = top
            made.append(Choice(group, token, 0, top, first_gate, probs[top].item()))
        if takes_second:
            seconds[token] = second
            if self.allows(second_gate, token) and not (takes_first and self.num_experts == 1):
                made.append(Choice(group, token, 1, second, second_gate, probs[top].item()))
        return made

    def allows(self, gate: Tensor, token: Token) -> bool:
        if self.policy == "random":
            return bool(token.uniforms < gate / max(self.threshold, self.eps))
        return {"all": True, "none": False, "threshold": bool(gate > self.threshold)}[self.policy]

    def group_loss(self, group, probs, firsts, seconds) -> Tensor:
        """Balance loss of one group, with the second-place loss if it is on."""
        e, n = self.num_experts, group.length
        proxy = [sum((probs[t][i] for t in group.tokens if t.importance == 1), 0.0) / n for i in range(e)]
        load = [sum(expert == i for expert in firsts.values()) / n for i in range(e)]
        loss = e**2 * sum(p * f for p, f in zip(proxy, load, strict=True)) / e
        if self.second_place_loss:
            rests = []
            for token in group.tokens:
                keep = torch.tensor([firsts.get(token) != i for i in range(e)])
                rest = probs[token] * keep
                rests.append(rest / (rest.sum() + 1e-9))
            load = [sum(expert == i for expert in seconds.values()) / n for i in range(e)]
            second_proxy = [sum((r[i] for r in rests), 0.0) / n for i in range(e)]
            loss = loss + 0.5 * e**2 * sum(p * f for p, f in zip(second_proxy, load, strict=True)) / e
        return torch.as_tensor(loss, dtype=self.w_gating.dtype)


@dataclass
class TopK(TokenChoice):
    """The k largest scores, softmax or sigmoid, with everything that published models put around them."""

    score: str = "softmax"
    normalize: bool | None = None
    scale: float = 1.0
    b_gating: Tensor | None = None  # (*outer, e)
    expert_bias: Tensor | None = None  # (*outer, e)
    num_groups: int | None = None
    top_groups: int | None = None
    balance_over: str = "group"
    select: str = "score"
    weigh: str = "score"
    group_score: str = "two_best"
    eps: float = 1e-20
    norm_eps: float | None = None  # the router's input is divided by its root mean square, and multiplied by
    norm_weight: Tensor | None = None  # (*outer, d)
    multiplier: float = 1.0
    softcap: float | None = None
    scales: Tensor | None = None  # (e,) or (1,), learned numbers that multiply the normalised weights
    experts_of_id: Tensor | None = None  # (v, k), of a hash layer

    def decide(self, groups: list[Group]) -> ReferenceDecision:
        choices, logits, scores = [], {}, {}
        for group in groups:
            for token in group.tokens:
                logits[token] = self.logits(group, token)
                scores[token] = self.score_of(logits[token])
                choices += self.choose(group, token, logits[token], scores[token])
        units = [[g] for g in groups] if self.balance_over == "group" else split_by_outer(groups)
        losses = [self.balance(unit, scores, choices) for unit in units if sum(g.length for g in unit) > 0]
        balance = compute_mean(losses, self.w_gating)
        z = z_loss(groups, logits, self.w_gating)
        return ReferenceDecision(self.assign_choices(groups, choices), balance, z)

    def logits(self, group: Group, token: Token) -> Tensor:
        x = router_input(token)
        if self.norm_eps is not None:
            x = x / (x.square().mean() + self.norm_eps).sqrt() * self.norm_weight[group.outer_experts]
        logits = x @ self.w_gating[group.outer_experts]
        logits = logits if self.b_gating is None else logits + self.b_gating[group.outer_experts]
        logits = logits * self.multiplier
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def score_of(self, logits: Tensor) -> Tensor:
        if self.score == "softmax":
            return logits.softmax(0)
        return logits.sigmoid() if self.score == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()

    def choose(self, group: Group, token: Token, logits: Tensor, scores: Tensor) -> list[Choice]:
        """The first choices of all k that a token would make, as many as it may make; what they weigh is of all k
        where that is a softmax over them, and where learned numbers multiply it."""
        if not self.choices_of(token):
            return []
        biased = (scores if self.select == "score" else logits).detach()
        if self.expert_bias is not None:
            biased = biased + self.expert_bias[group.outer_experts]
        allowed = self.allowed(biased)
        top = scores[allowed != -math.inf].max().item()
        experts = largest_indices(allowed, self.k)
        if self.experts_of_id is not None:
            experts = experts if token.token_ids is None else self.experts_of_id[token.token_ids].tolist()
            top = scores[experts].max().item()
        given = [LIVE] * self.k if token.given_experts is None else token.given_experts.tolist()
        made = [order for order in range(self.choices_of(token)) if given[order] != -1]
        experts = [own if code == LIVE else max(code, -2 - code) for own, code in zip(experts, given, strict=True)]
        shared = [order for order in range(self.k) if given[order] != -1]
        weights = self.weights(logits, scores, experts, made, shared)
        return [
            Choice(
                group,
                token,
                order,
                experts[order],
                weight * self.scale,
                top,
                computed=given[order] in (LIVE, experts[order]),
            )
            for order, weight in zip(made, weights, strict=True)
        ]

    def weights(
        self, logits: Tensor, scores: Tensor, experts: list[int], made: list[int], shared: list[int]
    ) -> list[Tensor]:
        """What those of the k choices weigh that are made, where the weight is shared among these."""
        if self.scales is not None:
            weights = scores[experts] / (scores[[experts[order] for order in shared]].sum() + 1e-20)
            weights = weights * (self.scales if len(self.scales) == 1 else self.scales[experts])
            return [weights[order] for order in made]
        weights = [scores[expert] for expert in experts]
        if self.weigh == "softmax":
            of_shared = dict(zip(shared, logits[[experts[order] for order in shared]].softmax(0), strict=True))
            weights = [of_shared.get(order, logits.new_zeros(())) for order in range(self.k)]
        listed = [weights[order] for order in made]
        if self.k > 1 if self.normalize is None else self.normalize:
            listed = [weight / (sum(listed) + self.eps) for weight in listed]
        return listed

    def allowed(self, biased: Tensor) -> Tensor:
        """Scores with -inf for the experts of groups that may not be chosen from."""
        if self.num_groups is None:
            return biased
        size = self.num_experts // self.num_groups
        parts = biased.split(size)
        best = 2 if self.group_score == "two_best" else 1
        sums = torch.stack([torch.stack([part[i] for i in largest_indices(part, best)]).sum() for part in parts])
        chosen = largest_indices(sums, self.top_groups)
        return torch.cat([part if i in chosen else torch.full_like(part, -math.inf) for i, part in enumerate(parts)])

    def balance(self, groups: list[Group], scores: dict[Token, Tensor], choices: list[Choice]) -> Tensor:
        """e/k · Σ_e f_e · P_e over the tokens of these groups."""
        n = sum(group.length for group in groups)
        counted = [t for group in groups for t in group.tokens if t.importance == 1]
        loads = [0.0] * self.num_experts
        for choice in choices:
            if choice.group in groups and choice.token.importance == 1:
                loads[choice.expert] += 1 / n
        probs = sum((scores[t] / scores[t].sum() for t in counted), self.w_gating.new_zeros(self.num_experts)) / n
        return self.num_experts / self.k * (torch.tensor(loads, dtype=probs.dtype) * probs).sum()


@dataclass
class TopP(TopK):
    """The fewest experts whose probabilities reach p together, at most k (docs/extending.md)."""

    p: float = 0.5

    def choose(self, group: Group, token: Token, logits: Tensor, scores: Tensor) -> list[Choice]:
        made, reached = [], 0.0
        for order, expert in enumerate(largest_indices(scores, self.k)):
            if order < self.choices_of(token) and reached < self.p:
                made.append(Choice(group, token, order, expert, scores[expert], scores.max().item()))
            reached += scores[expert].item()
        return made

    def balance(self, groups: list[Group], scores: dict[Token, Tensor], choices: list[Choice]) -> Tensor:
        return self.k * super().balance(groups, scores, choices)  # it counts every choice


@dataclass
class SparseMixer(TopK):
    """SparseMixer (arXiv 2310.00811): each choice one of the nearly best that are left. Without draws as in eval."""

    tolerance: float = 0.01

    def choose(self, group: Group, token: Token, logits: Tensor, scores: Tensor) -> list[Choice]:
        made, left = [], list(range(self.num_experts))
        for order in range(self.k):
            values = logits.tolist()
            best = max(values[i] for i in left)
            likeliest = next(i for i in left if values[i] == best)
            near = [i for i in left if best - values[i] <= 2 * self.tolerance * max(abs(values[i]), best)]
            expert = likeliest
            if token.exponential is not None:
                noise = token.exponential[:, order].log().tolist()
                expert = max(near, key=lambda i: (values[i] - noise[i], -i))
            weight = logits[near].softmax(0)[near.index(expert)]
            if token.whole is not None and expert != likeliest and token.whole[0, order] <= 0.75:
                weight = weight - weight.detach() * (2 / 3)
            if order < self.choices_of(token):
                made.append(Choice(group, token, order, expert, weight, scores.max().item()))
            left.remove(expert)
        return made


@dataclass
class NoisyTopK(TokenChoice):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538). Tokens without noise are routed as in eval."""

    w_noise: Tensor | None = None  # (*outer, d, e)

    def decide(self, groups: list[Group]) -> ReferenceDecision:
        choices, logits = [], {}
        importance: dict[tuple, Tensor] = {}
        load: dict[tuple, Tensor] = {}
        for group in groups:
            for token in group.tokens:
                logits[token], spread, noisy = self.logits(group, token)
                made = self.choose(group, token, noisy)
                choices += made
                if token.importance == 1:
                    zeros = torch.zeros_like(noisy)
                    importance[group.outer_experts] = importance.get(group.outer_experts, zeros) + self.gates(made)
                    chances = self.chances(logits[token], spread, noisy)
                    load[group.outer_experts] = load.get(group.outer_experts, zeros) + chances
        losses = {
            "importance": compute_mean([squared_variation(v) for v in importance.values()], self.w_gating),
            "load": compute_mean([squared_variation(v) for v in load.values()], self.w_gating),
        }
        z = z_loss(groups, logits, self.w_gating)  # of the scores before noise
        return ReferenceDecision(self.assign_choices(groups, choices), losses["importance"] + losses["load"], z, losses)

    def logits(self, group: Group, token: Token) -> tuple[Tensor, Tensor, Tensor]:
        x = router_input(token)
        clean = x @ self.w_gating[group.outer_experts]
        spread = torch.nn.functional.softplus(x @ self.w_noise[group.outer_experts])
        return clean, spread, clean if token.noise is None else clean + token.noise * spread

    def choose(self, group: Group, token: Token, noisy: Tensor) -> list[Choice]:
        best = largest_indices(noisy.detach(), self.k)
        compared = noisy if self.k == 1 else torch.stack([noisy[i] for i in best])
        top = compared.softmax(0).max().item()
        experts = best[: self.choices_of(token)]
        if not experts:
            return []
        weights = torch.stack([noisy[i] for i in experts]).softmax(0)
        return [Choice(group, token, order, expert, weights[order], top) for order, expert in enumerate(experts)]

    def gates(self, choices: list[Choice]) -> Tensor:
        """G(x): the weights of one token's choices, 0 elsewhere."""
        weight = {choice.expert: choice.weight for choice in choices}
        return torch.stack([weight.get(i, self.w_gating.new_zeros(())) for i in range(self.num_experts)])

    def chances(self, clean: Tensor, spread: Tensor, noisy: Tensor) -> Tensor:
        """P(x, i): the chance that expert i is among the k best if only its own noise were drawn again."""
        rows = []
        for i in range(self.num_experts):
            others = [noisy[j] for j in range(self.num_experts) if j != i]
            kth = sorted(others, key=lambda value: -value.item())[self.k - 1]
            rows.append(0.5 * (1 + torch.erf((clean[i] - kth) / spread[i] / math.sqrt(2))))
        return torch.stack(rows)


@dataclass
class ExpertChoice:
    """Every expert takes its best tokens (Zhou et al. 2022, arXiv 2202.09368)."""

    w_gating: Tensor
    capacity_factor: float = 2.0

    @property
    def num_experts(self) -> int:
        return self.w_gating.shape[-1]

    def limit(self, length: int) -> int:
        return min(length, max(1, int(length * self.capacity_factor / self.num_experts)))

    def decide(self, groups: list[Group]) -> ReferenceDecision:
        choices, logits = [], {}
        for group in groups:
            for token in group.tokens:
                logits[token] = router_input(token) @ self.w_gating
            scores = [logits[token].softmax(0) for token in group.tokens]
            for expert in range(self.num_experts if scores else 0):
                best = largest_indices(torch.stack([s[expert] for s in scores]), self.limit(len(scores)))
                for slot, t in enumerate(best):
                    choices.append(Choice(group, group.tokens[t], expert, expert, scores[t][expert], slot=slot))
        return ReferenceDecision(choices, self.w_gating.new_zeros(()), z_loss(groups, logits, self.w_gating))


# Experts: callables (expert, x (d,)) -> (d,)


def feed_forward(w1, w2, activation, b1=None, b2=None):
    """Two-layer experts from stacked weights w1 (*e, d, h), w2 (*e, h, d)."""

    def expert(index, x: Tensor) -> Tensor:
        hidden = x @ w1[index]
        hidden = activation(hidden if b1 is None else hidden + b1[index])
        out = hidden @ w2[index]
        return out if b2 is None else out + b2[index]

    return expert


def gated_feed_forward(w1, w3, w2, activation, b1=None, b3=None, b2=None, of_both=False):
    """Gated experts: activation(x·w1) · (x·w3), or activation(x·w1, x·w3), then ·w2."""

    def expert(index, x: Tensor) -> Tensor:
        gate, value = x @ w1[index], x @ w3[index]
        gate = gate if b1 is None else gate + b1[index]
        value = value if b3 is None else value + b3[index]
        hidden = activation(gate, value) if of_both else activation(gate) * value
        out = hidden @ w2[index]
        return out if b2 is None else out + b2[index]

    return expert


def wrap_modules(modules):
    """Experts that are separate modules (rows, d) -> (rows, d)."""
    return lambda index, x: modules[index](x.unsqueeze(0)).squeeze(0)


@dataclass
class WeighedInput:
    """Experts that read the token times its weight, and whose results are not weighed."""

    expert: Callable[[Any, Tensor], Tensor]

    def weighted(self, weight: Tensor, index, x: Tensor) -> Tensor:
        return self.expert(index, weight * x)


def apply_weight(experts, weight: Tensor, index, x: Tensor) -> Tensor:
    """What one choice adds to its token."""
    return experts.weighted(weight, index, x) if hasattr(experts, "weighted") else weight * experts(index, x)


# Layers


def split_groups(positions: int, group_size: int) -> int:
    """Number of groups that `positions` are cut into: at least `group_size` long, all of one length."""
    groups = max(1, positions // group_size)
    while positions % groups:
        groups += 1
    return groups


def regroup(x: Tensor, mask: Tensor | None, group_size: int | None) -> tuple[Tensor, Tensor | None]:
    """(..., n, d) as (b, n, d), cut anew if `group_size` is set; mask likewise."""
    *leading, n, d = x.shape
    b = math.prod(leading)
    if group_size is not None:
        b, n = (b2 := split_groups(b * n, group_size)), b * n // b2
    return x.reshape(b, n, d), None if mask is None else mask.reshape(b, n)


def regroup_side(side: dict[str, Tensor] | None, inputs: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Side inputs (..., n, *rest) as (b, n, *rest), by the groups x (b, n, d) of the inputs."""
    return {name: value.reshape(*x.shape[:2], *value.shape[inputs.ndim - 1 :]) for name, value in (side or {}).items()}


@dataclass
class Output:
    """What a layer computed."""

    out: Tensor  # the shape of the inputs
    aux_loss: Tensor
    decisions: list[ReferenceDecision]  # one a level


def combine_outputs(inputs, mask, parts: dict, shared_expert, after) -> Tensor:
    """Sum of each position's parts (flat position -> vectors) through `after`, plus the shared expert; 0 where it is
    masked."""
    rows = []
    flat = inputs.reshape(-1, inputs.shape[-1])
    for position in range(len(flat)):
        if mask is not None and not mask.reshape(-1)[position]:
            rows.append(torch.zeros_like(flat[position]))
            continue
        total = sum(parts[position][1:], parts[position][0]) if parts[position] else torch.zeros_like(flat[position])
        if after is not None and parts[position]:
            total = after(total)
        if shared_expert is not None:
            total = total + shared_expert(flat[position].unsqueeze(0)).squeeze(0)
        rows.append(total)
    return torch.stack(rows).reshape(inputs.shape) if rows else inputs * 1


def weighted_losses(decisions: list[ReferenceDecision], loss_coef: float, z_loss_coef: float) -> Tensor:
    return torch.stack([loss_coef * d.balance_loss + z_loss_coef * d.z_loss for d in decisions]).sum()


def run_layer(
    inputs,
    gates,
    experts,
    *,
    mask=None,
    group_size=None,
    shared_expert=None,
    loss_coef=1e-2,
    z_loss_coef=0.0,
    draws=(),
    side=None,
    after=None,
):
    """The layer of one gate or two; of two, experts are called with the pair (outer expert, inner expert).

    `draws`: of each gate random numbers by name (uniforms, noise, jitter), each shaped like the groups, at level two
    (eo, groups, slots of a group, ...); `side`: side inputs by name, shaped like the inputs; `after`: on the sum of a
    token's experts.
    """
    x, real = regroup(inputs, mask, group_size)
    first_draws, inner_draws = [*(of_gate or {} for of_gate in draws), {}, {}][:2]
    groups = make_groups(x, mask=real, **first_draws, **regroup_side(side, inputs, x))
    decisions, source = [gates[0].decide(groups)], {}
    if len(gates) == 2:
        inner_groups, source = second_level_groups(gates[0], groups, decisions[0].choices, x, group_size, inner_draws)
        decisions.append(gates[1].decide(inner_groups))
    parts = defaultdict(list)
    for choice in decisions[-1].choices:
        if choice.kept and choice.weight != 0:
            first, weight, expert = choice, choice.weight, choice.expert
            if len(gates) == 2:
                first = source[choice.token]
                weight, expert = first.weight * weight, (choice.group.outer_experts[0], expert)
            position = first.group.index[-1] * x.shape[1] + first.token.position
            parts[position].append(apply_weight(experts, weight, expert, first.token.x))
    out = combine_outputs(inputs, mask, parts, shared_expert, after)
    return Output(out, weighted_losses(decisions, loss_coef, z_loss_coef), decisions)


def second_level_groups(gate, groups, choices, x, group_size, draws) -> tuple[list[Group], dict[Token, Choice]]:
    """Level two's groups, and for each of their tokens that is not an empty slot the level-one choice it came from."""
    source: dict[Token, Choice] = {}
    slots = {(c.expert, c.group.index[-1], c.slot): c for c in choices if c.kept and c.weight != 0}
    dropless = gate.capacity_factor is None
    made = []
    for outer in range(gate.num_experts):
        if dropless:
            made += [dropless_group(gate, outer, group, slots, source) for group in groups]
        else:
            made += slot_groups(gate, outer, groups, slots, source, x, group_size)
    for group in made:
        for token in group.tokens:
            for name, values in draws.items():
                setattr(token, name, values[group.index][token.position])
    return made, source


def dropless_group(gate, outer: int, group: Group, slots: dict, source: dict) -> Group:
    """What a level without a capacity hands on: its choices in slot order, and the length of a balanced share."""
    mine = sorted((slot, c) for (e, g, slot), c in slots.items() if (e, g) == (outer, group.index[-1]))
    tokens = []
    for slot, choice in mine:
        tokens.append(to_inner_token(choice, slot, gate.is_handed_on(choice)))
        source[tokens[-1]] = choice
    choices = min(gate.k, gate.num_experts)  # of a token, among different outer experts
    return Group(tokens, group.length * choices / gate.num_experts, (outer, group.index[-1]))


def slot_groups(gate, outer: int, groups, slots: dict, source: dict, x: Tensor, group_size) -> list[Group]:
    """The slots of one outer expert as groups: one for each group of level one, or cut anew by `group_size`."""
    b, n, d = x.shape
    c = gate.limit(n)
    places: list[Token | None] = []  # every slot of the padded layout, None beyond what a group's real length gives
    for group in groups:
        for slot in range(c):
            choice = slots.get((outer, group.index[-1], slot))
            token = None
            if choice is not None:
                token = to_inner_token(choice, 0, gate.is_handed_on(choice))
                source[token] = choice
            elif slot < gate.limit(group.length):
                token = Token(x.new_zeros(d), 0, 0.0)
            places.append(token)
    count = b if group_size is None else split_groups(b * c, group_size)
    length = len(places) // count if count else 0
    made = []
    for index in range(count):
        part = places[index * length : (index + 1) * length]
        for position, token in enumerate(part):
            if token is not None:
                token.position = position
        tokens = [token for token in part if token is not None]
        made.append(Group(tokens, len(tokens), (outer, index)))
    return made
