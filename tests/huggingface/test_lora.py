"""LoRA on stacked experts inside the layer: the numbers of PEFT, its files, and its choice of adapters."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import layer as layer_of_peft
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mixture_of_experts import ExpertChoiceGating, Experts, GatedExperts, MoE, TopKGating, ops
from mixture_of_experts.huggingface import fast_lora
from mixture_of_experts.huggingface.lora import implementations, wrapper
from mixture_of_experts.ops.cpu import decode
from mixture_of_experts.parallel import ExpertParallel, parallelize_module
from mixture_of_experts.quantize import quantize_experts
from mixture_of_experts.unstack import unstack
from mixture_of_experts.wrappers import InputWeightedExperts, ZeroComputationExperts

from .test_block_conversion import build_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # in PEFT
DIM, HIDDEN, EXPERTS, TOKENS = 9, 13, 5, 22
ALL = ("w1", "w3", "w2")
TARGETS = [f"experts.{name}" for name in ALL]


class Holder(nn.Module):
    """A model with one layer, for what PEFT does to whole models."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, *args: Any) -> Any:
        return self.moe(*args)


def make_layer(experts: nn.Module | None = None, *, capacity: float | None = None, k: int = 2, **settings: Any) -> MoE:
    """A layer in float64, with experts of odd sizes unless others are given."""
    torch.manual_seed(0)
    experts = GatedExperts(DIM, EXPERTS, HIDDEN) if experts is None else experts
    gate = TopKGating(DIM, EXPERTS, k, capacity_factor_train=capacity, capacity_factor_eval=capacity, **settings)
    return MoE(DIM, gate=gate, experts=experts).double()


def add_lora(moe: nn.Module, weights: tuple[str, ...] = ALL, **settings: Any) -> Any:
    """The layer, to which PEFT has added adapters that are not zero."""
    there = [f"experts.{name}" for name in weights if getattr(moe.experts, name, None) is not None]
    config = LoraConfig(r=3, lora_alpha=5, target_parameters=there, init_lora_weights=False, **settings)
    return inject_adapter_in_model(config, moe)


def compute_results(module: nn.Module, x: Tensor, *args: Any) -> dict[str, Tensor]:
    """The output, and the gradients of the inputs and of everything that is trained."""
    x = x.clone().requires_grad_()
    out = module(x, *args)[0]
    (out.square().sum() + out[..., 0].sum()).backward()
    found = {"out": out.detach(), "x": x.grad}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def assert_same(slow: nn.Module, fast: nn.Module, x: Tensor, *args: Any, implementation: Any = "auto") -> None:
    """Both compute the same, the second by a way of ours."""
    wanted = compute_results(slow, x, *args)
    with ops.use(implementation):
        found = compute_results(fast, x, *args)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def make_both(moe: Any) -> tuple[Any, Any]:
    return copy.deepcopy(moe), fast_lora(moe)


LAYERS = {
    "gated": lambda: make_layer(),
    "one of each": lambda: make_layer(GatedExperts(DIM, EXPERTS, HIDDEN), k=1),
    "two matrices, biases": lambda: make_layer(Experts(DIM, EXPERTS, HIDDEN, bias=True)),
    "gated, biases": lambda: make_layer(GatedExperts(DIM, EXPERTS, HIDDEN, bias=True)),
    "clamped": lambda: make_layer(GatedExperts(DIM, EXPERTS, HIDDEN, ops.ClampedSwiGLU())),
    "unknown activation": lambda: make_layer(GatedExperts(DIM, EXPERTS, HIDDEN, nn.Mish)),
    "capacity": lambda: make_layer(capacity=0.7),
    "square": lambda: make_layer(GatedExperts(DIM, EXPERTS, DIM)),
    "many experts, few tokens": lambda: MoE(DIM, gate=TopKGating(DIM, 40, 2), experts=Experts(DIM, 40, 7)).double(),
    "expert choice": lambda: MoE(DIM, gate=ExpertChoiceGating(DIM, EXPERTS), experts=Experts(DIM, EXPERTS, 7)).double(),
}


