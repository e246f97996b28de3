"""Every test gives every warning each time, and leaves no compiled code behind."""

import pytest
import torch


@pytest.fixture(autouse=True)
def all_warnings():
    torch.set_warn_always(True)  # not only in the test that happens to meet a warning first
    yield
    torch.set_warn_always(False)


@pytest.fixture
def fresh_compiler():
    """No code compiled before or after; torch's own deprecated use of its autograd functions is no news of ours."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
