"""The recipes of docs/recipes.md against the blocks of the `transformers` package, on the same weights.

Outputs, and the gradients of the input, the router, every expert's weights and the shared expert, within 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.recipes import recipe
from torch import Tensor, nn

from mixture_of_experts import GatedExperts, MoE, TopKGating
from mixture_of_experts.dispatch import combine, dispatch

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

Read = Callable[[Tensor], Tensor]  # of a parameter: its value, or its gradient
Weights = Callable[[nn.Module, Read], dict[str, Tensor]]  # their weights by our names, in our layout

TOLERANCE = 1e-5
SEEDS = range(3)
DTYPES = (torch.float32, torch.float64)


# ---- parts by hand ----


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Llama4Experts(GatedExperts):
    def forward(self, x, decision):
        rows = decision.without_gaps()  # the plan: one row for each choice, sorted by expert
        scaled = dispatch(x, rows) * rows.row_weight().unsqueeze(-1)
        result = self.compute(scaled.to(x.dtype), rows.rows_per_expert)
        return combine(result, rows._replace(weight=(rows.weight != 0).to(rows.weight.dtype)))


def llama4_moe(dim, num_experts, hidden_dim, k=1):
    gate = TopKGating(dim, num_experts, k=k, score="sigmoid", normalize=False, balance_over="batch")
    experts = Llama4Experts(dim, num_experts, hidden_dim)
    return MoE(dim, gate=gate, experts=experts, shared_expert=SwiGLU(dim, hidden_dim))


class GatedSharedExpert(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)
        self.shared_gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x):
        out = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return torch.sigmoid(self.shared_gate(x)) * out


def modeling(name: str) -> ModuleType:
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def configuration(name: str, config_class: str, **settings):
    """A small configuration whose experts are computed one by one, the plainest of their backends."""
    module = pytest.importorskip(f"transformers.models.{name}.configuration_{name}")
    config = getattr(module, config_class)(hidden_act="silu", **settings)
    config._experts_implementation = "eager"
    return config


# Layouts: a linear layer's weight there is (out, in), here (in, out)


def gated_experts(experts: nn.Module, read: Read) -> dict[str, Tensor]:
    w1, w3 = read(experts.gate_up_proj).transpose(1, 2).chunk(2, dim=-1)
    return {"experts.w1": w1, "experts.w3": w3, "experts.w2": read(experts.down_proj).transpose(1, 2)}


def shared_expert(module: nn.Module, read: Read) -> dict[str, Tensor]:
    names = ("gate_proj", "up_proj", "down_proj")
    return {f"shared_expert.{name}.weight": read(getattr(module, name).weight) for name in names}


def softmax_block(block: nn.Module, read: Read) -> dict[str, Tensor]:
    return {"gate.w_gating": read(block.gate.weight).T, **gated_experts(block.experts, read)}


def deepseek_block(block: nn.Module, read: Read) -> dict[str, Tensor]:
    return {**softmax_block(block, read), **shared_expert(block.shared_experts, read)}


def qwen2_block(block: nn.Module, read: Read) -> dict[str, Tensor]:
    shared_gate = {"shared_expert.shared_gate.weight": read(block.shared_expert_gate.weight)}
    return {**softmax_block(block, read), **shared_expert(block.shared_expert, read), **shared_gate}


def llama4_block(block: nn.Module, read: Read) -> dict[str, Tensor]:
    w1, w3 = read(block.experts.gate_up_proj).chunk(2, dim=-1)  # not transposed
    return {
        "gate.w_gating": read(block.router.weight).T,
        "experts.w1": w1,
        "experts.w3": w3,
        "experts.w2": read(block.experts.down_proj),
        **shared_expert(block.shared_expert, read),
    }


def gpt_oss_block(block: nn.Module, read: Read) -> dict[str, Tensor]:
    experts = {f"experts.{name}": read(parameter) for name, parameter in block.experts.named_parameters()}
    return {"gate.w_gating": read(block.router.weight).T, "gate.b_gating": read(block.router.bias), **experts}


# Comparing


def randomize(block: nn.Module) -> None:
    """Weights of the size that trained ones have; large enough biases to matter."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=block_dim(block) ** -0.5)


def block_dim(block: nn.Module) -> int:
    return next(p.shape[-1] for name, p in block.named_parameters() if name in ("gate.weight", "router.weight"))


def compare(block: nn.Module, ours: nn.Module, weights: Weights, dtype: torch.dtype, buffers: dict | None = None):
    """Give both layers the same random weights, run them on the same input, and compare everything that comes out."""
    randomize(block)
    block, ours = block.to(dtype), ours.to(dtype)
    state = {name: value.detach().contiguous() for name, value in weights(block, lambda p: p).items()}
    ours.load_state_dict({**state, **(buffers or {})}, strict=True)
    x = torch.randn(2, 11, block_dim(block), dtype=dtype)
    cotangent = torch.randn_like(x)

    results = []
    for layer in (block, ours):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out = out[0] if isinstance(out, tuple) else out
        out.reshape(x.shape).backward(cotangent)
        results.append({"output": out.reshape(x.shape), "input": leaf.grad})
    results[0].update(weights(block, lambda p: p.grad))
    results[1].update({name: parameter.grad for name, parameter in ours.named_parameters()})

    assert results[0].keys() == results[1].keys()
    for name, theirs in results[0].items():
        assert theirs.abs().max() > 1e-3, f"{name}: nothing to compare"
        error = (results[1][name] - theirs).abs().max().item()
        assert error < TOLERANCE, f"{name} differs by {error}"


