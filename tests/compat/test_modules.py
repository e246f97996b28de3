"""What users do with any `nn.Module`: copy, pickle, load, defer, call with other parameters, reparametrise, share."""

import copy
import io
import pickle

import pytest
import torch
from support.layer_variants import (
    ALL_VARIANTS,
    LAYER_VARIANTS,
    MASKED,
    ROUTERS,
    assert_all_close,
    assert_all_equal,
    compute_gradients,
    make_layer_with_router,
    run_layer,
)
from torch import nn
from torch.nn.utils import parametrize

from mixture_of_experts import ExpertChoiceGating, Experts, GatedExperts, HeirarchicalMoE, MoE, TopKGating

pytestmark = pytest.mark.slow

paths = pytest.mark.parametrize("path", LAYER_VARIANTS, ids=str)
routers = pytest.mark.parametrize("router", ROUTERS)
paths_and_routers = pytest.mark.parametrize("path", ALL_VARIANTS, ids=str)


def compute_everything(layer, x, mask):
    """Output and gradients by name."""
    results = run_layer(layer, x, mask)
    return {"out": results[0], **compute_gradients(layer, x, results)}


def save_and_load(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.feature("`copy.deepcopy`, `pickle`, `torch.save`, also after a backward")
@paths_and_routers
def test_copies(path):
    layer, (x, mask) = path.build(), path.inputs()
    expected = compute_everything(layer, x, mask)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), save_and_load(layer)):
        assert_all_equal(compute_everything(duplicate, x, mask), expected)
        with torch.no_grad():
            next(duplicate.parameters()).zero_()  # it shares nothing with the original
        assert_all_equal(compute_everything(layer, x, mask), expected)


@pytest.mark.feature("`load_state_dict(assign=True)` into a layer on the meta device")
@paths_and_routers
def test_assign(path):
    layer, (x, mask) = path.build(), path.inputs()
    with torch.device("meta"):
        deferred = path.build()
    deferred.load_state_dict(layer.state_dict(), assign=True)
    assert_all_equal(compute_everything(deferred, x, mask), compute_everything(layer, x, mask))


def check_materialized(build, x, mask):
    """The meta device tells shapes; `to_empty` gives memory; each module's `reset_parameters` what a new layer has."""
    with torch.device("meta"):
        layer = build()
    results = layer(x.detach().to("meta").requires_grad_(), mask=None if mask is None else mask.to("meta"))
    assert [(r.device.type, r.shape) for r in results] == [("meta", x.shape), ("meta", torch.Size())]
    sum(result.sum() for result in results).backward()
    layer.zero_grad()

    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = copy.deepcopy(layer)
    assert all(tensor.isfinite().all() for tensor in compute_everything(layer, x, mask).values())
    return fresh


@pytest.mark.feature("meta device: forward and backward tell shapes; `to_empty`, then `reset_parameters()`")
@paths
def test_materialize(path):
    layer = check_materialized(path.build, *path.inputs())
    for parameter, fresh in zip(layer.parameters(), path.build(seed=5).parameters(), strict=True):
        assert 0.5 < (parameter.std() / fresh.std() if fresh.any() else 1) < 2


@pytest.mark.feature("meta device: forward and backward tell shapes; `to_empty`, then `reset_parameters()`")
@routers
def test_materialize_with_routers(router):
    layer = check_materialized(lambda: make_layer_with_router(router), *MASKED.inputs())
    expected = ROUTERS[router]().state_dict()
    for name, tensor in layer.gate.state_dict().items():
        assert tensor.any() == expected[name].any(), name  # what starts at zero does so again


def run_ensemble(layers, x, mask, randomness="error"):
    """All layers at once: gradients of every layer's own loss, outputs and losses, and buffers afterwards."""
    parameters, buffers = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def loss(parameters, buffers):
        out, aux_loss = torch.func.functional_call(skeleton, (parameters, buffers), (x, mask))
        weigh = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return (out * weigh).sum() + aux_loss, (out, aux_loss)

    one = torch.func.grad(loss, has_aux=True)
    return (*torch.vmap(one, randomness=randomness)(parameters, buffers), buffers)


