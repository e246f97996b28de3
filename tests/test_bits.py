"""What docs/trust.md says of bits: the same, whatever stands beside a token."""

import pytest
import torch
from support import bits

from mixture_of_experts import ops


@pytest.mark.slow
@pytest.mark.parametrize("shape", [bits.MANY, bits.FEW], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("way", bits.WAYS)
def test_what_a_way_keeps(way, shape):
    with ops.use(way):
        answers = list(bits.Case((64, 96, 8), torch.float32, shape).answers())
    assert {question for question, _ in answers} > set(bits.KEPT[way])
    for question, found in answers:
        assert found == (True, True) or question not in bits.KEPT[way], question


def test_decoding_run_to_run():
    assert dict(bits.Case((64, 96, 8), torch.float32, bits.FEW).decoding())["decoding: run to run"].out


def test_another_bit_is_seen():
    case = bits.Case((8, 16, 4), torch.float32, bits.FEW)
    one, other = case.run(), case.run()
    assert bits.equal(one, other) == (True, True)
    other.grad[0, 0, 0] = torch.nextafter(other.grad[0, 0, 0], torch.tensor(torch.inf))
    assert bits.equal(one, other) == (True, False)
    other.out[0, 0, 0] = torch.nextafter(other.out[0, 0, 0], torch.tensor(torch.inf))
    assert bits.equal(one, other) == (False, False)