def on_seeds(*sizes: tuple):
    """Every size with every seed, in float32 and float64."""
    cases = [(size, seed, dtype) for size in sizes for seed in SEEDS for dtype in DTYPES]
    names = ["-".join(map(str, (*size, seed))) + f"-{dtype}".replace("torch.", "") for size, seed, dtype in cases]
    return pytest.mark.parametrize(("sizes", "seed", "dtype"), cases, ids=names)


@on_seeds((16, 24, 4, 2), (12, 8, 8, 3), (16, 4, 16, 8))
def test_mixtral(sizes, seed, dtype):
    torch.manual_seed(seed)
    dim, hidden, num_experts, k = sizes
    config = configuration(
        "mixtral",
        "MixtralConfig",
        hidden_size=dim,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
    )
    block = modeling("mixtral").MixtralSparseMoeBlock(config)
    ours = MoE(dim, gate=TopKGating(dim, num_experts, k=k), experts=GatedExperts(dim, num_experts, hidden))
    compare(block, ours, softmax_block, dtype)


@on_seeds((16, 8, 16, 8, False), (12, 8, 8, 3, True), (8, 16, 5, 1, False))
def test_olmoe(sizes, seed, dtype):
    torch.manual_seed(seed)
    dim, hidden, num_experts, k, normalize = sizes
    config = configuration(
        "olmoe",
        "OlmoeConfig",
        hidden_size=dim,
        intermediate_size=hidden,
        num_experts=num_experts,
        num_experts_per_tok=k,
        norm_topk_prob=normalize,
    )
    block = modeling("olmoe").OlmoeSparseMoeBlock(config)
    gate = TopKGating(dim, num_experts, k=k, normalize=normalize)
    compare(block, MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, hidden)), softmax_block, dtype)


@on_seeds((16, 8, 16, 8, True), (12, 8, 8, 3, False), (8, 16, 5, 1, False))
def test_qwen3_moe(sizes, seed, dtype):
    torch.manual_seed(seed)
    dim, hidden, num_experts, k, normalize = sizes
    config = configuration(
        "qwen3_moe",
        "Qwen3MoeConfig",
        hidden_size=dim,
        moe_intermediate_size=hidden,
        num_experts=num_experts,
        num_experts_per_tok=k,
        norm_topk_prob=normalize,
    )
    block = modeling("qwen3_moe").Qwen3MoeSparseMoeBlock(config)
    gate = TopKGating(dim, num_experts, k=k, normalize=normalize, balance_over="batch")
    compare(block, MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, hidden)), softmax_block, dtype)


@on_seeds((16, 8, 32, 8, 8, 4, 2.5), (12, 16, 12, 4, 3, 2, 1.0), (8, 8, 6, 2, 1, 1, 1.5))
def test_deepseek_v3(sizes, seed, dtype):
    torch.manual_seed(seed)
    dim, hidden, num_experts, k, groups, top_groups, scale = sizes
    config = configuration(
        "deepseek_v3",
        "DeepseekV3Config",
        hidden_size=dim,
        moe_intermediate_size=hidden,
        n_shared_experts=2,
        n_routed_experts=num_experts,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=scale,
    )
    block = modeling("deepseek_v3").DeepseekV3MoE(config)
    bias = 0.2 * torch.randn(num_experts)
    block.gate.e_score_correction_bias.copy_(bias)
    gate = TopKGating(
        dim,
        num_experts,
        k=k,
        score="sigmoid",
        scale=scale,
        num_groups=groups,
        top_groups=top_groups,
        expert_bias=True,
    )
    shared = SwiGLU(dim, 2 * hidden)
    ours = MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, hidden), shared_expert=shared)
    buffers = {"gate.expert_bias": bias, "gate.expert_counts": torch.zeros(num_experts, dtype=torch.int64)}
    compare(block, ours, deepseek_block, dtype, buffers)


@on_seeds((16, 8, 16, 4), (12, 16, 5, 2), (8, 8, 4, 1))
def test_qwen2_moe(sizes, seed, dtype):
    torch.manual_seed(seed)
    dim, hidden, num_experts, k = sizes
    config = configuration(
        "qwen2_moe",
        "Qwen2MoeConfig",
        hidden_size=dim,
        moe_intermediate_size=hidden,
        shared_expert_intermediate_size=3 * hidden,
        num_experts=num_experts,
        num_experts_per_tok=k,
    )
    block = modeling("qwen2_moe").Qwen2MoeSparseMoeBlock(config)
    gate = TopKGating(dim, num_experts, k=k, normalize=False)
    shared = GatedSharedExpert(dim, 3 * hidden)
    ours = MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, hidden), shared_expert=shared)
    compare(block, ours, qwen2_block, dtype)


