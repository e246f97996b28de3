"""Initializes the upcycled mixture of the scaling experiment from a trained dense model."""

import torch

from .language_model.model import ByteLM


@torch.no_grad()
def upcycle(mixture: ByteLM, dense: ByteLM) -> None:
    """Copy the weights of a dense model to a mixture of gated experts, which then computes the same outputs.

    Each expert is a slice of the dense layer's hidden units, and the k experts that process a byte form one copy of the
    layer, so a byte costs no more than before. He 2024 (arXiv 2410.07524) calls this "virtual groups"; Komatsuzaki 2022
    (arXiv 2212.05055) uses whole copies, which take k times the work. Experts k i to k i + k - 1 are the slices of copy
    i. Their initial router weights are equal, so they are chosen together, each with weight 1 / k. To compensate, `w2`
    is scaled by k. If the mixture has additional hidden units, they keep their w1 and w3, and their w2 is set to 0.

    The router must choose k experts for every byte, drop none, and normalize their weights (`routers.mixtral`).
    """
    shared = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    mixture.load_state_dict(shared, strict=False)
    for block, dense_block in zip(mixture.blocks, dense.blocks, strict=True):
        gate, experts, ffn = block.ffn.gate, block.ffn.experts, dense_block.ffn
        k, size = gate.k, experts.hidden_dim
        if experts.num_experts % k or k * size < len(ffn.w2):
            raise ValueError(
                f"{experts.num_experts} experts of {size} hidden units cannot hold copies of a dense layer of "
                f"{len(ffn.w2)} in {k} slices: use a multiple of {k} experts, and a width of at least {len(ffn.w2)}"
            )
        gate.w_gating.copy_(gate.w_gating[:, ::k].repeat_interleave(k, dim=-1))
        experts.w2.zero_()
        for i, units in enumerate(torch.arange(len(ffn.w2)).split(size)):
            experts.w1[i::k, :, : len(units)] = ffn.w1[:, units]
            experts.w3[i::k, :, : len(units)] = ffn.w3[:, units]
            experts.w2[i::k, : len(units)] = k * ffn.w2[units]
