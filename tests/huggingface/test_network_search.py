"""Feed-forward networks are found by structure: what is one, what is none, and what is refused before it is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.pytorch_utils import Conv1D

from mixture_of_experts.huggingface import Adapter, replace_ffn, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.huggingface.replacement.network_search import search_networks
from tests.support.family_table import try_family
from tests.support.transformers_families import list_other_classes, list_text_types
from tests.support.transformers_models import ARCHITECTURES

D, H = 16, 24


class FFNParts(nn.Module):
    """Linear layers and a forward that somebody gives."""

    def __init__(self, compute: Callable[..., Tensor], **parts: nn.Module | float) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = compute
        self.register_buffer("calls", torch.zeros(()))


class FFNModule(FFNParts):
    def forward(self, x):
        return self.compute(self, x)


class InlineFFN(FFNParts):
    """A layer that calls the linear layers itself, between its norm and its residual path."""

    def __init__(self, compute: Callable[..., Tensor], **parts: nn.Module | float) -> None:
        super().__init__(compute, **parts)
        self.norm = nn.LayerNorm(D)

    def forward(self, x, residual=None):
        self.calls += 1
        return self.norm(x + self.compute(self, x))


class Model(nn.Module):
    """Residual blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def make_up(out: int = H, bias: bool = True) -> nn.Linear:
    return nn.Linear(D, out, bias=bias)


def make_down(bias: bool = True) -> nn.Linear:
    return nn.Linear(H, D, bias=bias)


def make_fused(order: str) -> Callable[..., Tensor]:
    def compute(m, x):
        both = m.a(x)
        if order == "interleaved":
            gate, value = both[..., ::2], both[..., 1::2]
        else:
            gate, value = both.chunk(2, dim=-1)
        return m.c(F.silu(gate) * value if order != "up_gate" else gate * F.silu(value))

    return compute


def make_pair(m, x):
    return m.c(m.act(m.a(x)))


PAIR = dict(a=make_up(), act=nn.ReLU(), c=make_down())
DROPS = dict(PAIR, drop=nn.Dropout(0.3))
WHOLE = {
    "function": (lambda m, x: m.c(F.gelu(m.a(x))), dict(a=make_up(), c=make_down())),
    "module": (make_pair, dict(PAIR, act=QuickGELUActivation())),
    "in place": (make_pair, dict(PAIR, act=nn.SiLU(inplace=True))),
    "dropout in the activation": (make_pair, dict(PAIR, act=nn.Sequential(nn.GELU(), nn.Dropout(0.3)))),
    "squared": (lambda m, x: m.c(torch.square(F.relu(m.a(x)))), dict(a=make_up(), c=make_down())),
    "conv1d": (lambda m, x: m.c(torch.tanh(m.a(x))), dict(a=Conv1D(H, D), c=Conv1D(D, H))),
    "one bias": (lambda m, x: m.c(F.relu(m.a(x))), dict(a=make_up(bias=False), c=make_down())),
    "gated": (lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), dict(a=make_up(), b=make_up(), c=make_down())),
    "dropout before the product": (lambda m, x: m.c(m.drop(F.silu(m.a(x))) * m.b(x)), dict(DROPS, b=make_up())),
    "gated the other way": (
        lambda m, x: m.c(m.a(x) * F.silu(m.b(x))),
        dict(a=make_up(), b=make_up(bias=False), c=make_down()),
    ),
    "sigmoid": (lambda m, x: m.c(F.glu(m.a(x))), dict(a=make_up(2 * H), c=make_down())),
    **{
        order: (make_fused(order), dict(a=make_up(2 * H), c=make_down()))
        for order in ("gate_up", "up_gate", "interleaved")
    },
    "dropouts": (lambda m, x: m.late(m.c(m.drop(F.relu(m.a(x))))), dict(DROPS, late=nn.Dropout(0.2))),
    "numbers": (
        lambda m, x: F.dropout(m.c(F.dropout(F.relu(m.a(x)), m.p, m.training)), 0.2, m.training),
        dict(a=make_up(), c=make_down(), p=0.3),
    ),
    "sequence": (lambda m, x: m.all(x), dict(all=nn.Sequential(make_up(), nn.GELU(), nn.Dropout(0.1), make_down()))),
}
INLINE = {
    "module": (make_pair, dict(PAIR, act=nn.GELU())),
    "gated": (lambda m, x: m.c(m.act(m.a(x)) * m.b(x)), dict(a=make_up(), b=make_up(), act=nn.SiLU(), c=make_down())),
    "dropout in the activation": WHOLE["dropout in the activation"],
    "first part": (
        lambda m, x: m.c(m.first(x)),
        dict(first=FFNModule(lambda m, x: F.gelu(m.a(x)), a=make_up()), c=make_down()),
    ),
    "number": (lambda m, x: m.c(F.dropout(m.act(m.a(x)), m.p, m.training)), dict(PAIR, p=0.3)),
    "one dropout twice": (lambda m, x: m.drop(m.c(m.drop(m.act(m.a(x))))), DROPS),
    "one number twice": (
        lambda m, x: F.dropout(m.c(F.dropout(m.act(m.a(x)), m.p, m.training)), m.p, m.training),
        dict(PAIR, p=0.3),
    ),
}
FORMS = {
    f"{kind.__name__}, {name}": (kind, *form)
    for kind, of in ((FFNModule, WHOLE), (InlineFFN, INLINE))
    for name, form in of.items()
}