def check_ensemble(layers, x, mask):
    grads, (outs, aux_losses), buffers = run_ensemble(layers, x, mask)
    for index, layer in enumerate(layers):
        out, aux_loss = run_layer(layer, x, mask)
        torch.testing.assert_close((outs[index], aux_losses[index]), (out, aux_loss))
        expected = compute_gradients(layer, x, (out, aux_loss))
        expected.pop("input")
        assert_all_close({name: grad[index] for name, grad in grads.items()}, expected)
        for name, buffer in layer.named_buffers():  # each layer counts its own tokens
            torch.testing.assert_close(buffers[name][index], buffer)


@pytest.mark.feature("`torch.func.functional_call` and `vmap` over parameters (an ensemble), `torch.func.grad` inside")
@paths
def test_ensemble(path):
    check_ensemble([path.build(seed=seed, policy="all") for seed in range(3)], *path.inputs())


@pytest.mark.feature("`torch.func.functional_call` and `vmap` over parameters (an ensemble), `torch.func.grad` inside")
@routers
def test_ensemble_with_routers(router, limit):
    layers = [make_layer_with_router(router, seed=seed) for seed in range(3)]
    x, mask = MASKED.inputs()
    if router in ("Top2, policy random", "TopK, jitter, by score", "NoisyTopK"):
        with pytest.raises(RuntimeError, match="randomness"):  # vmap wants to be told whether all draw alike
            run_ensemble(layers, x, mask)
        check_randomness(router, layers, x, mask, limit)
        layers = [layer.eval() for layer in layers]
    if router != "Top2, policy random":
        check_ensemble(layers, x, mask)


def check_randomness(router, layers, x, mask, limit):
    """The same layer three times: the same outputs if all draw alike, else others."""
    thrice = [layers[0]] * 3
    one, two, _ = run_ensemble(thrice, x, mask, randomness="same")[1][0]
    assert torch.equal(one, two)
    if router == "TopK, jitter, by score":
        with pytest.raises(RuntimeError, match="different inplace randomness"):
            run_ensemble(thrice, x, mask, randomness="different")
        limit("in training with jitter, `vmap` needs `randomness='same'` because the jitter factors are drawn in place")
    else:
        one, two, _ = run_ensemble(thrice, x, mask, randomness="different")[1][0]
        assert not torch.equal(one, two)


@pytest.mark.feature("`vmap` over samples: gradients for each sample")
@paths
def test_gradients_of_samples(path):
    layer = path.build(policy="all")
    x, mask = path.inputs(3, 10)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, mask):
        mask = None if mask is None else mask.unsqueeze(0)
        out, aux_loss = torch.func.functional_call(layer, parameters, (x.unsqueeze(0), mask))
        return out.square().sum() + aux_loss

    grad = torch.func.grad(loss)
    together = torch.vmap(grad, (None, 0, None if mask is None else 0))(parameters, x.detach(), mask)
    for index in range(3):
        alone = grad(parameters, x[index].detach(), None if mask is None else mask[index])
        assert_all_close({name: value[index] for name, value in together.items()}, alone)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.feature("`torch.nn.utils.parametrize` of gate and experts")
@paths
def test_parametrize(path):
    layer = path.build()
    x, mask = path.inputs()
    expected = compute_everything(layer, x, mask)
    owners = [(module, name) for module in layer.modules() for name, _ in module.named_parameters(recurse=False)]
    for module, name in owners:
        parametrize.register_parametrization(module, name, Doubled())
    actual = compute_everything(layer, x, mask)
    torch.testing.assert_close(actual["out"], expected["out"])
    for name, grad in actual.items():
        if name.endswith("original"):
            plain = name.replace("parametrizations.", "").removesuffix(".original")
            torch.testing.assert_close(grad, 2 * expected[plain], msg=name)


@pytest.mark.feature("`share_memory()`")
@paths
def test_share_memory(path):
    layer = path.build()
    x, mask = path.inputs()
    expected = compute_everything(layer, x, mask)
    layer.share_memory()
    assert all(tensor.is_shared() for tensor in (*layer.parameters(), *layer.buffers()))
    assert_all_equal(compute_everything(layer, x, mask), expected)


