"""Fewer experts: what a pruned layer computes, which experts go, and what is refused before anything is changed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from support.transformers_models import ARCHITECTURES
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from mixture_of_experts import (
    ExpertChoiceGating,
    ExpertList,
    Experts,
    GatedExperts,
    HashGating,
    HeirarchicalMoE,
    MoE,
    NoisyTopKGating,
    OutputOnly,
    ReLUGating,
    Top2Gating,
    TopKGating,
    TopPGating,
)
from mixture_of_experts.gating import RouterLogits, SignRule, SparseMixerGating
from mixture_of_experts.gating.steps import SCORES, AlwaysChosen, LearnedScale
from mixture_of_experts.huggingface import expert_scores, export, from_transformers, prune, to_transformers, upcycle
from mixture_of_experts.huggingface.feed_forward import find_feed_forwards
from mixture_of_experts.unstack import restack, unstack
from mixture_of_experts.wrappers import InputWeightedExperts, LatentExperts, NormedExperts, ZeroComputationExperts

D, E = 6, 8


def make_layer(gate: nn.Module, experts: nn.Module | None = None, **settings) -> MoE:
    """A layer of eight experts, with biases that are not 0, in float64 and eval."""
    moe = MoE(D, gate=gate, experts=GatedExperts(D, E, 5, bias=True) if experts is None else experts, **settings)
    for name, tensor in moe.state_dict().items():
        if name.rpartition(".")[2] in ("b1", "b2", "b3", "b_gating", "bias", "expert_bias", "scale"):
            tensor.copy_(torch.randn_like(tensor))
    return moe.double().eval()


GATES = {
    "softmax": lambda: TopKGating(D, E),
    "not normalised, biases": lambda: TopKGating(D, E, 2, normalize=False, bias=True, expert_bias=True),
    "sigmoid, groups": lambda: TopKGating(D, E, 2, score="sigmoid", num_groups=2, top_groups=1, expert_bias=True),
    "a network of logits": lambda: TopKGating(D, E, logits=RouterLogits(D, E, norm_eps=1e-6, bias=True)),
    "learned scales": lambda: TopKGating(D, E, weigh=LearnedScale(E)),
}
IDS = [1, 2, 4, 7]


@pytest.mark.parametrize("name", GATES)
def test_pruned_layer_equals_layer_with_closed_experts(name):
    moe, x = make_layer(GATES[name]()), torch.randn(2, 9, D, dtype=torch.float64)
    others = copy.deepcopy(moe)
    closed, score = torch.ones(E, dtype=torch.bool).scatter(0, torch.tensor(IDS), False), SCORES[moe.gate.score]
    others.gate.score = lambda logits: score(logits.masked_fill(closed, torch.finfo(logits.dtype).min))
    if others.gate.expert_bias is not None:
        others.gate.expert_bias[closed] = -torch.inf
    expected = others(x)[0]
    assert not torch.equal(moe(x)[0], expected)
    assert prune(moe, by={"gate": IDS}) == {"gate": IDS}
    torch.testing.assert_close(moe(x)[0], expected)
    assert moe.num_experts == moe.gate.num_experts == moe.experts.num_experts == len(IDS)
    moe.train()(x)[0].sum().backward()
    assert moe.experts.w2.grad.shape[0] == len(IDS)


KINDS = {
    "top2": lambda e: (Top2Gating(D, e, second_policy_eval="all", capacity_factor_eval=None), None),
    "top p": lambda e: (TopPGating(D, e, 3), None),
    "noisy": lambda e: (NoisyTopKGating(D, e, 2), Experts(D, e, 5)),
    "relu": lambda e: (ReLUGating(D, e, 3, mean_choices=1.0, bias=True), None),
    "mixer": lambda e: (SparseMixerGating(D, e), None),
    "experts choose": lambda e: (ExpertChoiceGating(D, e), None),
    "a list": lambda e: (TopKGating(D, e), ExpertList(nn.Linear(D, D) for _ in range(e))),
    "latent": lambda e: (TopKGating(D, e), LatentExperts(Experts(3, e), before=nn.Linear(D, 3), after=nn.Linear(3, D))),
    "norms": lambda e: (TopKGating(D, e), NormedExperts(GatedExperts(D, e, 5), nn.RMSNorm(D))),
    "on inputs": lambda e: (TopKGating(D, e), InputWeightedExperts(GatedExperts(D, e, 5))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_layer_is_one_of_that_size(kind):
    """Its state fits a new layer of four experts, which computes the same; scores of a text prune it too."""
    (gate, experts), x = KINDS[kind](E), torch.randn(2, 9, D, dtype=torch.float64)
    moe = make_layer(gate, experts)
    other = copy.deepcopy(moe)
    prune(moe, by={"gate": IDS})
    gate, experts = KINDS[kind](4)
    new = make_layer(gate, GatedExperts(D, 4, 5, bias=True) if experts is None else experts)
    new.load_state_dict(moe.state_dict())
    torch.testing.assert_close(moe(x)[0], new(x)[0])
    assert str(moe) == str(new)
    scores = expert_scores(other, calibration=x)["gate"]
    (ids,) = prune(other, 4, calibration=x).values()
    assert ids == sorted(scores.argsort(descending=True, stable=True)[:4].tolist())
    other(x)


def test_reap_and_frequency_match_the_paper():
    moe, x = make_layer(TopKGating(D, E, scale=1.5)), torch.randn(3, 7, D, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, :4] = False
    routing = moe.gate(x, mask=mask)
    slots = moe.experts(x.flatten(0, 1).expand(E, 21, D))  # every expert on every token
    sums, counts = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for i, (expert, weight) in enumerate(zip(routing.expert.view(21, 2), routing.weight.view(21, 2), strict=True)):
        for e, w in zip(expert.tolist(), weight, strict=True):
            if mask.flatten()[i]:
                sums[e] += w * slots[e, i].norm()
                counts[e] += 1
    batches = [dict(inputs=x[:2], mask=mask[:2]), (x[2:],)]
    torch.testing.assert_close(expert_scores(moe, calibration=batches)["gate"], sums / counts.clamp(min=1))
    assert torch.equal(expert_scores(moe, "frequency", calibration=batches)["gate"], counts)


def test_padding_that_is_computed_does_not_count():
    model = ARCHITECTURES["llama"].build()
    upcycle(model, num_experts=E, redraw=0.5)
    ids, mask = torch.randint(1, 64, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :5] = 0
    scores = expert_scores(model, "frequency", calibration=dict(input_ids=ids, attention_mask=mask))
    assert {int(counts.sum()) for counts in scores.values()} == {2 * 11}
    alone = expert_scores(model, calibration=[ids[1:]])
    first = dict(input_ids=ids[:1], attention_mask=0 * mask[:1])
    both = expert_scores(model, calibration=[dict(input_ids=ids[1:]), first])
    assert all(torch.equal(both[name], alone[name]) for name in alone)


def test_pruning_unused_experts_changes_nothing():
    """Experts that no token of the text chose go, and the outputs stay; with all kept, the tensors are the same."""
    moe, x = make_layer(TopKGating(D, E, bias=True)), torch.randn(2, 9, D, dtype=torch.float64)
    with torch.no_grad():
        moe.gate.b_gating[[0, 3, 5]] = -100.0
    before, weights = moe(x)[0], list(moe.parameters())
    assert prune(moe, E, calibration=x) == {"gate": list(range(E))}
    assert all(one is other for one, other in zip(moe.parameters(), weights, strict=True))
    assert torch.equal(moe(x)[0], before)
    assert prune(moe, 5, "frequency", calibration=x) == {"gate": [1, 2, 4, 6, 7]}
    torch.testing.assert_close(moe(x)[0], before)


def test_modes_frozen_weights_and_random_choice():
    moe = MoE(D, gate=TopKGating(D, E)).train()
    moe.gate.eval()
    moe.experts.w1.requires_grad_(False)
    expert_scores(moe, calibration=torch.randn(2, 9, D))
    assert moe.training
    assert not moe.gate.training
    assert not moe._forward_hooks
    assert not moe.experts._forward_pre_hooks
    torch.manual_seed(1)
    first = prune(copy.deepcopy(moe), 3, "random")
    torch.manual_seed(1)
    assert prune(moe, 3, "random") == first
    assert not moe.experts.w1.requires_grad
    assert moe.experts.w2.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "gate", "experts", "layer"])
def test_wrappers_do_not_hide_layers(what):
    moe, x = make_layer(TopKGating(D, E)), torch.randn(2, 9, D, dtype=torch.float64)
    wanted = expert_scores(moe, calibration=x)["gate"]
    model: Any = nn.Sequential(OutputOnly(moe))
    if what == "model":
        model = torch.compile(model, backend="eager")
    elif what == "layer":
        model[0].moe = checkpoint_wrapper(torch.compile(moe, backend="eager"))
    else:
        setattr(moe, what, checkpoint_wrapper(torch.compile(getattr(moe, what), backend="eager")))
    (found,) = expert_scores(model, calibration=x).values()
    torch.testing.assert_close(found, wanted)
    (ids,) = prune(model, 4, calibration=x).values()
    assert ids == sorted(wanted.argsort(descending=True)[:4].tolist())
    assert moe.num_experts == 4
    with torch.compiler.set_stance("force_eager"):
        model(x)


def test_others_are_compiled_while_it_measures():
    """A compiled function that is called meanwhile, here or in another thread, runs its graph."""
    ran: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: ran.append(threading.current_thread().name) or graph.forward(*args)

    other = torch.compile(lambda x: x * 2, backend=backend)
    other(torch.ones(2))

    def batches() -> Any:
        other(torch.ones(2))
        thread = threading.Thread(target=other, args=(torch.ones(2),), name="another")
        thread.start()
        thread.join()
        yield torch.randn(2, 9, D, dtype=torch.float64)

    expert_scores(make_layer(TopKGating(D, E)), calibration=batches())
    assert ran == [*2 * ["MainThread"], "another"]


def test_unstacked_experts_are_stacked_again_after():
    moe, x = unstack(make_layer(TopKGating(D, E))), torch.randn(2, 9, D, dtype=torch.float64)
    prune(moe, by={"gate": [0, 3, 5]})
    wanted = moe(x)[0]
    torch.testing.assert_close(restack(moe)(x)[0], wanted)
    assert (moe.experts.num_experts, moe.experts.expert_dims, moe.experts.w1.shape[0]) == (3, (3,), 3)


X = torch.randn(2, 9, D)
BAD_ARGUMENTS = {
    "the rule": (dict(keep=4, by="magnitude"), ValueError, "by must be one of 'reap', 'frequency', 'random'"),
    "no number": (dict(calibration=X), ValueError, "requires `keep`"),
    "no text": (dict(keep=4), TypeError, "expected `calibration` to be batches of tokens"),
    "words": (dict(keep=4, calibration="a text"), TypeError, "expected `calibration` to be batches of tokens"),
    "no tokens": (dict(keep=4, calibration=[]), ValueError, "no calibration tokens reached gate"),
    "lists of ids": (dict(keep=4, calibration=[[1, 2]]), TypeError, r"return_tensors='pt'\), but got \[1, 2\]"),
    "a text for scores": (dict(keep=4, by={"gate": torch.rand(E)}, calibration=X), ValueError, "omit `gates` and `c"),
    "too few": (dict(keep=1, by="random"), ValueError, "1 of 8 experts of 'gate'; keep at least 2"),
    "too many": (dict(keep=9, by="random"), ValueError, "cannot keep 9 of 8"),
    "no number of experts": (dict(keep=2.5, by="random"), ValueError, "keep must be an integer"),
    "an id that is none": (dict(by={"gate": [0, 8]}), ValueError, r"distinct ids below 8, but got \[0, 8\]"),
    "no ids": (dict(by={"gate": []}), ValueError, "distinct ids below 8"),
    "something else": (dict(by={"gate": object()}), TypeError, "distinct ids below 8"),
    "few scores": (dict(keep=2, by={"gate": torch.rand(7)}), ValueError, r"scores of shape \(8,\)"),
    "no scores": (dict(keep=2, by={"gate": torch.full((8,), torch.nan)}), ValueError, "finite floating-point scores"),
    "scores alone": (dict(by={"gate": torch.rand(8)}), ValueError, "scores require `keep`"),
    "two numbers": (dict(keep=3, by={"gate": [0, 1]}), ValueError, "keep=3 does not match the 2 ids in by"),
    "no such gate": (dict(by={"router": [0, 1]}), ValueError, "not a gate of the model; its gates are 'gate'"),
    "gates twice": (dict(by={"gate": [0, 1]}, gates=["gate"]), ValueError, "omit `gates` and `calib"),
    "a module": (dict(by={nn.Linear(1, 1): [0, 1]}), ValueError, "`by` already maps gate names"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments_change_nothing(case):
    settings, error, says = BAD_ARGUMENTS[case]
    moe = MoE(D, gate=TopKGating(D, E))
    before = dict(moe.named_parameters())
    with pytest.raises(error, match=says):
        prune(moe, **settings)
    assert all(one is before[name] for name, one in moe.named_parameters())


def test_groups_keep_equally_many():
    def build() -> MoE:
        return make_layer(TopKGating(D, E, 2, num_groups=2, top_groups=1, group_score="best"))

    with pytest.raises(ValueError, match=r"the same number of experts per group, but got \[3, 1\]"):
        prune(build(), by={"gate": [0, 1, 2, 7]})
    with pytest.raises(ValueError, match=r"num_groups=2 groups must keep the same number"):
        prune(build(), 5, "random")
    with pytest.raises(ValueError, match="groups must contain at least k=2 experts"):
        prune(build(), 2, "random")
    with pytest.raises(ValueError, match="at least two if group_score is 'two_best'"):
        prune(make_layer(TopKGating(D, E, 2, num_groups=4, top_groups=2)), 4, "random")
    scores = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 9])
    assert prune(build(), 4, {"gate": scores}) == {"gate": [0, 1, 4, 7]}
    with pytest.raises(ValueError, match="keep at least 3"):
        prune(make_layer(NoisyTopKGating(D, E, 2)), 2, "random")


def test_rejects_unsupported_batch():
    """The error is the model's own, and no warning stands beside it: no forward began that could end."""
    moe = make_layer(TopKGating(D, E))
    with pytest.raises(TypeError, match="unexpected keyword argument 'hidden'"):
        prune(nn.Sequential(OutputOnly(moe)), 2, calibration=[dict(hidden=torch.randn(1, 4, D))])
    assert moe.num_experts == E


