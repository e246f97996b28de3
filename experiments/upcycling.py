"""The mixture of the scaling experiment that begins with the weights of a trained dense model."""

import torch

from .language_model.model import ByteLM


@torch.no_grad()
def upcycle(mixture: ByteLM, dense: ByteLM) -> None:
    """Give a mixture of gated experts the weights of a dense model: until it is trained, it computes the same.

    So that a byte costs no more than before, its k experts are together a copy of the dense layer, each a slice of the
    hidden units: "virtual groups" (He 2024, arXiv 2410.07524; Komatsuzaki 2022, arXiv 2212.05055, has whole copies and
    k times the work). Experts k i to k i + k - 1 are the slices of copy i; their router weights begin equal, so that
    they are chosen together, each with weight 1 / k, which `w2` takes back. Hidden units that the mixture has more keep
    their w1 and w3, and begin with a w2 of 0.

    The router has to choose k experts for every byte, drop none and normalise their weights (`routers.mixtral`).
    """
    shared = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    mixture.load_state_dict(shared, strict=False)
    for block, dense_block in zip(mixture.blocks, dense.blocks, strict=True):
        gate, experts, ffn = block.ffn.gate, block.ffn.experts, dense_block.ffn
        k, size = gate.k, experts.hidden_dim
        if experts.num_experts % k or k * size < len(ffn.w2):
            raise ValueError(
                f"{experts.num_experts} experts of {size} hidden units are no copies of a dense layer of {len(ffn.w2)} "
                f"in {k} slices: give a multiple of {k} experts, and a width of at least {len(ffn.w2)}"
            )
        gate.w_gating.copy_(gate.w_gating[:, ::k].repeat_interleave(k, dim=-1))
        experts.w2.zero_()
        for i, units in enumerate(torch.arange(len(ffn.w2)).split(size)):
            experts.w1[i::k, :, : len(units)] = ffn.w1[:, units]
            experts.w3[i::k, :, : len(units)] = ffn.w3[:, units]
            experts.w2[i::k, : len(units)] = k * ffn.w2[units]