@pytest.mark.parametrize("kind", [Experts, GatedExperts])
def test_parametrized_biases_count(kind):
    experts = kind(8, 4, 16, bias=True)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if name.startswith("b"):
                parameter.normal_()
    layer, x = MoE(8, experts=experts, second_policy_train="all"), torch.randn(2, 10, 8)
    expected, _ = layer(x)
    for name in [name for name, _ in experts.named_parameters()]:
        parametrize.register_parametrization(experts, name, Doubled())
    torch.testing.assert_close(layer(x)[0], expected)


class LabelledTensor(torch.Tensor):
    """Weights of a type of their own, as libraries of quantisation have them."""


@pytest.mark.parametrize("factor", [1.0, None])
def test_weights_of_another_tensor_type(factor):
    layer = MoE(8, 4, second_policy_train="all", capacity_factor_train=factor)
    x = torch.randn(2, 10, 8)
    expected, _ = layer(x)
    layer.experts.w1 = nn.Parameter(layer.experts.w1.detach().as_subclass(LabelledTensor))
    assert type(layer.experts.w1) is LabelledTensor
    torch.testing.assert_close(layer(x)[0], expected)


def test_residual_in_place_after_expert_choice():
    layer, x = MoE(8, gate=ExpertChoiceGating(8, 4)), torch.randn(2, 10, 8)
    out, _ = layer(x)
    expected = out + x
    out += x
    torch.testing.assert_close(out, expected)
    out.sum().backward()


@pytest.mark.filterwarnings("ignore")  # torch warns of its own quantization
def test_int8_reaches_experts_in_a_list_only():
    linear = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4)]
    stacked, listed = MoE(8, 4).eval(), MoE(8, 4, second_policy_eval="all", experts=linear).eval()
    quantize = torch.ao.quantization.quantize_dynamic
    assert quantize(stacked, {nn.Linear}).experts.w1.dtype == torch.float32
    x = torch.randn(2, 9, 8)
    quantized = quantize(listed, {nn.Linear})
    assert quantized.experts[0][0].weight().dtype == torch.qint8
    torch.testing.assert_close(quantized(x)[0], listed(x)[0], rtol=0, atol=0.03)
    assert not torch.equal(quantized(x)[0], listed(x)[0])


@pytest.mark.parametrize("factor", [1.0, None], ids=["capacity", "dropless"])
@pytest.mark.parametrize("training", [True, False])
def test_lists_of_experts_that_begin_in_place(factor, training):
    """They write into rows of their own: the same results, and the inputs stay."""
    layers = []
    for inplace in (False, True):
        torch.manual_seed(0)
        experts = [nn.Sequential(nn.LeakyReLU(inplace=inplace), nn.Linear(8, 8)) for _ in range(4)]
        gate = TopKGating(8, 4, capacity_factor_train=factor, capacity_factor_eval=factor)
        layers.append(MoE(8, gate=gate, experts=experts).train(training))
    x = torch.randn(2, 9, 8)
    given = x.clone()
    plain, written = (compute_everything(layer, given.requires_grad_(), None) for layer in layers)
    assert_all_equal(written, plain)
    assert torch.equal(given, x)
    slots = torch.randn(4, 5, 8, requires_grad=True)
    before = slots.detach().clone()
    assert torch.equal(*(layer.experts(slots) for layer in layers))
    assert torch.equal(slots, before)
    if factor is None:
        one_by_one = [torch.func.vmap(lambda x, layer=layer: layer(x)[0])(given) for layer in layers]
        assert torch.equal(*one_by_one)


@pytest.mark.parametrize("kind", [MoE, HeirarchicalMoE])
def test_reset_parameters_redraws_all_weights(kind):
    layer = kind(8, shared_expert=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False)))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.reset_parameters()
    after = layer.state_dict()
    assert not [name for name, value in before.items() if torch.equal(after[name], value)]
    stays = {name: after[name].std() / value.std() for name, value in before.items() if value.numel() > 64}
    assert all(0.9 < ratio < 1.1 for ratio in stays.values()), stays