@pytest.mark.parametrize("implementation", list(implementations.LORA_IMPLEMENTATIONS))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_the_numbers_of_peft(name, transposed, implementation):
    moe = LAYERS[name]()
    if transposed:
        moe.experts.is_transposed = True  # as in models of transformers: PEFT's A is then at the other side
    slow, fast = make_both(add_lora(moe))
    x = torch.randn(2, TOKENS // 2, DIM, dtype=torch.float64)
    if name == "unknown activation" and implementation in ("cpu", "batched"):
        with ops.use(implementation), pytest.raises(ValueError, match="the activation Mish is none of"):
            fast(x)
        return
    assert_same(slow, fast, x, implementation=implementation)


@pytest.mark.parametrize("weights", [("w1",), ("w3",), ("w2",), ("w1", "w2"), ("w1", "w3")])
def test_some_of_the_weights(weights):
    assert_same(*make_both(add_lora(make_layer(), weights)), torch.randn(2, TOKENS, DIM, dtype=torch.float64))


def test_bias_adapters_use_peft_implementation():
    slow, fast = make_both(add_lora(make_layer(GatedExperts(DIM, EXPERTS, HIDDEN, bias=True)), (*ALL, "b1", "b2")))
    assert slow.experts.num_experts == 1  # PEFT's own, of a matrix
    assert_same(slow, fast, torch.randn(2, TOKENS, DIM, dtype=torch.float64))


def test_masked_skewed_and_no_tokens():
    moe = make_layer()
    moe.gate.w_gating.data[:, 0] *= 100  # half of all first choices
    slow, fast = make_both(add_lora(moe))
    x, mask = torch.randn(2, TOKENS, DIM, dtype=torch.float64), torch.rand(2, TOKENS) < 0.6
    assert_same(slow, fast, x, mask)
    assert_same(slow, fast, x, torch.zeros_like(mask))
    assert_same(slow, fast, x[:, :0])


def test_single_expert_and_slots_use_peft_implementation():
    moe = MoE(DIM, gate=TopKGating(DIM, 1, 1), experts=Experts(DIM, 1, 7)).double()
    assert_same(*make_both(add_lora(moe)), torch.randn(2, TOKENS, DIM, dtype=torch.float64))
    slow, fast = make_both(add_lora(make_layer()))
    slots = torch.randn(EXPERTS, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(fast.experts(slots), slow.experts(slots))


def test_no_stack_is_made(monkeypatch):
    """Neither in the forward nor in the backward is there a tensor of a stack's size."""
    fast = fast_lora(add_lora(make_layer()))
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view:
                largest = max(largest, out.numel())
            return out

    x = torch.randn(1, 4, DIM, dtype=torch.float64, requires_grad=True)
    with Sizes():
        fast(x)[0].square().sum().backward()
    assert 0 < largest < fast.experts.get_base_layer().w1.numel()


def test_two_adapters_scaling_disabled_merged_and_unmerged():
    model = get_peft_model(
        Holder(make_layer()), LoraConfig(r=3, lora_alpha=5, target_parameters=TARGETS, init_lora_weights=False)
    )
    config = LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_parameters=TARGETS, init_lora_weights=False)
    model = fast_lora(model)
    model.add_adapter("other", config)  # to the same weights, after the call
    slow = copy.deepcopy(model)
    for module in slow.modules():
        if isinstance(module, wrapper.ParamWrapper):
            module.__class__ = layer_of_peft.ParamWrapper
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    outputs = []
    for active in (["default"], ["other"], ["default", "other"]):
        for one in (slow, model):
            one.base_model.set_adapter(active)
        assert_same(slow, model, x)
        outputs.append(model(x)[0].detach())
    for one in (slow, model):
        for module in one.modules():
            if isinstance(module, layer_of_peft.ParamWrapper):
                module.set_scale("other", 0.3)
    assert_same(slow, model, x)
    assert all(not torch.allclose(outputs[i], outputs[i - 1]) for i in range(3))

    with model.disable_adapter(), slow.disable_adapter():
        plain = model(x)[0]
        torch.testing.assert_close(plain, slow(x)[0])
    unmerged = model(x)[0]
    model.merge_adapter()
    torch.testing.assert_close(model(x)[0], unmerged)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x)[0], unmerged)
    assert_same(slow, model, x)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(x)[0], unmerged)
    assert not torch.allclose(plain, unmerged)


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_load_into_stock_peft_and_back(tmp_path, transposed):
    def base() -> Any:
        torch.manual_seed(0)
        moe = make_layer(GatedExperts(DIM, EXPERTS, DIM))  # square: a factor on the wrong side would fit
        if transposed:
            moe.experts.is_transposed = True
        return Holder(moe)

    fast = fast_lora(get_peft_model(base(), LoraConfig(r=2, target_parameters=TARGETS, init_lora_weights=False)))
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    wanted = fast(x)[0]
    fast.save_pretrained(tmp_path / "ours")
    stock = PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(stock(x)[0], wanted)
    torch.testing.assert_close(copy.deepcopy(stock).merge_and_unload()(x)[0], wanted)
    stock.save_pretrained(tmp_path / "stock")
    again = fast_lora(PeftModel.from_pretrained(base(), tmp_path / "stock"))
    torch.testing.assert_close(again(x)[0], wanted)
    assert stock.state_dict().keys() == again.state_dict().keys() == fast.state_dict().keys()


def test_copies_and_pickles_stay_fast():
    fast = fast_lora(add_lora(make_layer()))
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert isinstance(again.experts, wrapper.ParamWrapper)
        torch.testing.assert_close(again(x)[0], fast(x)[0])


