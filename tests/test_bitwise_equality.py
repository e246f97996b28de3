"""What docs/correctness.md says of bits: the same, whatever stands beside a token."""

import pytest
import torch
from support import bitwise

from mixture_of_experts import ops


@pytest.mark.slow
@pytest.mark.parametrize("shape", [bitwise.LONG_SHAPE, bitwise.SHORT_SHAPE], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("implementation", bitwise.IMPLEMENTATIONS)
def test_implementation_keeps_bits(implementation, shape):
    with ops.use(implementation):
        answers = list(bitwise.Case((64, 96, 8), torch.float32, shape).compare_all())
    assert {question for question, _ in answers} > set(bitwise.EXPECTED[implementation])
    for question, found in answers:
        assert found == (True, True) or question not in bitwise.EXPECTED[implementation], question


def test_decoding_run_to_run():
    assert dict(bitwise.Case((64, 96, 8), torch.float32, bitwise.SHORT_SHAPE).decoding())["decoding: run to run"].out


def test_changed_bit_is_detected():
    case = bitwise.Case((8, 16, 4), torch.float32, bitwise.SHORT_SHAPE)
    one, other = case.run(), case.run()
    assert bitwise.compare_bits(one, other) == (True, True)
    other.grad[0, 0, 0] = torch.nextafter(other.grad[0, 0, 0], torch.tensor(torch.inf))
    assert bitwise.compare_bits(one, other) == (True, False)
    other.out[0, 0, 0] = torch.nextafter(other.out[0, 0, 0], torch.tensor(torch.inf))
    assert bitwise.compare_bits(one, other) == (False, False)
