"""These tests need the extra `hf`."""

import pytest
import torch

for package in ("transformers", "accelerate", "peft"):
    pytest.importorskip(package, reason="the extra 'hf' is not installed")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