@pytest.mark.parametrize("trained", [r"lora|\.w2$", "lora_A"])
def test_a_stack_that_is_trained_too_and_factors_that_are_frozen(trained):
    moe = add_lora(make_layer())
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(re.search(trained, name) is not None)
    assert_same(*make_both(moe), torch.randn(2, TOKENS, DIM, dtype=torch.float64))


def test_inference_and_inputs_without_gradient():
    slow, fast = make_both(add_lora(make_layer()))
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x)[0], slow.eval()(x)[0])
        torch.testing.assert_close(fast(x[:, :1])[0], slow(x[:, :1])[0])  # one token, as in decoding
    fast(x)[0].sum().backward()
    assert fast.experts.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("name", ["gated", "gated, biases", "clamped", "capacity", "square"])
@pytest.mark.parametrize("weights", [ALL, ("w1",), ("w2", "w3")])
def test_one_token_is_decoded(name, weights, monkeypatch):
    """In eval without gradients, expert by expert and without a permutation, with the results of PEFT."""
    slow, fast = make_both(add_lora(LAYERS[name](), weights).eval())
    x = torch.randn(1, 2, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = slow(x[:, :1])[0]
    decoded, compute = [], decode.compute_expert_by_expert
    monkeypatch.setattr(decode, "compute_expert_by_expert", lambda *call: decoded.append(call) or compute(*call))
    with torch.no_grad():
        torch.testing.assert_close(fast(x[:, :1])[0], expected)
        assert len(decoded) == 1
        fast(x)
        fast.train()(x[:, :1])
    fast.eval()(x[:, :1])
    assert len(decoded) == 1


def test_adapters_of_quantized_experts_are_explained():
    moe = fast_lora(add_lora(make_layer().float().eval()))
    found = ops.explain_call(quantize_experts(moe), torch.randn(1, 1, DIM))
    assert found.implementation == "expert_by_expert"
    assert found.reasons == {"row_by_row": "adapters are multiplied expert by expert"}


def test_second_derivatives_and_checkpoints():
    slow, fast = make_both(add_lora(make_layer()))
    x = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)

    def penalty(moe: nn.Module) -> tuple[Tensor, ...]:
        trained = [parameter for parameter in moe.parameters() if parameter.requires_grad]
        first = torch.autograd.grad(moe(x)[0].square().sum(), [x, *trained], create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), [x, *trained])

    torch.testing.assert_close(penalty(fast), penalty(slow))
    found = torch.autograd.grad(checkpoint(lambda x: fast(x)[0], x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(slow(x)[0].square().sum(), x))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    moe = make_layer().float()
    slow, fast = make_both(add_lora(moe if autocast else moe.bfloat16()))
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float32 if autocast else torch.bfloat16)
    exact = compute_results(copy.deepcopy(slow).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, found = compute_results(slow, x), compute_results(fast, x)
    for name in exact:  # as near to the exact numbers as PEFT's, of the same dtypes
        assert found[name].dtype == wanted[name].dtype
        error, its = ((part[name].double() - exact[name]).norm() for part in (found, wanted))
        assert error <= 2 * its + 0.01 * exact[name].norm(), name


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: 3, TypeError, "model must be a model .*, got 3"),
        (make_layer, ValueError, "LoRA on no stack, .* only w1, w3, w2 of .* with target_parameters in"),
        (lambda: make_adapted(nn.Linear(2, 2), target_modules=["0"]), ValueError, "Sequential has LoRA on no stack"),
        (
            lambda: add_lora(make_layer(Own(DIM, 5)), ("w1",)),
            ValueError,
            "w1 of Own .* that do not override forward",
        ),
        (
            lambda: make_adapted(Experts(DIM, 5, bias=True), target_parameters=["0.b1"]),
            ValueError,
            "b1 of Experts .* supports only w1",
        ),
    ],
)
def test_unprepared_modules_raise(make, error, words):
    with pytest.raises(error, match=words):
        fast_lora(make())


def make_adapted(module: nn.Module, **targets: Any) -> nn.Module:
    return inject_adapter_in_model(LoraConfig(r=1, **targets), nn.Sequential(module))


class Own(GatedExperts):
    def forward(self, x, assignments=None):
        return super().forward(x, assignments)


def test_skipped_target_parameters_raise():
    """By PEFT, which is content if it finds something: a name that is wrong, and weights that are no parameters."""
    wrong = LoraConfig(r=2, target_parameters=["experts.w1", "experts.w4"])
    with pytest.raises(ValueError, match=r"has no adapters for experts.w4 in target_parameters, .*check the names"):
        fast_lora(inject_adapter_in_model(wrong, make_layer()))
    small = quantize_experts(Holder(make_layer()).requires_grad_(False))
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):  # PEFT adapts what it finds beside
        alone = inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["0"], target_parameters=TARGETS), nn.Sequential(nn.Linear(DIM, DIM), small)
        )
    with pytest.raises(ValueError, match=r"no adapters for experts.w1, experts.w2, experts.w3 .*weights_shown"):
        fast_lora(alone)


