"""Load layer weights from torchtitan, Megatron, DeepSpeed, Tutel and fairscale into layers of this package.

    python examples/migrate.py  # converts random weights

Each function takes a dict of one layer's tensors, with the names in its docstring. See docs/migration.md.
"""

import torch
from torch import nn

from mixture_of_experts import Experts, GatedExperts, MoE, Top2Gating, TopKGating


@torch.no_grad()
def from_torchtitan(theirs, k=2):
    """Convert the tensors under `layers.N.moe`, with sigmoid scores and weights that are not normalized."""
    router = theirs["router.gate.weight"]
    w1, w2, w3 = (theirs[f"routed_experts.inner_experts.{name}"] for name in ("w1_EFD", "w2_EDF", "w3_EFD"))
    (num_experts, dim), hidden_dim = router.shape, w1.shape[1]
    gate = TopKGating(dim, num_experts, k, score="sigmoid", normalize=False, expert_bias=True)
    moe = MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, hidden_dim), loss_coef=0.0)
    gate.w_gating.copy_(router.T)
    gate.expert_bias.copy_(theirs["expert_bias_E"])
    for ours, weight in ((moe.experts.w1, w1), (moe.experts.w2, w2), (moe.experts.w3, w3)):
        ours.copy_(weight.mT)
    return moe


@torch.no_grad()
def from_megatron(theirs, k=2):
    """Convert the tensors under `decoder.layers.N.mlp`, with SwiGLU and one pair of matrices for each expert."""
    num_experts, dim = theirs["router.weight"].shape
    first, second = (
        torch.stack([theirs[f"experts.local_experts.{i}.linear_fc{j}.weight"].T for i in range(num_experts)])
        for j in (1, 2)
    )
    gate = TopKGating(dim, num_experts, k, balance_over="batch")
    moe = MoE(dim, gate=gate, experts=GatedExperts(dim, num_experts, second.shape[1]))
    moe.gate.w_gating.copy_(theirs["router.weight"].T)
    for ours, weight in zip((moe.experts.w1, moe.experts.w3), first.chunk(2, dim=-1), strict=True):  # gate, then up
        ours.copy_(weight)
    moe.experts.w2.copy_(second)
    return moe


def from_deepspeed(theirs, expert, *, k=1, capacity_factor=1.25, group_size=512):
    """Convert the tensors under the layer, whose names begin with `deepspeed_moe`.

    `expert()` constructs one expert, and `group_size` is the number of tokens that queue together.
    """
    router = theirs["deepspeed_moe.gate.wg.weight"]
    num_experts, dim = router.shape
    gate = TopKGating(dim, num_experts, k, capacity_factor_train=capacity_factor, capacity_factor_eval=1.0)
    moe = MoE(dim, gate=gate, experts=[expert() for _ in range(num_experts)], group_size=group_size)
    prefix = "deepspeed_moe.experts.deepspeed_experts."
    experts = {name.replace(prefix, "experts."): value for name, value in theirs.items() if name.startswith(prefix)}
    moe.load_state_dict({"gate.w_gating": router.T, **experts})
    return moe


def from_tutel(theirs, k=2, activation=nn.ReLU):
    """Convert the layer's state dict, for a capacity_factor of 0, which is dropless."""
    num_experts, hidden_dim, dim = theirs["experts.batched_fc1_w"].shape
    experts = Experts(dim, num_experts, hidden_dim, activation, bias=True)
    moe = MoE(dim, gate=TopKGating(dim, num_experts, k), experts=experts)
    state = {
        "gate.w_gating": theirs["gates.0.wg.weight"].T,
        "experts.w1": theirs["experts.batched_fc1_w"].mT,
        "experts.w2": theirs["experts.batched_fc2_w"],
        "experts.b1": theirs["experts.batched_fc1_bias"],
        "experts.b2": theirs["experts.batched_fc2_bias"],
    }
    moe.load_state_dict(state)
    return moe


def from_fairscale(theirs, experts, coefficient=0.01):
    """Convert `gate.wg.weight` (dim, experts) of a Top2Gate, with a list of its experts and its l_aux coefficient."""
    dim, num_experts = theirs["gate.wg.weight"].shape
    gate = Top2Gating(dim, num_experts, capacity_factor_train=2.0, second_policy_train="all", min_expert_capacity=1)
    gate.load_state_dict({"w_gating": theirs["gate.wg.weight"]})
    return MoE(dim, gate=gate, experts=experts, loss_coef=coefficient / num_experts**2)


def main():
    def expert():
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    draw, e = torch.randn, 8
    inner = {"w1_EFD": draw(e, 64, 32), "w2_EDF": draw(e, 32, 64), "w3_EFD": draw(e, 64, 32)}
    titan = {"router.gate.weight": draw(e, 32), "expert_bias_E": torch.zeros(e)}
    titan |= {f"routed_experts.inner_experts.{name}": weight for name, weight in inner.items()}
    shapes = {"linear_fc1": (2 * 64, 32), "linear_fc2": (32, 64)}
    mega = {f"experts.local_experts.{i}.{of}.weight": draw(shapes[of]) for i in range(e) for of in shapes}
    tutel = {"experts.batched_fc1_w": draw(e, 64, 32), "experts.batched_fc2_w": draw(e, 64, 32)}
    tutel |= {"experts.batched_fc1_bias": draw(e, 64), "experts.batched_fc2_bias": draw(e, 32)}
    deep = {
        f"deepspeed_moe.experts.deepspeed_experts.{i}.{n}": p
        for i in range(e)
        for n, p in expert().state_dict().items()
    }
    layers = {
        "torchtitan": from_torchtitan(titan),
        "Megatron": from_megatron({"router.weight": draw(e, 32), **mega}),
        "DeepSpeed": from_deepspeed({"deepspeed_moe.gate.wg.weight": draw(e, 32), **deep}, expert),
        "Tutel": from_tutel({"gates.0.wg.weight": draw(e, 32), **tutel}),
        "fairscale": from_fairscale({"gate.wg.weight": draw(32, e)}, [expert() for _ in range(e)]),
    }
    for name, moe in layers.items():
        print(name, tuple(moe(draw(1, 512, 32))[0].shape))


if __name__ == "__main__":
    main()