def make_shared() -> nn.Sequential:
    one = MoE(D, gate=TopKGating(D, E))
    return nn.Sequential(one, MoE(D, gate=TopKGating(D, E), experts=one.experts))


def make_tied() -> nn.Sequential:
    both = nn.Sequential(MoE(D, gate=TopKGating(D, E)), MoE(D, gate=TopKGating(D, E)))
    both[1].gate.w_gating = both[0].gate.w_gating
    return both


def make_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(Experts(D, E), "w1")


class OwnGate(TopKGating):
    """Scores of its own may know of the number of experts."""

    def _rank_experts(self, logits, score):
        return score.detach()


def find_shares() -> TopKGating:
    gate = TopKGating(D, E, expert_bias=True)
    gate.bias_rule = SignRule(shares=[1] * E)
    return gate


UNSUPPORTED = {
    "hash": (lambda: MoE(D, gate=HashGating(D, E, num_ids=9)), r"'gate' \(HashGating\): pruning does not know which"),
    "own": (lambda: MoE(D, gate=OwnGate(D, E)), r"'gate' \(OwnGate\)"),
    "function": (lambda: MoE(D, gate=TopKGating(D, E, score=torch.sigmoid)), "score=.*sigmoid"),
    "always": (lambda: MoE(D, gate=TopKGating(D, E, 3, select=AlwaysChosen(1))), "select=AlwaysChosen"),
    "network": (lambda: MoE(D, gate=TopKGating(D, E, logits=nn.Sequential(nn.Linear(D, E)))), "l.*logits.0.bias"),
    "linear": (lambda: MoE(D, gate=TopKGating(D, E, logits=nn.Linear(D, E))), "logits=Linear"),
    "tied": (make_tied, "router weights or expert weights are shared with another"),
    "shares": (lambda: MoE(D, gate=find_shares()), "bias_rule.shares"),
    "levels": (lambda: HeirarchicalMoE(D, (2, 4)), "it is a level of a HeirarchicalMoE"),
    "alone": (lambda: TopKGating(D, E), "it is not part of a layer"),
    "slots": (lambda: MoE(D, num_experts=E, experts=nn.Identity()), "its experts are Identity"),
    "identities": (
        lambda: MoE(D, gate=TopKGating(D, E), experts=ZeroComputationExperts(Experts(D, 7), num_identity=1)),
        "its experts are ZeroComputationExperts",
    ),
    "shared": (make_shared, "'0.gate', because its experts, .* are shared with another module"),
    "parametrized": (lambda: MoE(D, gate=TopKGating(D, E), experts=make_normed()), r"also hold parametrizations\.w1"),
    "not ours": (lambda: make_stock("Mixtral"), r"mlp.gate' \(MixtralTopKRouter\)"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unprunable_gates_raise(case):
    build, says = UNSUPPORTED[case]
    with pytest.raises(TypeError, match=f"prune does not support .*{says}"):
        prune(build(), 4, "random")


def test_layers_inside_experts_keep_their_size():
    inner = [MoE(D, gate=TopKGating(D, 4)) for _ in range(4)]
    moe = make_layer(TopKGating(D, 4), ExpertList([OutputOnly(one) for one in inner]))
    prune(moe, by={"gate": [0, 2, 3]})
    assert [one.num_experts for one in (moe, moe.gate, *inner)] == [3, 3, 4, 4, 4, 4]
    assert all(one.gate.num_experts == one.experts.num_experts == 4 for one in inner)


def test_prune_rejects_meta_and_non_models():
    with pytest.raises(ValueError, match="weights on the meta device; load the weights first"):
        prune(MoE(D, gate=TopKGating(D, E)).to("meta"), 2, "random")
    with pytest.raises(ValueError, match="has no gate; pass a model with MoE layers to prune"):
        prune(nn.Linear(3, 3), 2, "random")
    with pytest.raises(TypeError, match="model must be a model"):
        prune(3, 2, "random")
    both = nn.Sequential(MoE(D, gate=TopKGating(D, E)), MoE(D, gate=HashGating(D, E, num_ids=9)))
    with pytest.raises(TypeError, match=r"To select only the other gates, pass gates=\['0.gate'\]"):
        prune(both, 4, "random")
    assert prune(both, 4, "random", gates=["0.gate"]).keys() == {"0.gate"}


# Models of transformers

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, num_experts_per_tok=2, pad_token_id=0)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
LATENT |= dict(n_group=2, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16)
STOCK = {
    "Mixtral": dict(num_local_experts=8),
    "Qwen2Moe": dict(num_experts=8, moe_intermediate_size=16),
    "Qwen3Moe": dict(num_experts=8, moe_intermediate_size=16),
    "GptOss": dict(head_dim=8, num_local_experts=8),
    "DeepseekV3": dict(n_routed_experts=8, **LATENT),
}


def make_stock(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SMALL, **STOCK[name] | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_a_pruned_stock_model_saves_loads_and_is_stock_again(name, tmp_path):
    model, tokens = from_transformers(make_stock(name)), torch.randint(1, 64, (2, 12))
    kept = prune(model, 4, calibration=[tokens])
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-6, rtol=0)
    back = to_transformers(model)
    assert not find_feed_forwards(back)
    torch.testing.assert_close(back(tokens).logits, expected, atol=1e-5, rtol=0)
    back.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    asked = {} if name == "DeepseekV3" else dict(output_router_logits=True)
    torch.testing.assert_close(again(tokens, labels=tokens, **asked).loss, back(tokens, labels=tokens, **asked).loss)
    assert {len(ids) for ids in kept.values()} == {4}


@pytest.mark.slow
def test_layers_that_were_blocks_keep_equally_many():
    model = from_transformers(make_stock("Qwen3Moe"))
    first, second = expert_scores(model, "frequency", calibration=torch.randint(1, 64, (2, 12)))
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"must keep the same number of experts, .* but got \[2, 3\]"):
        prune(model, by={first: [0, 1], second: [0, 1, 2]})
    with pytest.raises(ValueError, match=r"got \[2, 8\]"):
        prune(model, 2, "random", gates=[first])
    assert all(one is before[name] for name, one in model.named_parameters())
    assert model.config.num_experts == 8