@on_seeds((16, 8, 8, 4, 7.0), (12, 16, 5, 2, 0.5))
def test_gpt_oss(sizes, seed, dtype):
    """The second size has a limit so low that gate and value are clamped."""
    torch.manual_seed(seed)
    dim, hidden, num_experts, k, limit = sizes
    config = configuration(
        "gpt_oss",
        "GptOssConfig",
        hidden_size=dim,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
        swiglu_limit=limit,
    )
    block = modeling("gpt_oss").GptOssMLP(config)
    experts = recipe("GPT-OSS")["GptOssExperts"](dim, num_experts, hidden, limit=limit)
    ours = MoE(dim, gate=TopKGating(dim, num_experts, k=k, bias=True), experts=experts)
    compare(block, ours, gpt_oss_block, dtype)


@on_seeds((16, 8, 8, 1), (12, 16, 5, 2))
def test_llama4(sizes, seed, dtype):
    torch.manual_seed(seed)
    dim, hidden, num_experts, k = sizes
    config = configuration(
        "llama4",
        "Llama4TextConfig",
        hidden_size=dim,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
    )
    block = modeling("llama4").Llama4TextMoe(config)
    compare(block, llama4_moe(dim, num_experts, hidden, k), llama4_block, dtype)


def test_a_wrong_router_is_found():
    """The comparison has teeth: Mixtral's weights in a layer that does not normalise them."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2)
    block = modeling("mixtral").MixtralSparseMoeBlock(configuration("mixtral", "MixtralConfig", **sizes))
    ours = MoE(16, gate=TopKGating(16, 4, k=2, normalize=False), experts=GatedExperts(16, 4, 8))
    with pytest.raises(AssertionError, match="output"):
        compare(block, ours, softmax_block, torch.float32)


# Losses: `load_balancing_loss_func` is the same in every model of the package that has it


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (16, 8), (4, 1)])
def test_balance_loss_of_one_layer(num_experts, k, masked):
    """Their loss is k times ours over the batch, with the same gradient."""
    torch.manual_seed(k)
    gate = TopKGating(6, num_experts, k=k, balance_over="batch")
    x = torch.randn(3, 10, 6, requires_grad=True)
    mask = torch.arange(10) < torch.tensor([[10], [4], [7]]) if masked else None
    logits = x.flatten(0, 1) @ gate.w_gating
    theirs = modeling("mixtral").load_balancing_loss_func((logits,), num_experts, k, mask)
    ours = k * gate(x, mask=mask).balance_loss
    torch.testing.assert_close(ours, theirs)
    for found, expected in zip(
        *(torch.autograd.grad(loss, (x, gate.w_gating)) for loss in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_balance_loss_of_several_layers():
    """For L layers our number is theirs times k / L: the same when balanced, theirs is lower where layers cancel."""
    layers, num_experts, k = 3, 4, 2
    theirs = modeling("mixtral").load_balancing_loss_func
    gates = [TopKGating(num_experts, num_experts, k=k, balance_over="batch") for _ in range(layers)]

    def both(weights: list[Tensor]) -> tuple[float, float]:
        tokens = torch.eye(num_experts).unsqueeze(0)
        for gate, weight in zip(gates, weights, strict=True):
            gate.w_gating.data.copy_(weight)
        ours = sum(gate(tokens).balance_loss for gate in gates) * k / layers
        return ours.item(), theirs(tuple(tokens[0] @ weight for weight in weights), num_experts, k).item()

    balanced = [0.01 * torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)])] * layers
    assert both(balanced) == pytest.approx((k, k), rel=1e-3)
    skewed = [torch.tensor([8.0, 8.0, 0.0, 0.0]).roll(2 * layer).expand(4, 4) for layer in range(layers)]
    ours, theirs_skewed = both(skewed)
    assert ours == pytest.approx(num_experts, rel=1e-2)
    assert theirs_skewed < 0.6 * ours


def test_z_loss():
    torch.manual_seed(0)
    x, gate = torch.randn(2, 7, 6), TopKGating(6, 8)
    theirs = modeling("switch_transformers").router_z_loss_func(x @ gate.w_gating)
    torch.testing.assert_close(gate(x).z_loss, theirs)


def test_switch_balance_loss():
    """Theirs is of one choice, taken for each sequence, as ours."""
    torch.manual_seed(0)
    x, gate = torch.randn(2, 7, 6), TopKGating(6, 8, k=1)
    routing = gate(x)
    theirs = modeling("switch_transformers").load_balancing_loss_func(routing.probs, routing.expert)
    torch.testing.assert_close(routing.balance_loss, theirs)