def test_fast_lora_requires_converted_experts():
    model = get_peft_model(
        build_model("Qwen3Moe"), LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    )
    with pytest.raises(ValueError, match=r"gate_up_proj of Qwen3MoeExperts .*from_transformers\(\) before adding"):
        fast_lora(model)


def test_the_router_has_no_low_rank_factors():
    with pytest.raises(ValueError, match=r"gate has num_experts=1, but the layer has num_experts=5; PEFT can train a"):
        get_peft_model(Holder(make_layer()), LoraConfig(target_modules=[], target_parameters=["gate.w_gating"]))


@pytest.mark.parametrize("change", [lambda moe: moe, fast_lora], ids=["peft", "fast"])
def test_adapted_experts_are_not_unstacked(change):
    moe = change(add_lora(make_layer()))
    with pytest.raises(ValueError, match=r"ParamWrapper depends on them. Merge adapters"):
        unstack(moe)
    assert type(moe.experts.get_base_layer()) is GatedExperts


def test_adapted_experts_are_not_sharded(one_process):
    """In either order."""
    mesh = init_device_mesh("cpu", (1,))
    adapted, sharded = Holder(add_lora(make_layer())), Holder(make_layer())
    with pytest.raises(ValueError, match=r"experts is wrapped in a ParamWrapper; .* Adapters on sharded experts"):
        parallelize_module(adapted, mesh, {"moe": ExpertParallel()})
    parallelize_module(sharded, mesh, {"moe": ExpertParallel()})
    with pytest.raises(ValueError, match=r"w1 of ShardedGatedExperts .*sharded across ranks cannot have adapters"):
        fast_lora(get_peft_model(sharded, LoraConfig(target_modules=[], target_parameters=TARGETS)))


def test_peft_errors_are_preserved():
    model = fast_lora(get_peft_model(Holder(make_layer()), LoraConfig(r=2, target_parameters=TARGETS)))
    for refused in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(ValueError, match=r"does not work with|unsupported"):
            model.add_adapter(next(iter(refused)), LoraConfig(r=2, target_parameters=TARGETS, **refused))


def test_on_meta():
    with torch.device("meta"):
        moe = MoE(DIM, gate=TopKGating(DIM, EXPERTS), experts=GatedExperts(DIM, EXPERTS, HIDDEN))
        fast = fast_lora(add_lora(moe))
        assert fast(torch.randn(2, 3, DIM))[0].shape == (2, 3, DIM)


@pytest.mark.slow
def test_compiled_whole_and_cut():
    """Dynamic shapes, one graph, forward and backward."""
    slow, fast = make_both(add_lora(make_layer()))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (TOKENS, 7):
        x = torch.randn(2, tokens, DIM, dtype=torch.float64)
        wanted, found = compute_results(slow, x), compute_results(compiled, x)
        for name, part in found.items():
            torch.testing.assert_close(part, wanted[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("gate", [TopKGating, ExpertChoiceGating])
@pytest.mark.parametrize(
    "around", [InputWeightedExperts, lambda experts: ZeroComputationExperts(InputWeightedExperts(experts), num_zero=1)]
)
def test_adapters_inside_wrapped_experts(gate, around):
    """The adapted weights are those of the merged model, where rows reach the inner experts."""
    experts, x = around(GatedExperts(DIM, EXPERTS, HIDDEN)), torch.randn(2, 6, DIM, dtype=torch.float64)
    moe = MoE(DIM, gate=gate(DIM, experts.num_experts), experts=experts).double()
    path = next(name for name, module in moe.named_modules() if isinstance(module, GatedExperts))
    before = moe(x)[0]
    config = LoraConfig(r=3, target_parameters=[f"{path}.w1"], init_lora_weights=False)
    adapted = get_peft_model(moe, config)  # type: ignore[arg-type]
    found = adapted(x)[0]
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, adapted.merge_and_unload()(x)[0])


@pytest.mark.parametrize("fast", [False, True])
def test_outputs_of_another_width(fast):
    """PEFT's wrapper hands no attributes on, so the width is asked of what it wraps."""
    moe = add_lora(make_layer(GatedExperts(DIM, EXPERTS, HIDDEN, dim_out=4)))
    expected = compute_results(moe, torch.randn(TOKENS, DIM, dtype=torch.float64))
    found = compute_results(fast_lora(moe) if fast else moe, torch.randn(TOKENS, DIM, dtype=torch.float64))
    assert found["out"].shape == expected["out"].shape == (TOKENS, 4)