@pytest.mark.slow
@pytest.mark.parametrize("gates", [None, ["1.model.layers.0.mlp.moe.gate", "1.model.layers.1.mlp.moe.gate"]])
def test_each_model_in_a_module_saves_and_loads(gates, tmp_path):
    """The second model's configuration used to keep the old number of experts."""
    tokens = torch.randint(1, 64, (2, 12))
    pair = nn.ModuleList(from_transformers(make_stock("Qwen3Moe")) for _ in range(2))
    prune(pair, 4, "random", gates=gates)
    assert [model.config.num_experts for model in pair] == [8 if gates else 4, 4]
    for i, model in enumerate(pair):
        model.save_pretrained(tmp_path / str(i))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("unequal", [False, True])
def test_a_pruned_upcycled_model_saves_loads_and_exports(unequal, tmp_path):
    """Numbers of experts that differ by layer are saved and loaded; no stock class has them."""
    model, inputs = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama"].inputs()
    first, second = upcycle(model, num_experts=8, redraw=0.5)
    ids = {f"{first}.moe.gate": [0, 3, 5], f"{second}.moe.gate": [1, 2, 6, 7][: 4 if unequal else 3]}
    prune(model, by=ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert [f.moe.num_experts for f in find_feed_forwards(loaded)] == [len(kept) for kept in ids.values()]
    if unequal:
        with pytest.raises(ValueError, match=r"w1 .*\(4, 32, 48\).*\(3, 32, 48\)"):
            export(loaded)
    else:
        torch.testing.assert_close(export(loaded)(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
