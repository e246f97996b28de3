"""Memory that Linux is asked to map by huge pages."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mixture_of_experts import MoE
from mixture_of_experts.ops.cpu.memory import LEAST, in_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def is_advised(tensor: torch.Tensor) -> bool:
    """Whether the mapping that holds the middle of its memory has the flag that `madvise` sets."""
    middle, inside = tensor.data_ptr() + tensor.untyped_storage().nbytes() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("its memory is mapped nowhere")


@pytest.mark.skipif(not SETTING.exists(), reason="a kernel without huge pages")
def test_gradients_of_weights_lie_in_huge_pages():
    """Of weights that are large enough."""
    layer = MoE(dim=256, num_experts=4, hidden_dim=2048)
    layer(torch.randn(1, 16, 256))[0].sum().backward()
    for weight in layer.experts.parameters():
        assert isinstance(weight, nn.Parameter)
        assert weight.nbytes >= LEAST
        assert is_advised(weight.grad)


@pytest.mark.parametrize("size", [0, 1, LEAST - 1, LEAST, LEAST + 1])
@pytest.mark.parametrize("offset", [0, 3])
def test_it_is_the_tensor_itself(size: int, offset: int):
    """Of any size, and where it shares memory."""
    tensor = torch.zeros(size + offset, dtype=torch.uint8)[offset:]
    assert in_huge_pages(tensor) is tensor
    assert not tensor.any()
    tensor.fill_(7)
    assert (tensor == 7).all()


@pytest.mark.parametrize("offset", [0, 3, 5000])
def test_it_asks_for_its_own_memory_only(offset: int, monkeypatch):
    """From the first whole page to the end of what the tensor shares."""
    asked = []
    monkeypatch.setattr("mixture_of_experts.ops.cpu.memory._madvise", lambda *arguments: asked.append(arguments))
    whole = torch.zeros(2 * LEAST, dtype=torch.uint8)
    in_huge_pages(whole[offset:])
    begin, size = asked[0][0].value, asked[0][1].value
    assert 0 <= begin - whole.data_ptr() < mmap.PAGESIZE
    assert begin + size == whole.data_ptr() + whole.nbytes


def test_other_systems_have_no_such_call(monkeypatch):
    monkeypatch.setattr("mixture_of_experts.ops.cpu.memory._madvise", None)
    tensor = torch.ones(LEAST)
    assert in_huge_pages(tensor) is tensor
