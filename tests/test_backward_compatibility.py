"""What an earlier version wrote is read by this one, which computes the same with it: folders of models, state dicts,
pickles, records, checkpoints, exported programs. `tests/support/earlier_versions.py` says what there is, and wrote
it."""

from importlib.util import find_spec

import pytest
import torch
from support.earlier_versions import EXPECTED, ROOT, SAMPLES

NEED = {"folders": ("transformers", "peft"), "4_bits": ("transformers",)}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.filterwarnings("ignore")  # torch's, of files that others wrote
def test_loads_files_of_earlier_versions(name):
    for package in NEED.get(name, ()):
        if not find_spec(package):
            pytest.skip(f"{package} is not there")
    found, expected = SAMPLES[name].read(ROOT / name), torch.load(ROOT / name / EXPECTED, weights_only=True)
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        torch.testing.assert_close(
            found[part], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, part=part: f"{part}: {text}"
        )