def seeded_forward(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(x)


def make_module(kind: type[FFNParts], compute: Callable[..., Tensor], parts: dict) -> nn.Module:
    model = Model(*(kind(compute, **copy.deepcopy(parts)) for _ in range(2)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_networks_of_every_form(form):
    """Equal in evaluation; and in training with one expert, which draws the same dropout from the same seed."""
    model, x = make_module(*FORMS[form]), torch.randn(2, 5, D)
    dense = copy.deepcopy(model)
    names = upcycle(model.eval(), num_experts=4, k=2)
    assert len(names) == len(find_feed_forwards(model)) == 2
    expected = dense.eval()(x)
    assert (expected - x).std() > 0.1
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)

    model = copy.deepcopy(dense)
    upcycle(model, num_experts=1, k=1)
    expected = seeded_forward(dense.train(), x)
    torch.testing.assert_close(seeded_forward(model.train(), x), expected, atol=1e-5, rtol=1e-5)
    drops = any(isinstance(m, nn.Dropout) for m in dense.modules()) or hasattr(dense.blocks[0], "p")
    assert drops == bool((expected - dense.eval()(x)).abs().max() > 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_on_the_meta_device_the_same_is_found(form):
    model = make_module(*FORMS[form])
    found = [(place.name, repr(place.adapter)) for place in search_networks(model, {})[0]]
    assert [
        (place.name, repr(place.adapter)) for place in search_networks(copy.deepcopy(model).to("meta"), {})[0]
    ] == found
    with torch.device("meta"):  # as transformers builds what it loads
        assert [(place.name, repr(place.adapter)) for place in search_networks(model, {})[0]] == found


class SideAdapter(FFNModule):
    pass


class Routed(nn.Module):
    """A layer with a router: its shared expert is no network of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(D, 2), FFNModule(make_pair, **PAIR)
        self.experts = nn.ModuleList([FFNModule(make_pair, **PAIR)])

    def forward(self, x):
        return self.shared(x) + self.experts[0](x) * self.router(x).softmax(-1)[..., :1]


NONE = {
    "adapter": Model(SideAdapter(make_pair, **PAIR)),
    "router": Model(Routed()),
    "outside of blocks": FFNModule(make_pair, **PAIR),
    "narrow": Model(FFNModule(make_pair, a=nn.Linear(D, 4), act=nn.ReLU(), c=nn.Linear(4, D))),
    "another width": Model(
        FFNModule(lambda m, x: x + make_pair(m, x)[..., :1], a=make_up(), act=nn.ReLU(), c=nn.Linear(H, 3))
    ),
    "another width than the block's": Model(
        InlineFFN(
            lambda m, x: x * make_pair(m, x[..., :2])[..., :1], a=nn.Linear(2, H), act=nn.ReLU(), c=nn.Linear(H, 2)
        )
    ),
    "no activation": Model(FFNModule(lambda m, x: m.c(m.a(x)), a=make_up(), c=make_down())),
    "written into another tensor": Model(
        InlineFFN(
            lambda m, x: (lambda h, t: (t.copy_(h[0, 0, 0]), m.c(m.act(h)) + t)[1])(m.a(x), torch.zeros(())), **PAIR
        )
    ),
    "not of a token alone": Model(
        FFNModule(lambda m, x: m.c(m.mix(m.a(x).mT).mT), a=make_up(), mix=nn.Conv1d(H, H, 3, padding=1), c=make_down())
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_non_networks_are_not_found(name):
    model = copy.deepcopy(NONE[name])
    state = model.state_dict().keys()
    with pytest.raises(ValueError, match="no feed-forward network was found"):
        replace_ffn(model)
    assert model.state_dict().keys() == state


LOST_NETWORKS = {
    "function in the code of": (
        lambda m, x: m.c(F.gelu(m.a(x))),
        dict(a=make_up(), c=make_down()),
        "Inline.* implements the computation between the linear",
    ),
    "units together": (make_pair, dict(PAIR, act=nn.Sequential(nn.ReLU(), nn.Softmax(-1))), "no known activation"),
    "norm": (lambda m, x: m.c(m.sub(m.act(m.a(x)))), dict(PAIR, sub=nn.LayerNorm(H)), "no known activation"),
    "used elsewhere": (lambda m, x: make_pair(m, x) + m.a(x)[..., :D], PAIR, "also used elsewhere"),
    "called on something else too": (lambda m, x: make_pair(m, x) + make_pair(m, 2 * x), PAIR, "also used elsewhere"),
    "last layer twice": (
        lambda m, x: make_pair(m, x) + m.c(F.pad(x, (0, H - D))),
        PAIR,
        "c is called more than once",
    ),
    "read elsewhere": (lambda m, x: (lambda h: m.c(m.act(h)) + h[..., :D])(m.a(x)), PAIR, "also used elsewhere"),
    "another's activation": (lambda m, x: make_pair(m, x) + m.act(x), PAIR, "act is called more than once"),
    "another's dropout": (lambda m, x: m.c(m.drop(m.act(m.a(x)))) + m.drop(x), DROPS, "drop is called more than once"),
    "another's number": (
        lambda m, x: m.c(F.dropout(m.act(m.a(x)), m.p, m.training)) + F.dropout(x, m.p, m.training),
        dict(PAIR, p=0.3),
        "cannot be disabled separately",
    ),
    "dropout before tanh": (lambda m, x: m.c(m.act(m.drop(m.a(x)))), dict(DROPS, act=nn.Tanh()), "no known activation"),
    "dropout first": (lambda m, x: m.c(m.act(m.drop(m.a(x)))), DROPS, "no known activation"),
    "two dropouts": (
        lambda m, x: m.c(m.drop(m.more(m.act(m.a(x))))),
        dict(DROPS, more=nn.Dropout(0.5)),
        "no known activation",
    ),
    "halves in the code of": (
        lambda m, x: (lambda both: m.c(m.act(both[..., :H]) * both[..., H:]))(m.a(x)),
        dict(PAIR, a=make_up(2 * H), act=nn.SiLU()),
        "Inline.* implements the computation between",
    ),
}


@pytest.mark.parametrize("name", LOST_NETWORKS)
@pytest.mark.parametrize("beside", [False, True])
def test_rejects_unremovable_experts(name, beside):
    """With the reason, alone or beside a network that can: nothing is changed."""
    compute, parts, reason = LOST_NETWORKS[name]
    model = Model(
        InlineFFN(compute, **copy.deepcopy(parts)), *([FFNModule(make_pair, **copy.deepcopy(PAIR))] if beside else [])
    )
    state = model.state_dict().keys()
    with pytest.raises(ValueError, match=reason) as error:
        upcycle(model, num_experts=2)
    assert model.state_dict().keys() == state
    if beside:
        assert "some feed-forward networks of Model can be replaced (blocks.*)" in str(error.value)
        assert replace_ffn(model, num_experts=2, layers=[1]) == ["blocks.1"]  # asked for by name, it is taken


def test_one_block_that_is_not_as_the_others():
    """Of one class in two blocks, a network in the one alone is no network of the family."""
    blocks = [FFNModule(make_pair, **copy.deepcopy(PAIR)) for _ in range(3)]
    blocks[1].compute = lambda m, x: m.c(m.act(m.a(x)).cumsum(-1))
    blocks[2].compute = lambda m, x: m.c.weight.sum() * m.a(x)[..., :D]
    for block in blocks[1:]:
        model = Model(blocks[0], block)
        with pytest.raises(ValueError, match="some feed-forward networks of Model can be replaced"):
            upcycle(model, num_experts=2)
        assert not find_feed_forwards(model)


def test_searching_changes_nothing():
    """No buffer that a forward counts in, no mode, no draw of a random number, no attribute; and no hook runs."""
    model = make_module(*FORMS["InlineFFN, one dropout twice"]).train()
    model.blocks[1].eval()
    for module in model.modules():
        module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = [dict(vars(module)) for module in model.modules()]
    assert len(search_networks(model, {})[0]) == 2
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(vars(module) == before for module, before in zip(model.modules(), attributes, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rejects_wrong_adapter(name):
    """An adapter that somebody gives is held to what the module computes."""
    found, _ = search_networks(ARCHITECTURES[name].build(), {})
    kind, adapter = type(found[0].module).__name__, found[0].adapter
    if adapter.slot:
        pytest.skip("the layer does more than the network")
    model = ARCHITECTURES[name].build()
    wrong = Adapter(adapter.up, adapter.down, adapter.gate, nn.Tanh(), halves=adapter.halves)
    with pytest.raises(ValueError, match=r"does not match Adapter.* the adapter is wrong"):
        replace_ffn(model, adapters={kind: wrong})
    assert not find_feed_forwards(model)


#: a forward that takes the residual; functions in the code; shared layers; one dropout in two places; norms of its own
SOME = ["bloom", "mpt", "xlnet", "esm", "albert", "gte", "mobilebert", "cpmant", "apertus"]
PICTURES_AND_SOUND = ["clip", "siglip", "vit", "deit", "beit", "dinov2", "imagegpt", "wav2vec2", "hubert"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of a table that a tiny MobileBERT has not
@pytest.mark.parametrize("name", [*SOME, *PICTURES_AND_SOUND])
def test_families_of_transformers(name):
    result = try_family(name, list_other_classes()[name] if name in PICTURES_AND_SOUND else None)
    assert result.kind == "upcycles", result


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of transformers, about configurations
def test_all_families():
    kinds = {name: try_family(name).kind for name in list_text_types()}
    assert "wrong" not in kinds.values(), kinds
    assert list(kinds.values()).count("upcycles") >= 180
