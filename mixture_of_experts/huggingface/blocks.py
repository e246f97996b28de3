"""Sparse blocks of models in `transformers` as `MoE` layers, and back: the same weights in another layout.

Axes: d model dim, h hidden dim, e experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixture_of_experts.experts import GatedExperts
from mixture_of_experts.gating import TopKGating
from mixture_of_experts.huggingface.adapters import read_activation
from mixture_of_experts.moe import MoE
from mixture_of_experts.ops import ClampedSwiGLU


class Block(NamedTuple):
    """How a sparse block is made."""

    router: str  # attribute that holds the router
    gate: Callable[[Any], dict[str, Any]]  # the router's settings, for `TopKGating`
    shared: str | None = None  # attribute that holds the shared experts


def mixtral(router: Any) -> dict[str, Any]:
    return dict(normalize=True)


def qwen3(router: Any) -> dict[str, Any]:
    return dict(normalize=bool(router.norm_topk_prob))


def deepseek(router: Any) -> dict[str, Any]:
    groups = dict(num_groups=router.num_group, top_groups=router.topk_group) if router.num_group > 1 else {}
    scale = float(router.routed_scaling_factor)
    return dict(score="sigmoid", normalize=bool(router.norm_topk_prob), scale=scale, expert_bias=True, **groups)


def gpt_oss(router: Any) -> dict[str, Any]:
    return dict(normalize=True, bias=True)  # softmax over the chosen is that over all, normalised over the chosen


BLOCKS = {
    "DeepseekV3MoE": Block("gate", deepseek, shared="shared_experts"),
    "GptOssMLP": Block("router", gpt_oss),
    "MixtralSparseMoeBlock": Block("gate", mixtral),
    "OlmoeSparseMoeBlock": Block("gate", qwen3),
    "Qwen3MoeSparseMoeBlock": Block("gate", qwen3),
}
COMPARED = ("k", "score", "normalize", "scale", "num_groups", "top_groups")
COMPARED += ("capacity_factor_train", "capacity_factor_eval")


def from_transformers(
    block: nn.Module, *, loss_coef: float = 1e-2, z_loss_coef: float = 0.0, balance_over: Any = "batch"
) -> MoE:
    """A `MoE` that computes what a sparse block of `transformers` does, with copies of its weights.

    Known are the blocks of Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and GPT-OSS, of a model that is loaded.

    Args:
        block: such as `model.model.layers[0].mlp`.
        loss_coef, z_loss_coef: coefficients of the auxiliary losses.
        balance_over: see `TopKGating`; their own loss is over the batch.

    Raises:
        ValueError: a block that is not known, or with jitter, which there disturbs what experts read too.

    Example:
        >>> import torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> from mixture_of_experts.huggingface import from_transformers
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4))
        >>> block, x = model.model.layers[0].mlp, torch.randn(2, 5, 32)
        >>> moe = from_transformers(block)
        >>> torch.testing.assert_close(moe(x)[0], block(x))
    """
    known = find_block(block)
    moe = like(block, known, balance_over, loss_coef=loss_coef, z_loss_coef=z_loss_coef)
    state = {
        name: view.detach().clone(memory_format=torch.contiguous_format) for name, view in views(block, known).items()
    }
    if "gate.expert_bias" in state:
        state["gate.expert_bias"] = state["gate.expert_bias"].float()  # its steps are small
        state["gate.expert_counts"] = torch.zeros_like(state["gate.expert_bias"], dtype=torch.int64)
    moe.load_state_dict(state, assign=True)  # of the block's dtypes and device
    return moe.train(block.training)


@torch.no_grad()
def to_transformers(moe: MoE, block: nn.Module) -> nn.Module:
    """Copy the weights of a `MoE` into a sparse block of `transformers` that computes the same; returns the block.

    A block comes back from `from_transformers` and this bit for bit.

    Args:
        moe: the layer.
        block: a block of equal sizes and settings.

    Raises:
        ValueError: a block that is not known, or another computation; nothing is changed then.
    """
    known = find_block(block)
    wanted = like(block, known, "batch")
    differ = [
        f"the gate has {name}={getattr(moe.gate, name, None)!r}, the block {getattr(wanted.gate, name)!r}"
        for name in COMPARED
        if getattr(moe.gate, name, None) != getattr(wanted.gate, name)
    ]
    act, wanted_act = getattr(moe.experts, "act", None), wanted.experts.act
    if repr(act) != repr(wanted_act):
        differ.append(f"the experts have the activation {act}, the block {wanted_act}")
    own = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
    own.pop("gate.expert_counts", None)
    theirs = views(block, known)
    for name in sorted(own.keys() | theirs.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (own, theirs)]
        if shapes[0] != shapes[1]:
            differ.append(f"{name} has shape {shapes[0]} in the layer and {shapes[1]} in the block")
    if differ:
        raise ValueError(f"the layer does not compute what a {type(block).__name__} does: " + "; ".join(differ))
    for name, view in theirs.items():
        view.copy_(own[name])
    return block


def find_block(block: nn.Module) -> Block:
    known = BLOCKS.get(type(block).__name__)
    if known is None:
        raise ValueError(f"a {type(block).__name__} is not known: there are {', '.join(BLOCKS)}")
    if getattr(block, "jitter_noise", 0):
        raise ValueError(
            f"{type(block).__name__} has jitter_noise={block.jitter_noise}, which disturbs what its experts read too, "
            "as no gate does: set it to 0"
        )
    return known


def like(block: Any, known: Block, balance_over: Any, **coefs: Any) -> MoE:
    """A layer of a block's sizes and settings, its weights not yet there."""
    router, experts = getattr(block, known.router), block.experts
    e, d = router.weight.shape
    h = experts.down_proj.shape[1 if experts.is_transposed else 2]
    clamped = known.gate is gpt_oss
    activation = ClampedSwiGLU(experts.alpha, experts.limit) if clamped else read_activation(experts.act_fn)
    with torch.device("meta"):  # no draws for weights that are copied
        gate = TopKGating(d, e, router.top_k, balance_over=balance_over, **known.gate(router))
        ours: Any = GatedExperts(d, e, h, activation, bias=experts.has_bias)
    shared = None if known.shared is None else copy.deepcopy(getattr(block, known.shared))
    ours.is_transposed = True  # (e, in, out): what PEFT asks
    return MoE(d, e, gate=gate, experts=ours, shared_expert=shared, **coefs)


def views(block: Any, known: Block) -> dict[str, Tensor]:
    """The block's parameters by our names and in our layout, as views: to be read, and to be written."""
    router, experts = getattr(block, known.router), block.experts
    found = {"gate.w_gating": router.weight.T}
    if getattr(router, "bias", None) is not None:
        found["gate.b_gating"] = router.bias
    if hasattr(router, "e_score_correction_bias"):
        found["gate.expert_bias"] = router.e_score_correction_bias
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        gate_up, down = gate_up.mT, down.mT  # (e, in, out)
    halves = {"w": gate_up, "b": experts.gate_up_proj_bias} if experts.has_bias else {"w": gate_up}
    for kind, both in halves.items():
        gate, up = both.chunk(2, dim=-1) if experts.is_concatenated else (both[..., ::2], both[..., 1::2])
        found |= {f"experts.{kind}1": gate, f"experts.{kind}3": up}
    found["experts.w2"] = down
    if experts.has_bias:
        found["experts.b2"] = experts.down_proj_bias
    if known.shared is not None:
        shared = getattr(block, known.shared)
        found |= {f"shared_expert.{name}": parameter for name, parameter in shared.named_parameters()}
    return found
