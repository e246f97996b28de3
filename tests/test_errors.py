"""Bad input gets an error that names the value, what is allowed and what to do, and changes nothing."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from mixture_of_experts import (
    ExpertChoiceGating,
    ExpertList,
    Experts,
    GatedExperts,
    HashGating,
    HeirarchicalMoE,
    HierarchicalMoE,
    MoE,
    NoisyTopKGating,
    TokenChoiceGate,
    Top2Gating,
    TopKGating,
    collect_aux,
)
from mixture_of_experts.dispatch.groups import group_shape
from mixture_of_experts.ops import ClampedSwiGLU
from mixture_of_experts.replay import record_routing
from mixture_of_experts.stats import routing_of, track_routing
from mixture_of_experts.summary import summary
from mixture_of_experts.unstack import restack, unstack

LAYERS = [MoE, HeirarchicalMoE]


def make_layer(kind, **options):
    return kind(8, (2, 2) if kind is HeirarchicalMoE else 4, **options)


BAD_ARGUMENTS = [
    ({"second_policy_train": "sometimes"}, "'sometimes'.*|.*'all', 'none', 'threshold', 'random'"),
    ({"second_policy_eval": None}, "None"),
    ({"priority": "first"}, "'choice', 'token', 'score'.*'first'"),
    ({"capacity_factor_train": float("inf")}, "inf.*None for no token dropping"),
    ({"capacity_factor_train": float("nan")}, "nan"),
    ({"capacity_factor_eval": 0.0}, "above 0.0, got 0.0"),
    ({"capacity_factor_eval": -1}, "-1"),
    ({"capacity_factor_eval": "2"}, "'2'"),
    ({"second_threshold_train": -0.1}, "at least 0.0, got -0.1"),
    ({"second_threshold_eval": float("nan")}, "nan"),
    ({"min_expert_capacity": 0}, "at least 1, got 0"),
    ({"min_expert_capacity": 1.5}, "integer.*1.5"),
    ({"loss_coef": float("nan")}, "loss_coef.*nan"),
    ({"z_loss_coef": -1.0}, "z_loss_coef.*-1.0"),
    ({"group_size": 0}, "group_size.*0"),
    ({"hidden_dim": 0}, "hidden_dim.*0"),
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_argument(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_layer(kind, **options)
    assert next(iter(options)) in str(error.value)


@pytest.mark.parametrize("kind", LAYERS)
def test_unknown_keyword(kind):
    with pytest.raises(TypeError, match=r"second_policy"):
        make_layer(kind, second_policy="all")
    moe = make_layer(kind)
    with pytest.raises(TypeError, match=r"attention_mask"):
        moe(torch.randn(1, 5, 8), attention_mask=None)


@pytest.mark.parametrize("kind", LAYERS)
def test_bad_inputs(kind):
    moe = make_layer(kind)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    with pytest.raises(ValueError, match=r"n, 8\), got \(2, 5, 7\)"):
        moe(torch.randn(2, 5, 7))
    with pytest.raises(ValueError, match=r"got \(8,\)"):
        moe(torch.zeros(8))
    with pytest.raises(TypeError, match=r"floating point, got torch.int64"):
        moe(torch.zeros(2, 5, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tensor"):
        moe([[0.0] * 8])
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\).*got \(5,\)"):
        moe(x, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"boolean.*float32.*mask.bool\(\)"):
        moe(x, mask=torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"list"):
        moe(x, mask=[True] * 5)
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


def test_gate_inputs():
    gate = Top2Gating(8, 4)
    with pytest.raises(ValueError, match=r"\(b, n, 8\), got \(5, 8\)|got \(5, 8\)"):
        gate(torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"importance must have shape \(2, 5\)"):
        gate(torch.zeros(2, 5, 8), importance=torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"importance.*int64"):
        gate(torch.zeros(2, 5, 8), importance=torch.ones(2, 5, dtype=torch.int64))
    inner = Top2Gating(8, 4, outer_expert_dims=(3,))
    with pytest.raises(ValueError, match=r"\(3, b, n, 8\), got \(2, 1, 5, 8\)"):
        inner(torch.zeros(2, 1, 5, 8))


LINEAR, NO_DTYPES = nn.Linear(8, 8), ("float32", torch.int64, float)
REFUSED = [
    # arguments beside a gate that has them
    (
        ValueError,
        "capacity_factor_train=1.0 cannot be combined with gate",
        lambda: MoE(8, gate=FOUR, capacity_factor_train=1.0),
    ),
    (ValueError, "priority='token'", lambda: MoE(8, gate=FOUR, priority="token")),
    (ValueError, "second_place_loss=True", lambda: make_levels(gate_outer=TopKGating(8, 2), second_place_loss=True)),
    (ValueError, "capacity_factor_second_level=2.0", lambda: make_levels(capacity_factor_second_level=2.0)),
    (
        ValueError,
        "hidden_dim=5 cannot be combined with experts",
        lambda: MoE(8, 2, experts=Experts(8, 2), hidden_dim=5),
    ),
    (
        ValueError,
        "activation=.*ReLU.* cannot be combined with experts",
        lambda: MoE(8, 2, experts=Experts(8, 2), activation=nn.ReLU),
    ),
    (
        ValueError,
        "hidden_dim=5 cannot be combined with experts",
        lambda: HeirarchicalMoE(8, (2, 2), experts=Experts(8, (2, 2)), hidden_dim=5),
    ),
    # numbers and choices
    *((ValueError, "num_experts must be an integer", lambda e=e: MoE(8, e)) for e in (0, -1, 1.5, "4", True)),
    *((ValueError, "num_experts", lambda e=e: Experts(8, e)) for e in (0, -1, 1.5, "4", True)),
    *((ValueError, "num_experts", lambda e=e: HeirarchicalMoE(8, e)) for e in (4, (4,), (2, 2, 2), "ab", (2, 0))),
    (ValueError, "bias must be True or False, got 'none'", lambda: TopKGating(8, 4, bias="none")),
    (ValueError, "expert_bias must be True or False, got 1", lambda: TopKGating(8, 4, expert_bias=1)),
    (ValueError, "second_place_loss must be True or False, got 0.5", lambda: MoE(8, 4, second_place_loss=0.5)),
    (ValueError, "num_gates must be an integer of at least 1, got 0", lambda: Top2Gating(8, 0)),
    (ValueError, "outer_expert_dims must be .*, got 0", lambda: Top2Gating(8, 4, outer_expert_dims=(2, 0))),
    (ValueError, "jitter must be .* below 1.0, got 2.0", lambda: TopKGating(8, 4, jitter=2.0)),
    (ValueError, "alpha must be a finite number, got 'x'", lambda: ClampedSwiGLU("x", None)),
    (ValueError, "limit must be .* above 0.0, got 0.0", lambda: ClampedSwiGLU(1.0, 0.0)),
    *((TypeError, "dtype must be a floating-point torch.dtype", lambda d=d: MoE(8, 2, dtype=d)) for d in NO_DTYPES),
    *((TypeError, "dtype must be a floating-point torch.dtype", lambda d=d: Experts(8, 2, dtype=d)) for d in NO_DTYPES),
    # sizes that disagree
    (ValueError, "gate has num_experts=8, but the layer has num_experts=4", lambda: MoE(8, 4, gate=TopKGating(8, 8))),
    (ValueError, "gate has dim=16, but the layer has dim=8", lambda: MoE(8, gate=TopKGating(16, 4))),
    (ValueError, "experts have num_experts=3, but the layer has .*=4", lambda: MoE(8, 4, experts=Experts(8, 3))),
    (ValueError, "experts have dim=16, but the layer has dim=8", lambda: MoE(8, 4, experts=GatedExperts(16, 4))),
    (ValueError, "experts have num_experts=3", lambda: MoE(8, 4, experts=[LINEAR] * 3)),
    (ValueError, "experts have num_experts=3", lambda: HeirarchicalMoE(8, (2, 2), experts=[LINEAR] * 3)),
    (ValueError, r"gate_inner has outer_expert_dims=\(\)", lambda: HeirarchicalMoE(8, gate_inner=TopKGating(8, 4))),
    (ValueError, "gate_outer .*token-choice", lambda: HeirarchicalMoE(8, (2, 2), gate_outer=ExpertChoiceGating(8, 2))),
    (ValueError, "gate_inner .*token-choice", lambda: HeirarchicalMoE(8, (2, 2), gate_inner=ExpertChoiceGating(8, 2))),
    # things that are no modules
    (TypeError, r"experts must be a module or a list .*got str", lambda: MoE(8, 4, experts="relu")),
    (TypeError, r"experts must be a module .*got dict", lambda: MoE(8, 4, experts={"a": LINEAR})),
    (TypeError, r"experts must be a module .*got ModuleDict", lambda: MoE(8, 4, experts=nn.ModuleDict({"a": LINEAR}))),
    (TypeError, r"experts must be a module .*got int", lambda: MoE(8, 4, experts=3)),
    (TypeError, "gate must be a gate", lambda: MoE(8, 4, gate=torch.nn.functional.relu)),
    (TypeError, "activation", lambda: MoE(8, 4, activation="gelu")),
    (TypeError, r"experts\[1\] must .* got 1", lambda: MoE(8, 2, experts=[LINEAR, 1])),
    (TypeError, r"experts\[1\] .* class Linear; instantiate it", lambda: MoE(8, 2, experts=[LINEAR, nn.Linear])),
    (TypeError, r"experts\[1\] must .* got <built-in", lambda: MoE(8, 2, experts=[LINEAR, torch.relu])),
    (TypeError, "experts must be a list of modules, got a int", lambda: ExpertList(3)),
    (ValueError, "at least one module", lambda: ExpertList([])),
    # values that would do nothing or harm
    (ValueError, "jitter must .* at least 0.0 and below 1.0, got 2.0", lambda: TopKGating(8, 4, jitter=2.0)),
    (ValueError, "alpha must be a finite number, got 'x'", lambda: ClampedSwiGLU("x", None)),
    (ValueError, "limit must be a finite number above 0.0, got 0.0", lambda: ClampedSwiGLU(1.0, 0.0)),
    (ValueError, "bias must be True or False, got 'none'", lambda: TopKGating(8, 4, bias="none")),
    (ValueError, "expert_bias must be True or False, got 1", lambda: TopKGating(8, 4, expert_bias=1)),
    (ValueError, "second_place_loss must be True or False, got 0.5", lambda: MoE(8, 4, second_place_loss=0.5)),
    (ValueError, "num_gates must be an integer of at least 1, got 0", lambda: Top2Gating(8, 0)),
    (ValueError, "outer_expert_dims must be an.*, got 0", lambda: Top2Gating(8, 4, outer_expert_dims=(2, 0))),
    (TypeError, r"dtype must be a floating-point torch\.dtype such as", lambda: MoE(8, 2, dtype="float32")),
    (TypeError, r"dtype must be a floating-point torch\.dtype such as", lambda: Experts(8, 2, dtype=torch.int64)),
    # routers
    (ValueError, "k must be at most num_experts=4, but got 5", lambda: TopKGating(8, 4, 5)),
    (ValueError, r"score must be one of 'softmax', .*got 'relu'", lambda: TopKGating(8, 4, score="relu")),
    (ValueError, "num_groups and top_groups must be passed together", lambda: TopKGating(8, 4, num_groups=2)),
    (ValueError, "num_groups=3 must divide num_experts=4", lambda: TopKGating(8, 4, num_groups=3, top_groups=1)),
    (ValueError, r"top_groups=1 .*num_groups=4.*k=2", lambda: TopKGating(8, 4, 2, num_groups=4, top_groups=1)),
    (RuntimeError, "expert_bias=True", lambda: TopKGating(8, 4).update_bias(0.001)),
    (ValueError, "rate", lambda: TopKGating(8, 4, expert_bias=True).update_bias(-1.0)),
    (ValueError, "k must be less than num_experts=4, but got 4", lambda: NoisyTopKGating(8, 4, 4)),
    (ValueError, r"capacity_factor.*None", lambda: ExpertChoiceGating(8, 4, capacity_factor=None)),
    (ValueError, "importance", lambda: ExpertChoiceGating(8, 4)(torch.zeros(1, 5, 8), importance=torch.ones(1, 5))),
]
FOUR, THREE = TopKGating(8, 4), TopKGating(8, 3, outer_expert_dims=(2,))


def make_levels(**options):
    return HeirarchicalMoE(8, (2, 3), gate_inner=THREE, **options)


@pytest.mark.parametrize(("error", "says", "make"), REFUSED)
def test_rejects_invalid_construction(error, says, make):
    with pytest.raises(error, match=says):
        make()


def test_numbers_follow_the_parts_that_are_given():
    assert MoE(8).num_experts == 16
    assert MoE(8, gate=TopKGating(8, 6)).experts.num_experts == 6
    assert MoE(8, experts=[nn.Linear(8, 8) for _ in range(5)]).gate.num_gates == 5
    assert HierarchicalMoE(8).num_experts == (4, 4)  # both spellings are one class
    assert HeirarchicalMoE(8, gate_outer=TopKGating(8, 3)).num_experts == (3, 4)


@pytest.mark.parametrize("kind", LAYERS)
def test_experts_that_change_the_shape(kind):
    class Wrong(nn.Module):
        def forward(self, x):
            return x[..., :-1]

    with pytest.raises(ValueError, match=r"experts must return a tensor of shape \(.*8\), got \(.*7\)"):
        make_layer(kind, experts=Wrong())(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match=r"expert 0 \(Linear\) must return a tensor of shape .* got .*dim_out"):
        make_layer(kind, experts=[nn.Linear(8, 7) for _ in range(4)])(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match=r"shared_expert must return a tensor of shape"):
        make_layer(kind, shared_expert=nn.Linear(8, 7))(torch.randn(1, 6, 8))


def enter_context(context):
    """A function of a model that enters a context."""
    return lambda model: context(model).__enter__()


ON_MODELS = {
    **{function.__name__: function for function in (summary, unstack, restack, routing_of)},
    **{context.__name__: enter_context(context) for context in (collect_aux, track_routing, record_routing)},
}


@pytest.mark.parametrize("name", ON_MODELS)
def test_rejects_non_models(name):
    for model in ([nn.Linear(8, 8)], "moe"):
        with pytest.raises(TypeError, match=r"model must be a model .*, got .*; construct or load"):
            ON_MODELS[name](model)


class OldGate(nn.Module):
    """As a gate of 0.2.3."""

    def forward(self, x, importance=None, mask=None):
        return x, x, x.sum()


@pytest.mark.parametrize("kind", LAYERS)
def test_gates_that_return_no_routing(kind):
    name = "gate_outer" if kind is HeirarchicalMoE else "gate"
    with pytest.raises(TypeError, match=rf"{name} must be a gate .* Linear.forward has the signature"):
        make_layer(kind, **{name: nn.Linear(8, 4)})
    if kind is MoE:
        with pytest.raises(TypeError, match=r"gate must return a Routing, got tuple.*TokenChoiceGate"):
            MoE(8, 4, gate=OldGate())(torch.randn(1, 5, 8))


def test_results_that_are_no_tensor():
    """A layer inside a layer returns its loss too."""
    x = torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match=r"shared_expert must return a tensor of shape .* got a tuple \(wrap an MoE"):
        MoE(8, 4, shared_expert=MoE(8, 2))(x)
    with pytest.raises(ValueError, match=r"expert 0 \(MoE\) must return .* got a tuple \(wrap an MoE"):
        MoE(8, 4, experts=[MoE(8, 2) for _ in range(4)])(x)
    with pytest.raises(ValueError, match=r"experts must return .* a tuple \(wrap an MoE"):
        MoE(8, 4, experts=OldGate())(x)


class Doubled(nn.ModuleList):
    """A list with a forward of its own: all experts at once."""

    def forward(self, x):
        return torch.stack([2 * expert(part) for expert, part in zip(self, x, strict=True)])


def test_list_with_custom_forward_is_called():
    linear = [nn.Linear(8, 8, bias=False) for _ in range(4)]
    plain = MoE(8, 4, experts=linear, second_policy_eval="all").eval()
    doubled = MoE(8, 4, experts=Doubled(linear), gate=plain.gate).eval()
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(doubled(x)[0], 2 * plain(x)[0])


class ReturnsGate(TokenChoiceGate):
    """A gate whose `decide` returns what a function of its tokens does."""

    side_inputs = (*TokenChoiceGate.side_inputs, "kind")

    def __init__(self, function):
        super().__init__(8, 4, k=2)
        self.function = function

    def decide(self, tokens):
        return self.function(tokens)


def test_custom_router_results():
    x = torch.randn(2, 5, 8)
    for value in (x, None, (x, x, x)):
        name = type(value).__name__
        with pytest.raises(TypeError, match=rf"ReturnsGate.decide must return Choices\(.*, got {name}"):
            MoE(8, gate=ReturnsGate(lambda tokens, value=value: value))(x)
    with pytest.raises(TypeError, match=r"ReturnsGate requires the side input 'kind'; .* moe\(x, kind="):
        MoE(8, gate=ReturnsGate(lambda tokens: tokens.side["kind"]))(x)
    with pytest.raises(KeyError, match="another"):  # not of a side input
        MoE(8, gate=ReturnsGate(lambda tokens: {}["another"]))(x)


@pytest.mark.parametrize("make", [lambda: Top2Gating(8, 4), lambda: TopKGating(8, 4), lambda: NoisyTopKGating(8, 4)])
def test_given_experts_out_of_range(make):
    moe, x = MoE(8, gate=make()), torch.randn(2, 5, 8)
    for wrong in (4, -6, 1 << 40, -32769):
        given = torch.tensor([0, 1]).repeat(2, 5, 1)
        given[1, 4, 1] = wrong
        with pytest.raises(ValueError, match=rf"given_experts contains {wrong}, .*0 to 3, -1"):
            moe(x, given_experts=given)
    moe(x, given_experts=given, mask=torch.arange(10).view(2, 5) < 9)  # of a masked token
    for right in (3, -1, -5, -32768):
        given[1, 4, 1] = right
        moe(x, given_experts=given)


@pytest.mark.parametrize("wrong", [10, -1])
def test_missing_token_ids_raise(wrong):
    moe, x, ids = MoE(8, gate=HashGating(8, 4, num_ids=10)), torch.randn(2, 5, 8), torch.arange(10).view(2, 5).clone()
    moe(x, token_ids=ids)
    ids[1, 4] = wrong
    with pytest.raises(ValueError, match=rf"token_ids must be from 0 to 9, got {wrong}.*num_ids"):
        moe(x, token_ids=ids)
    moe(x, token_ids=ids, mask=torch.arange(10).view(2, 5) < 9)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.ones(2, 5, dtype=torch.bool), TypeError, r"must be integers, got torch\.bool"),
        (torch.ones(2, 5, 1, dtype=torch.int64), ValueError, r"must have shape \(2, 5\), got \(2, 5, 1\)"),
    ],
)
def test_token_ids_of_another_kind(ids, error, message):
    with pytest.raises(error, match=f"token_ids {message}"):
        MoE(8, gate=HashGating(8, 4, num_ids=10))(torch.randn(2, 5, 8), token_ids=ids)


class CustomKGate(MoE):
    """A layer that has an argument k."""

    def __init__(self, k):
        super().__init__(8, gate=TopKGating(8, 4, k=k))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_argument_of_the_router(kind):
    """The error says where it goes, also under the names of other libraries."""
    where = "gate_outer= and gate_inner=" if kind is HeirarchicalMoE else "gate="
    for name, value, setting in (
        ("k", 4, "k=4"),
        ("top_k", 4, "k=4"),
        ("num_experts_per_tok", 2, "k=2"),
        ("score", "sigmoid", "score='sigmoid'"),
        ("expert_bias", True, "expert_bias=True"),
    ):
        with pytest.raises(TypeError) as error:
            make_layer(kind, **{name: value})
        said = f"not accept {name!r}, a router argument; pass {where}TopKGating(dim, num_experts, {setting})"
        assert said in str(error.value)

    assert copy.deepcopy(CustomKGate(k=3)).gate.k == 3
    assert pickle.loads(pickle.dumps(make_layer(kind))).dim == 8
    assert list(inspect.signature(kind).parameters)[:3] == ["dim", "num_experts", "hidden_dim"]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", [*LAYERS, TopKGating])
def test_inputs_that_are_not_dense(kind):
    module = TopKGating(8, 4) if kind is TopKGating else make_layer(kind)
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    for layout in (torch.jagged, torch.strided):
        with pytest.raises(TypeError, match=r"dense tensor, .*to_padded_tensor\(0.0\), .*mask="):
            module(torch.nested.nested_tensor(parts, layout=layout))
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo; .*to_dense\(\)"):
        module(torch.randn(2, 5, 8).to_sparse())
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace is not supported.* use torch\.export\.export"):
        torch.jit.trace(module, torch.randn(2, 5, 8))


@pytest.mark.parametrize("inside", [False, True], ids=["root", "in a model"])
def test_a_state_may_be_renamed_while_it_is_loaded(inside):
    """As torch's modules allow: a hook before loading renames, at the root as inside a model."""
    moe, other = MoE(8, 4), MoE(8, 4)

    def rename(module, state, prefix, *args):
        state[f"{prefix}gate.w_gating"] = state.pop(f"{prefix}router")

    moe.register_load_state_dict_pre_hook(rename)
    prefix = "0." if inside else ""
    state = {prefix + name.replace("gate.w_gating", "router"): value for name, value in other.state_dict().items()}
    result = (nn.Sequential(moe) if inside else moe).load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(moe.gate.w_gating, other.gate.w_gating)


def test_short_groups_warn_or_raise():
    """And the search for a group is short."""
    with pytest.warns(UserWarning, match=r"group_size=10 .*41 groups of 1"):
        MoE(8, 2, group_size=10)(torch.randn(1, 41, 8))
    moe, refused = MoE(8, 2, group_size=256), pytest.raises(ValueError, match=r"group_size=256 .*997 positions")
    with pytest.warns(UserWarning, match="997 groups of 1"), refused:
        moe(torch.randn(1, 997, 8))
    assert moe(torch.randn(1, 1, 8))[0].shape == (1, 1, 8)
    assert group_shape(2**31 - 1, 2**31) == (1, 2**31 - 1)
    with pytest.warns(UserWarning, match="groups of 1, because"):
        assert group_shape(2**31 - 1, 1000) == (2**31 - 1, 1)  # a prime
