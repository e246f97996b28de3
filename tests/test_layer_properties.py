"""What layers and routers guarantee, over many random configurations (float64); test_matrix.py has the reference."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import layer_variants
from support import strategies as make

from mixture_of_experts import HeirarchicalMoE, MoE

LEVEL = st.sampled_from([3, 2, 4, 1])  # experts of one level of two


@st.composite
def draw_layers_without_noise(draw, kind: str | tuple[str, str], **limits) -> Any:
    """In eval, with routers that draw nothing: of one kind, or a pair of kinds for two levels."""
    dim, kinds = draw(make.dims), (kind,) if isinstance(kind, str) else kind
    sizes = tuple(draw(make.draw_counts(each, *([LEVEL] if len(kinds) == 2 else []))) for each in kinds)
    drawn = [draw(make.TOKEN_CHOICE[of](e, **limits)) for of, e in zip(kinds, sizes, strict=True)]
    gates = [r.build(dim, e, draw(make.seeds), sizes[:i]) for i, (r, e) in enumerate(zip(drawn, sizes, strict=True))]
    num_experts = sizes[0] if len(sizes) == 1 else sizes
    experts = make.Bank("gated").build(dim, num_experts, draw(make.seeds))
    names = ("gate",) if len(gates) == 1 else ("gate_outer", "gate_inner")
    layer: Any = MoE if len(gates) == 1 else HeirarchicalMoE
    given = dict(zip(names, gates, strict=True))
    return layer(dim, num_experts, experts=experts, **given).eval()


# Guarantees of both layers, in eval with routers that draw nothing, a sequence being a group

PAIRS = [(outer, inner) for outer in make.TOKEN_CHOICE for inner in make.TOKEN_CHOICE]


@pytest.mark.parametrize("kind", [*make.TOKEN_CHOICE, *PAIRS], ids=str)
@given(data=st.data())
@settings(max_examples=10)
def test_token_priority_is_causal(kind, data):
    """Changing tokens after t changes no output up to t."""
    layer = data.draw(draw_layers_without_noise(kind, priority="token"))
    n = data.draw(st.sampled_from([8, 5, 3, 2]))
    t = data.draw(st.sampled_from([n // 2, 0, n - 2]))
    gen = make.make_generator(data.draw(make.seeds))
    x = make.normal(gen, 2, n, layer.dim)
    changed = torch.cat([x[:, : t + 1], 3 * make.normal(gen, 2, n - t - 1, layer.dim)], dim=1)
    mask = data.draw(make.masks(2, n))
    before, after = (layer(v, mask=mask)[0][:, : t + 1] for v in (x, changed))
    make.assert_same(after, before, "out")


EXTREMES = {
    "saturated": lambda x: x * 1e4,
    "saturated down": lambda x: -x.abs() * 1e4,
    "equal tokens": torch.zeros_like,
    "all masked": lambda x: x * torch.nan,
    "no tokens": lambda x: x[:, :0],
    "no groups": lambda x: x[:0],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(
    "path", [*layer_variants.QUICK_LAYER_VARIANTS, *map(layer_variants.RouterVariant, layer_variants.ROUTERS)], ids=str
)
def test_no_nan(path, extreme):
    for training, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        layer, x = path.build().to(dtype).train(training), torch.randn(2, 5, layer_variants.DIM, dtype=dtype)
        x = EXTREMES[extreme](x).requires_grad_()
        mask = torch.zeros(x.shape[:-1], dtype=torch.bool) if extreme == "all masked" else None
        out, aux_loss = layer(x, mask=mask)
        for tensor in (out, aux_loss, *layer_variants.compute_gradients(layer, x, (out, aux_loss)).values()):
            assert tensor.isfinite().all()
        if extreme in ("all masked", "no tokens", "no groups"):
            assert aux_loss == 0
            assert out.count_nonzero() == 0


# Queues of routers


def compute_top_scores(router, gate, x) -> list[float]:
    """What priority 'score' sorts the tokens (n, d) by: the top probability, or the top sigmoid, of an expert that may
    be chosen."""
    logits = (x @ gate.w_gating).detach()
    if getattr(gate, "b_gating", None) is not None:
        logits = logits + gate.b_gating.detach()
    if router.kind == "noisy" and gate.k > 1:  # a probability among the k best
        logits = logits.topk(gate.k).values
    scores = logits.sigmoid() if router.arguments.get("score") == "sigmoid" else logits.softmax(-1)
    if getattr(gate, "num_groups", None) is not None:
        bias = 0 if gate.expert_bias is None else gate.expert_bias
        parts = (scores + bias).unflatten(-1, (gate.num_groups, -1))
        sums = parts.topk(min(2, parts.shape[-1])).values.sum(-1)
        best = sums.sort(descending=True, stable=True).indices[:, : gate.top_groups]
        is_open = torch.zeros_like(sums).scatter(-1, best, 1.0)
        scores = (scores.unflatten(-1, (gate.num_groups, -1)) * is_open.unsqueeze(-1)).flatten(-2)
    return scores.amax(-1).tolist()


@pytest.mark.parametrize("kind", make.TOKEN_CHOICE)
@given(data=st.data())
def test_slot_assignment_by_priority(kind, data):
    """What each priority promises, stated without a queue; an expert is never idle while a choice of it is dropped."""
    num_experts = data.draw(make.draw_counts(kind))
    router = data.draw(make.TOKEN_CHOICE[kind](num_experts, dropless=False))
    gate = router.build(data.draw(make.dims), num_experts, data.draw(make.seeds)).eval()
    n = data.draw(st.sampled_from([8, 5, 11, 3, 2]))
    x = make.normal(make.make_generator(data.draw(make.seeds)), 1, n, gate.dim)
    routing = gate(x, importance=data.draw(make.importances(1, n)))
    top = compute_top_scores(router, gate, x[0])
    comes_first = {
        "token": lambda token, order: (token, order),
        "choice": lambda token, order: (order, token),
        "score": lambda token, order: (order, -top[token], token),
    }[router.arguments["priority"]]
    for expert in range(routing.num_experts):
        asking = [i for i in range(n * routing.k) if routing.sent[0, i] and routing.expert[0, i] == expert]
        place = {i: comes_first(*divmod(i, routing.k)) for i in asking}
        slots = {i: routing.position[0, i].item() for i in asking}
        served = [i for i in asking if slots[i] < routing.capacity]
        assert sorted(slots[i] for i in served) == list(range(min(len(asking), routing.capacity)))
        refused = [place[i] for i in asking if i not in served]
        assert all(place[i] < other for i in served for other in refused)
