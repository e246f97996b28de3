"""Any number of leading dimensions, any memory layout, and sizes at the edge."""

import warnings

import pytest
import torch
from support.layer_variants import DIM, LAYER_VARIANTS, assert_all_close, compute_gradients, run_layer

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("path", LAYER_VARIANTS, ids=str)]

SHAPES = {
    "2-D": (7,),
    "3-D": (2, 10),
    "4-D": (2, 3, 5),
    "empty batch": (0, 5),
    "empty sequence": (2, 0),
    "empty 2-D": (0,),
    "one token": (1, 1),
    "fewer tokens than experts": (2, 3),
}


@pytest.mark.feature("inputs `(n, d)`, `(b, n, d)`, `(a, b, n, d)`, empty, one token, fewer tokens than experts")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_shapes(path, training):
    layer = path.build().train(training)
    for name, shape in SHAPES.items():
        x, mask = path.inputs(*shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "group_size=5 splits")  # 7 positions, for one
            out, aux_loss = run_layer(layer, x, mask)
        assert out.shape == x.shape, name
        assert aux_loss.shape == (), name
        results = {"out": out, "aux_loss": aux_loss, **compute_gradients(layer, x, (out, aux_loss))}
        assert all(tensor.isfinite().all() for tensor in results.values()), name
        if x.numel() == 0:
            assert aux_loss == 0, name


@pytest.mark.feature("one expert")
def test_one_expert(path):
    layer = path.build(num_experts=1 if path.layer == "MoE" else (1, 1), policy="all")
    x, mask = path.inputs()
    out, aux_loss = run_layer(layer, x, mask)
    slots = x.detach() if mask is None else torch.where(mask.unsqueeze(-1), x.detach(), 0)
    grid = (1, -1, DIM) if path.layer == "MoE" or path.experts == "ExpertList" else (1, 1, -1, DIM)
    expected = layer.experts(slots.view(grid)).view(x.shape)
    expected = expected if mask is None else torch.where(mask.unsqueeze(-1), expected, 0)
    torch.testing.assert_close(out, expected)  # all tokens fit, and the weight of the only expert is 1
    assert all(grad.isfinite().all() for grad in compute_gradients(layer, x, (out, aux_loss)).values())


@pytest.mark.feature("leading dimensions are so many sequences")
def test_leading_dimensions(path):
    layer = path.build()
    x, mask = path.inputs(2, 3, 10)
    flat, flat_mask = x.detach().flatten(0, 1).requires_grad_(), None if mask is None else mask.flatten(0, 1)
    together, apart = run_layer(layer, x, mask), run_layer(layer, flat, flat_mask)
    torch.testing.assert_close(together[0].flatten(0, 1), apart[0], rtol=0, atol=0)
    torch.testing.assert_close(together[1], apart[1], rtol=0, atol=0)
    one, one_mask = flat[0].detach().requires_grad_(), None if mask is None else flat_mask[0]
    alone = run_layer(layer, one.unsqueeze(0), None if mask is None else one_mask.unsqueeze(0))
    torch.testing.assert_close(run_layer(layer, one, one_mask)[0], alone[0].squeeze(0), rtol=0, atol=0)


@pytest.mark.feature("non-contiguous inputs and masks")
def test_non_contiguous(path):
    layer = path.build()
    x, mask = path.inputs()
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    strided_mask = None if mask is None else mask.T.contiguous().T
    assert not strided.is_contiguous()
    expected, actual = run_layer(layer, x, mask), run_layer(layer, strided, strided_mask)
    torch.testing.assert_close(actual, expected)
    assert_all_close(compute_gradients(layer, strided, actual), compute_gradients(layer, x, expected))
    stretched = x[:1].detach().expand(3, -1, -1)  # a batch of stride 0
    out, _ = run_layer(layer, stretched, None if mask is None else mask[:1].expand(3, -1))
    copied, _ = run_layer(layer, stretched.contiguous(), None if mask is None else mask[:1].expand(3, -1))
    torch.testing.assert_close(out, copied)
