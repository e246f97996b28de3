"""These tests need the extra `hf`."""

import pytest
from support.pretrained import COMMAND, MODELS, find_folder

for package in ("transformers", "accelerate", "peft"):
    pytest.importorskip(package, reason="the extra 'hf' is not installed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [name for name in MODELS if find_folder(name) is None]
    if item.get_closest_marker("pretrained") and missing:
        pytest.skip(f"{' and '.join(missing)} were not fetched; this does it: {COMMAND}")
