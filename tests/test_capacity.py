"""Capacity in integers: one rule for a length that is known and one that is read from a mask, and no float64."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layer_variants import DIM, ROUTERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixture_of_experts import HeirarchicalMoE, MoE, Top2Gating, TopKGating
from mixture_of_experts.dispatch.capacity import Length, bounded_ratio, expert_capacity

FACTORS = st.one_of(st.sampled_from([0.29, 0.7, 1.0, 1.1, 1.25, 2.0, 2.0**-20, 1e-9, 1e9]), st.floats(1e-3, 100))


@pytest.mark.parametrize(("n", "factor", "expected"), [(100, 0.29, 29), (10, 0.7, 7), (16, 1.25, 20), (3, 1 / 3, 1)])
def test_a_factor_is_what_is_written(n, factor, expected):
    """`int(100 * 0.29)` is 28, as 0.29 is a little less in binary."""
    assert expert_capacity(n, n, bounded_ratio(factor), num_experts=1, minimum=1) == (min(n, expected), None)


@given(n=st.integers(0, 10_000), factor=FACTORS, e=st.integers(1, 300), k=st.integers(1, 8), minimum=st.integers(1, 5))
def test_one_rule(n, factor, e, k, minimum):
    """`max(min(n, int(k n factor / e)), minimum)`, in fractions; of no token none."""
    ratio = bounded_ratio(factor)
    expected = max(min(n, int(k * n * Fraction(*ratio) / e)), minimum) if n else 0
    slots, of_groups = expert_capacity(n, Length(torch.tensor([n, 0])), ratio, e, minimum, k)
    assert (slots, of_groups.tolist()) == (expected, [expected, 0])
    if k == 1:  # as is, if nothing else is said
        assert expert_capacity(n, n, ratio, e, minimum) == (expected, None)
    assert ratio[0] / ratio[1] == pytest.approx(factor, rel=1e-3) or ratio == (1, 1 << 20)


@given(n=st.integers(1, 1000), factor=FACTORS, e=st.integers(1, 50), outer=st.integers(1, 7), k=st.integers(1, 3))
def test_a_share_of_the_tokens(n, factor, e, outer, k):
    """n / outer tokens, which is no whole number, have the slots that exact arithmetic gives them."""
    ratio, share = bounded_ratio(factor), Fraction(n, outer)
    expected = max(min(int(share), int(k * share * Fraction(*ratio) / e)), 1)
    length = Length(torch.tensor([n]), parts_per_token=outer)
    assert expert_capacity(n, length, ratio, e, 1, k)[1].tolist() == [expected]


@pytest.mark.parametrize("factor", [1.0, 1.1, 1e9])
def test_no_product_leaves_int64(factor):
    n, ratio = 2**31, bounded_ratio(factor)
    slots, of_groups = expert_capacity(n, Length(torch.tensor([n])), ratio, 1024, 4, 8)
    assert 0 < slots <= n
    assert of_groups.tolist() == [slots]


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64]
        assert not wide, f"{func} computes in float64"
        return out


def make_two_levels(outer, inner):
    gates = {None: TopKGating(DIM, 2, 2), 1.0: Top2Gating(DIM, 2)}
    factor = {"capacity_factor_train": inner}
    return HeirarchicalMoE(
        8, gate_outer=gates[outer], gate_inner=TopKGating(DIM, 3, 2, outer_expert_dims=(2,), **factor)
    )


LAYERS = {
    **{name: lambda make=make: MoE(DIM, gate=make()) for name, make in ROUTERS.items()},
    **{f"two levels {a} {b}": lambda a=a, b=b: make_two_levels(a, b) for a in (None, 1.0) for b in (None, 1.0)},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_computed_in_float64(name, masked):
    """Apple's GPUs have none: a float32 layer makes no float64 tensor, forward or backward."""
    layer, x = LAYERS[name](), torch.randn(2, 9, DIM, requires_grad=True)
    mask = torch.rand(2, 9) < 0.7 if masked else None
    with NoFloat64():
        out, aux_loss = layer(x, mask=mask)
        (out.sum() + aux_loss).backward()
