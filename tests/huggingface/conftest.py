"""These tests need the extra `hf`."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
